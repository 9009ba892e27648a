"""Clusters of units that are alike: k-means on rows of weights, or average linkage on correlations.

Sources: model folding (Wang et al., ICLR 2025) for k-means on the weights and for the correction of the variance that
averaging loses; ZipIt (Stoica et al., ICLR 2024) for merging what is correlated.
"""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.members import Floats

_ROUNDS = 100


def k_means(rows: Floats, count: int) -> Labels:
    """Return labels 0 ..

    Count-1 of the rows: Lloyd's iteration from a cut of Ward's tree, so that nothing is random.
    """
    if count >= len(rows):
        return np.arange(len(rows))
    labels = _cut(linkage(rows, "ward"), count)
    square = (rows**2).sum(axis=1)
    for _ in range(_ROUNDS):
        centres = means(rows, labels)
        away = square[:, None] - 2 * rows @ centres.T + (centres**2).sum(axis=1)
        new = _filled(away, count)
        if np.array_equal(new, labels):
            break
        labels = new
    return labels


def by_correlation(correlation: Floats, count: int) -> Labels:
    """Return labels 0 .. count-1 from average linkage on one minus the correlation."""
    n = len(correlation)
    if count >= n:
        return np.arange(n)
    away = np.clip(1.0 - (correlation + correlation.T) / 2, 0.0, 2.0)
    np.fill_diagonal(away, 0.0)
    return _cut(linkage(squareform(away, checks=False), "average"), count)


def means(rows: Floats, labels: Labels) -> Floats:
    """Return mean row of each cluster."""
    return np.asarray((indicator(labels) / np.bincount(labels)).T @ rows)


def indicator(labels: Labels) -> Floats:
    """(units, clusters): one where a unit lies in a cluster."""
    return np.eye(int(labels.max()) + 1)[labels]


def leaders(labels: Labels, scores: Floats) -> tuple[Labels, Labels]:
    """Return the unit with the largest score of each cluster, sorted; and for each unit, which of these it goes to."""
    order = np.lexsort((-scores, labels))
    first = order[np.flatnonzero(np.r_[True, np.diff(labels[order]) > 0])]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.sort(first), rank[labels]


def variance_gain(similarity: Floats, cluster: Labels) -> Floats:
    """Per cluster N / sqrt(N + (N^2 - N) c), with c the mean similarity of two of its N units (Wang et al. 2025).

    It undoes what averaging takes from the variance. Negative means count as zero.
    """
    inside = indicator(cluster)
    size = inside.sum(axis=0)
    pairs = np.einsum("ik,ij,jk->k", inside, similarity, inside, optimize=True) - inside.T @ np.diag(similarity)
    return np.asarray(size / np.sqrt(size + np.maximum(pairs, 0.0)))


def cosine(rows: Floats) -> Floats:
    """Cosines of all pairs of rows; a row of zeros is like nothing but itself."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norm > 0, norm, 1.0)
    out = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(out, 1.0)
    return np.asarray(out)


def _cut(tree: Floats, count: int) -> Labels:
    """Clusters after the first merges of a tree; exactly as many as asked for, also where heights are equal."""
    n = len(tree) + 1
    merges = n - count
    ends = tree[:merges, :2].astype(np.int64).T.ravel()
    node = np.tile(n + np.arange(merges), 2)
    graph = coo_array((np.ones(len(ends)), (ends, node)), shape=(2 * n - 1, 2 * n - 1))
    found = connected_components(graph, directed=False)[1][:n]
    return np.asarray(np.unique(found, return_inverse=True)[1], np.int64)


def _filled(away: Floats, count: int) -> Labels:
    """Return the nearest centre of each row; a cluster that would be empty takes the row farthest from its own."""
    labels = away.argmin(axis=1)
    sizes = np.bincount(labels, minlength=count)
    for empty in np.flatnonzero(sizes == 0).tolist():
        own = np.where(sizes[labels] > 1, away[np.arange(len(labels)), labels], -np.inf)
        row = int(own.argmax())
        sizes[labels[row]] -= 1
        labels[row], sizes[empty] = empty, 1
    return np.asarray(labels, np.int64)
