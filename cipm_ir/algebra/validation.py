"""Checked, read-only arrays: what may be a permutation, a row of scales, a row of signs."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cipm_ir.errors import SymmetryError

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]
SignArray: TypeAlias = NDArray[np.int8]


def as_permutations(value: ArrayLike, ndim: int, what: str) -> IntArray:
    """Read-only int64 copy of `value`, each row along the last axis a permutation of 0..n-1; else SymmetryError."""
    given = np.asarray(value)
    if given.ndim != ndim or (given.size and given.dtype.kind not in "iu"):
        raise SymmetryError(
            f"{what} has shape {given.shape} and dtype {given.dtype}; give an integer array with {ndim} axes."
        )
    perm = given.astype(np.int64)  # always a copy: the caller's array may change later
    n = perm.shape[-1]
    if perm.size:
        _check_rows(perm.reshape(-1, n), what)
    perm.setflags(write=False)
    return perm


def _check_rows(rows: IntArray, what: str) -> None:
    count, n = rows.shape
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= n:
        bad = low if low < 0 else high
        raise SymmetryError(f"{what} holds {bad}; every entry must lie in 0..{n - 1}, each exactly once.")
    # One flat count for all rows: shift row r into its own range [r n, (r + 1) n).
    shifted = rows if count == 1 else rows + n * np.arange(count, dtype=np.int64)[:, None]
    seen = np.zeros(count * n, dtype=np.bool_)
    seen[shifted.ravel()] = True
    if not seen.all():
        missing = int(np.argmin(seen)) % n
        raise SymmetryError(f"{what} never holds {missing}; it must hold each of 0..{n - 1} exactly once.")


def as_scales(value: ArrayLike, shape: tuple[int | None, ...], what: str) -> FloatArray:
    """Read-only float64 copy of `value`, strictly positive and finite, of `shape` (None: any); else SymmetryError."""
    given = _real(value, shape, what)
    scale = given.astype(np.float64)
    good = (scale > 0) & np.isfinite(scale)
    if not good.all():
        where = np.unravel_index(int(np.argmin(good)), scale.shape)
        position = tuple(int(index) for index in where)
        raise SymmetryError(f"{what} holds {scale[where]} at {position}; scales must be positive and finite.")
    scale.setflags(write=False)
    return scale


def as_signs(value: ArrayLike, shape: tuple[int | None, ...], what: str) -> SignArray:
    """Read-only int8 copy of `value`, every entry +1 or -1, of `shape` (None: any); else SymmetryError."""
    given = _real(value, shape, what)
    good = (given == 1) | (given == -1)
    if not good.all():
        where = np.unravel_index(int(np.argmin(good)), given.shape)
        position = tuple(int(index) for index in where)
        raise SymmetryError(f"{what} holds {given[where]} at {position}; every sign must be +1 or -1.")
    sign = given.astype(np.int8)
    sign.setflags(write=False)
    return sign


def as_exponents(value: ArrayLike | None, directions: int, what: str) -> tuple[int, ...]:
    """Return one Python int per direction (None: all 1); SymmetryError on another count or a fraction."""
    if value is None:
        return (1,) * directions
    given = np.asarray(value)
    if given.shape != (directions,) or (given.size and given.dtype.kind not in "iu"):
        raise SymmetryError(f"{what} is {value}; give {directions} integers, one per direction of the element.")
    return tuple(int(exponent) for exponent in given)


def _real(value: ArrayLike, shape: tuple[int | None, ...], what: str) -> NDArray[Any]:
    given = np.asarray(value)
    fits = given.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(given.shape, shape, strict=True)
    )
    if not fits or given.dtype.kind not in "fiu":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise SymmetryError(f"{what} has shape {given.shape} and dtype {given.dtype}; give real numbers ({wanted}).")
    return given
