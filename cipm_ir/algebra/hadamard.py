"""Hadamard matrices: entries ±1, rows orthogonal. Sylvester's doubling over Paley's constructions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def hadamard_matrix(n: int) -> FloatArray | None:
    """Return a Hadamard matrix of order n, (n, n) of ±1, or None where none is known here.

    n = 2^k m, where m is 1, or q + 1 for a prime q of the form 4r + 3, or 2 (q + 1) for a prime q of the form 4r + 1
    (Paley 1933): 12, 20, 28, 36, 44, 60, 68, ... Orders that need prime powers or other designs (52, 92, ...) are not
    among them.
    """
    if n < 1:
        return None
    size, doublings = n, 0
    while True:
        seed = _seed(size)
        if seed is not None:
            break
        if size % 2:
            return None
        size, doublings = size // 2, doublings + 1
    for _ in range(doublings):
        seed = np.block([[seed, seed], [seed, -seed]])
    return seed


def _seed(n: int) -> FloatArray | None:
    if n <= 2:
        return np.ones((1, 1)) if n == 1 else None
    if n % 4:
        return None
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        return _paley_one(n - 1)
    if _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return _paley_two(n // 2 - 1)
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> FloatArray:
    """Entry (i, j): 1 where i - j is a square modulo q, -1 where it is not, 0 on the diagonal."""
    character = -np.ones(q)
    character[np.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    index = np.arange(q)
    return np.asarray(character[(index[:, None] - index) % q])


def _bordered(q: int, sign: float) -> FloatArray:
    """Return the Jacobsthal matrix with a row and a column of ones (the column of ``sign``) and a zero corner."""
    made = np.zeros((q + 1, q + 1))
    made[0, 1:], made[1:, 0] = 1.0, sign
    made[1:, 1:] = _jacobsthal(q)
    return made


def _paley_one(q: int) -> FloatArray:
    """1 + S with S skew: order q + 1, q = 3 modulo 4."""
    return np.eye(q + 1) + _bordered(q, -1.0)


def _paley_two(q: int) -> FloatArray:
    """S with every ±1 and 0 replaced by a 2 by 2 block: order 2 (q + 1), q = 1 modulo 4."""
    one = np.array([[1.0, 1.0], [1.0, -1.0]])
    zero = np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(_bordered(q, 1.0), one) + np.kron(np.eye(q + 1), zero)
