"""One affinity for all units of a network, or for all modules of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import eigsh

from cipm_ir.passes.clustering.order import checked
from cipm_ir.passes.clustering.weights import normalized

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Couplings = Mapping[tuple[int, int], Floats]

_VECTORS = 24


def joint_affinity(
    affinities: Sequence[Floats], couplings: Couplings, strength: float, modules: Sequence[Labels] | None = None
) -> Floats:
    """Affinity of all units of a network: cosines in the leading eigenvectors of one matrix, what is negative as 0.

    The matrix holds affinities times (1 - strength) and couplings times strength, less what the degrees of the units
    give. Every layer and every pair of layers has an expectation of its own (Mucha et al. 2010): with a common one the
    layers themselves would be the modules. Its eigenvectors are those above the noise, that is, above the most negative
    eigenvalue (spectral modularity, Newman 2006).

    With ``modules``, a label 0, 1, ... per unit of each space, the result is among modules instead: the matrix is
    restricted to vectors that are constant on each module.
    """
    around = np.bincount(np.array(list(couplings), np.int64).ravel(), minlength=len(affinities))
    parts = {(k, k): (1 - strength) * _beyond_degrees(_hollow(block)) for k, block in enumerate(affinities)}
    for (i, j), bound in couplings.items():
        parts[i, j] = strength * _beyond_degrees(bound) / np.sqrt(around[i] * around[j])
    if modules is not None:
        base = [_indicators(label) for label in modules]
        parts = {(i, j): base[i].T @ part @ base[j] for (i, j), part in parts.items()}
    start = np.r_[0, np.cumsum([len(parts[k, k]) for k in range(len(affinities))])].tolist()
    span = [slice(a, b) for a, b in pairwise(start)]
    joint = np.zeros((start[-1], start[-1]))
    for (i, j), part in parts.items():
        joint[span[i], span[j]], joint[span[j], span[i]] = part, part.T
    embedded = normalized(_leading(joint), centred=False)
    return checked(np.minimum(embedded @ embedded.T, 1.0))


def _hollow(block: Floats) -> Floats:
    return np.asarray(block - np.diag(block.diagonal()), np.float64)


def _indicators(label: Labels) -> Floats:
    """Orthonormal vectors that are constant on the modules: (units, modules)."""
    hot = np.eye(int(label.max()) + 1)[label]
    return np.asarray(hot / np.sqrt(hot.sum(axis=0)), np.float64)


def _beyond_degrees(block: Floats) -> Floats:
    """Return the block less the product of its row and column sums, in units of its mean row sum."""
    rows, columns, total = block.sum(axis=1), block.sum(axis=0), float(block.sum())
    if not total:
        return block
    return np.asarray((block - np.outer(rows, columns) / total) * np.sqrt(len(rows) * len(columns)) / total)


def _leading(matrix: Floats) -> Floats:
    """Eigenvectors times the roots of their eigenvalues: (n, between 2 and `_VECTORS`)."""
    n = len(matrix)
    if n <= 4 * _VECTORS:
        values, vectors = np.linalg.eigh(matrix)
        low = float(values[0])
    else:
        first = np.random.default_rng(0).standard_normal(n)
        values, vectors = eigsh(matrix, k=_VECTORS, which="LA", v0=first, tol=1e-8)
        low = float(eigsh(matrix, k=1, which="SA", v0=first, return_eigenvectors=False, tol=1e-8)[0])
    order = np.argsort(-values)[:_VECTORS]
    kept = order[: max(2, int((values[order] > -low).sum()))]
    return np.asarray(vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0.0)), np.float64)
