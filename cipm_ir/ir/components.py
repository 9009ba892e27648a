"""Connected components of a graph that is given by its edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.integer[Any]]
_MANY = 1 << 19
"""From so many edges on scipy's search pays for its import, which takes longer than a small analysis."""


def connected_components(a: Indices, b: Indices, count: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Return how many components there are, and that of each node, numbered by their first nodes.

    Args:
        a, b: the two ends of each edge.
        count: of the nodes.
    """
    if len(a) >= _MANY:
        return _by_scipy(a, b, count)
    root = np.arange(count, dtype=np.int64)
    ends = np.asarray(a, np.int64), np.asarray(b, np.int64)
    while True:
        apart = ends[0] != ends[1]
        if not apart.any():
            break
        ends = ends[0][apart], ends[1][apart]
        np.minimum.at(root, np.maximum(*ends), np.minimum(*ends))
        while not np.array_equal(root, above := root[root]):
            root = above
        ends = root[ends[0]], root[ends[1]]
    first = root == np.arange(count)
    return int(first.sum()), (np.cumsum(first) - 1)[root]


def _by_scipy(a: Indices, b: Indices, count: int) -> tuple[int, npt.NDArray[np.int64]]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = (a.astype(np.int32), b.astype(np.int32)) if count < 1 << 31 else (a, b)
    graph = coo_array((np.ones(len(a)), ends), shape=(count, count)).tocsr()
    number, label = connected_components(graph, directed=False)
    return int(number), label.astype(np.int64)
