"""How well an order shows the modules of a matrix of affinities, and where the modules begin and end.

The diagonal (a unit with itself) counts nowhere. A matrix without any affinity between different units has modularity
0, and the block-diagonal mass and bandwidth of a matrix whose entries are all equal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def off_diagonal(affinity: Floats) -> Floats:
    """Return a copy with zeros on the diagonal; all ones beside it where there is nothing else."""
    inner = np.asarray(affinity, np.float64) - np.diag(np.diag(affinity))
    if len(inner) > 1 and not inner.any():
        inner = np.ones_like(inner) - np.eye(len(inner))
    return np.asarray(inner, np.float64)


def block_mass(affinity: Floats, label: Labels) -> float:
    """Block-diagonal mass: the part of all affinity that lies between units of one module, 0 to 1."""
    inner = off_diagonal(affinity)
    total = inner.sum()
    return float(inner[label[:, None] == label].sum() / total) if total else 1.0


def bandwidth(affinity: Floats) -> float:
    """Return mean distance |i - j| weighted by affinity, over what equal entries would give, (n + 1) / 3.

    Below 1: a band.
    """
    inner = off_diagonal(affinity)
    n = len(inner)
    place = np.arange(n)
    total = inner.sum()
    return float((np.abs(place[:, None] - place) * inner).sum() / total / ((n + 1) / 3)) if total else 1.0


def modularity(affinity: Floats, label: Labels, resolution: float = 1.0) -> float:
    """Weighted modularity of a partition (Newman 2004): mass inside modules beyond what degrees alone would give."""
    inner = np.asarray(affinity, np.float64) - np.diag(np.diag(affinity))
    degree = inner.sum(axis=1)
    total = degree.sum()
    if not total:
        return 0.0
    held = np.bincount(label, weights=degree)
    return float(inner[label[:, None] == label].sum() / total - resolution * (held @ held) / total**2)


def effective_dimension(correlation: Floats) -> float:
    """Participation ratio (Σλ)² / Σλ² of the eigenvalues of a symmetric matrix, 1 to n; by traces, without them."""
    square = float(np.square(correlation).sum())
    return float(np.trace(correlation)) ** 2 / square if square else 0.0


def equal_blocks(size: int, count: int) -> Labels:
    """Return labels of `count` blocks of equal size (up to one unit), in order."""
    return np.asarray(np.arange(size) * min(count, size) // size, np.int64)


def split(affinity: Floats, resolution: float = 1.0) -> Labels:
    """Modules of an ordered matrix: the cuts into stretches with the greatest modularity, labels 0, 1, ... in order.

    Exact, by dynamic programming over the ends of stretches: of all partitions into stretches this is the best.
    """
    inner = np.asarray(affinity, np.float64) - np.diag(np.diag(affinity))
    n, degree = len(inner), inner.sum(axis=1)
    total = degree.sum()
    if n < 2 or not total:
        return np.zeros(n, np.int64)
    held = np.zeros((n + 1, n + 1))
    held[1:, 1:] = (inner - resolution * np.outer(degree, degree) / total).cumsum(0).cumsum(1)
    corner = held.diagonal()
    best, origin = np.zeros(n + 1), np.zeros(n + 1, np.int64)
    for end in range(1, n + 1):
        worth = best[:end] + corner[end] + corner[:end] - 2 * held[:end, end]
        origin[end] = int(np.argmax(worth))
        best[end] = worth[origin[end]]
    starts = []
    end = n
    while end:
        end = int(origin[end])
        starts.append(end)
    return np.asarray(np.searchsorted(np.array(starts[::-1]), np.arange(n), side="right") - 1, np.int64)


def starts_of(label: Labels) -> list[int]:
    """Where the modules of a partition into stretches begin, without the first."""
    return (np.flatnonzero(np.diff(label)) + 1).tolist()
