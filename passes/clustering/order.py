"""Orders in which alike units are neighbours: four methods on a matrix of affinities.

An *affinity* is symmetric, (n, n), not negative, 1 on the diagonal. An *order* is a permutation in gather form: place k
is taken by unit order[k]. The same matrix gives the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import linkage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from scipy.spatial.distance import squareform

from cipm_ir.errors import OptionError
from cipm_ir.passes.clustering.leaf_order import optimal_leaf_order

Floats = npt.NDArray[np.float64]
Order = npt.NDArray[np.int64]

OPTIMAL_UP_TO = 1024
"""Optimal leaf ordering takes time cubic in the units: 1.4 s for 1024. Above this, subtrees are flipped one by one."""

_DENSE_UP_TO = 1200
_NEIGHBOURS = 24
_SWEEPS, _NEAREST, _GAIN = 1000, 12, 1e-9
_WEAK = 0.9
_SEED = 0


def order_units(affinity: Floats, method: str) -> Order:
    """Return the order of a method by name, see `METHODS`.

    Raises:
        OptionError: an unknown one.
    """
    if method not in METHODS:
        raise OptionError(f"There is no method {method!r} for ordering; there are {', '.join(METHODS)}.")
    n = len(affinity)
    if n < 3:
        return np.arange(n)
    return forwards(METHODS[method](checked(affinity)))


def checked(affinity: Floats) -> Floats:
    """Return the affinity as float64, made symmetric, with what is not finite as 0 and a diagonal of ones."""
    clean = np.nan_to_num(np.asarray(affinity, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    clean = clean + clean.T
    clean /= 2
    np.maximum(clean, 0.0, out=clean)
    np.fill_diagonal(clean, 1.0)
    return clean


def forwards(order: Order) -> Order:
    """Return the order or its reverse, whichever goes with the old places.

    An order and its reverse are equally good.
    """
    centred = np.arange(len(order)) - (len(order) - 1) / 2
    return np.asarray(order if centred @ order >= 0 else order[::-1], np.int64)


def distances(affinity: Floats) -> Floats:
    """1 - affinity, from 0 to 1, with a zero diagonal."""
    far = np.clip(1.0 - affinity, 0.0, 1.0)
    np.fill_diagonal(far, 0.0)
    return far


# ------------------------------------------------------------ hierarchical
def leaf_order(affinity: Floats) -> Order:
    """Average linkage on 1 - affinity; its leaves so that neighbours are near each other.

    Of all orders that the tree allows the shortest (Bar-Joseph et al. 2001) up to `OPTIMAL_UP_TO` units; above, every
    merge joins the nearest ends (Gruvaeus and Wainer 1972).
    """
    far = distances(affinity)
    tree = linkage(squareform(far, checks=False), "average")
    return optimal_leaf_order(tree, far) if len(far) <= OPTIMAL_UP_TO else _nearest_ends(tree, far)


def _nearest_ends(tree: Floats, far: Floats) -> Order:
    n = len(far)
    chains: dict[int, Order] = {k: np.array([k]) for k in range(n)}
    for step, (one, two) in enumerate(tree[:, :2].astype(np.int64).tolist()):
        a, b = chains.pop(one), chains.pop(two)
        gaps = [far[a[-1], b[0]], far[a[-1], b[-1]], far[a[0], b[0]], far[a[0], b[-1]]]
        best = int(np.argmin(gaps))
        left = a if best < 2 else a[::-1]
        right = b if best in (0, 2) else b[::-1]
        chains[n + step] = np.concatenate([left, right])
    return chains[2 * n - 2]


# ------------------------------------------------------------ spectral
def spectral_order(affinity: Floats) -> Order:
    """Seriation by the Fiedler vector of the normalized Laplacian (Atkins et al. 1998), repeated in parts.

    One vector orders the two sides of the weakest cut well, and what lies inside a side less so. Hence the order is cut
    where least crosses, as long as that is clearly less than degrees alone give, and each side is ordered by itself.
    """
    return _spectral(affinity - np.diag(np.diag(affinity)), np.arange(len(affinity)))


def _spectral(edges: Floats, units: Order) -> Order:
    todo: list[Order] = [units]
    done: list[Order] = []
    while todo:
        part = todo.pop()
        if len(part) < 4:
            done.append(part)
            continue
        inside = edges[np.ix_(part, part)]
        count, label = connected_components(csr_array(inside), directed=False)
        if count > 1:
            todo += [part[label == k] for k in range(count)][::-1]
            continue
        order = forwards(np.argsort(_fiedler(inside), kind="stable"))  # as it lay in what it was cut from
        cut = _weakest_cut(inside[np.ix_(order, order)])
        part = part[order]
        if cut:
            todo += [part[cut:], part[:cut]]
        else:
            done.append(part)
    return np.concatenate(done)


def _fiedler(edges: Floats) -> Floats:
    """Second eigenvector of D^-1/2 A D^-1/2, as an embedding of the units on a line."""
    n, root = len(edges), np.sqrt(edges.sum(axis=1))
    scaled = edges / root[:, None] / root
    if n <= _DENSE_UP_TO:
        vector = np.linalg.eigh(scaled)[1][:, -2]
    else:
        start = np.random.default_rng(_SEED).standard_normal(n)
        values, vectors = eigsh(scaled, k=2, which="LA", v0=start, tol=1e-6)
        vector = vectors[:, np.argsort(values)[0]]
    return np.asarray(vector / root, np.float64)


def _weakest_cut(edges: Floats) -> int:
    """Where to cut the order in two so that least crosses, against what degrees give; 0 where that is too much."""
    degree = edges.sum(axis=1)
    left, total = np.cumsum(degree)[:-1], degree.sum()
    crossing = np.cumsum(degree - 2 * np.tril(edges, -1).sum(axis=1))[:-1]
    share = crossing * total / np.maximum(left * (total - left), 1e-300)
    best = int(np.argmin(share))
    return best + 1 if share[best] < _WEAK else 0


def _chained(edges: Floats, parts: list[Order]) -> Order:
    """Parts in the order given, each turned so that the end that is bound to what came before comes first."""
    made = parts[0]
    for part in parts[1:]:
        half = max(1, len(part) // 2)
        near = made[-max(1, len(made) // 2) :]
        first, last = edges[np.ix_(near, part[:half])].mean(), edges[np.ix_(near, part[-half:])].mean()
        made = np.concatenate([made, part if first >= last else part[::-1]])
    return made


# ------------------------------------------------------------ path
def path_order(affinity: Floats) -> Order:
    """Return a short Hamiltonian path over 1 - affinity, as Neural Metamorphosis (Yang et al. 2024) orders channels.

    Starts from the leaf order; then reversals that bring a unit beside one of its nearest (2-opt with neighbour lists,
    Johnson and McGeoch 1997), until none shortens the path.
    """
    far = distances(affinity)
    order = leaf_order(affinity)
    near = np.argsort(far + 9 * np.eye(len(far)), axis=1, kind="stable")[:, : min(_NEAREST, len(far) - 1)]
    for _ in range(_SWEEPS):
        if not _reverse_all(far, near, order):
            break
    return order


def path_length(affinity: Floats, order: Order) -> float:
    """Return the sum of 1 - affinity over neighbours."""
    return float(distances(affinity)[order[:-1], order[1:]].sum())


def _reverse_all(far: Floats, near: Order, order: Order) -> bool:
    """Make the best reversals of stretches that do not touch each other; in place. Whether there was one.

    Tried are those that make a unit the neighbour of one of its ``near`` ones, (n, k).
    """
    n = len(order)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    one, two = np.repeat(np.arange(n), near.shape[1]), place[near[order]].ravel()
    low, high = np.minimum(one, two), np.maximum(one, two)
    # Turning low+1..high makes the two neighbours, and so does turning low..high-1.
    first, last = np.r_[low + 1, low], np.r_[high, high - 1]
    before, after = _step(far, order, first - 1, first), _step(far, order, last, last + 1)
    gain = before + after - _step(far, order, first - 1, last) - _step(far, order, first, last + 1)
    good = np.flatnonzero((gain > _GAIN) & (first < last))
    best = good[np.argsort(-gain[good], kind="stable")]
    free = np.ones(n + 2, bool)
    for i, j in zip(first[best].tolist(), last[best].tolist(), strict=True):
        if free[i : j + 3].all():
            free[i : j + 3] = False
            order[i : j + 1] = order[i : j + 1][::-1].copy()
    return bool(len(best))


def _step(far: Floats, order: Order, one: Order, two: Order) -> Floats:
    """Distance between places; 0 where one is beyond an end: there lies the dummy city that makes a tour of a path."""
    n = len(order)
    inside = (one >= 0) & (two < n)
    return np.asarray(np.where(inside, far[order[np.maximum(one, 0)], order[np.minimum(two, n - 1)]], 0.0))


# ------------------------------------------------------------ communities
def community_labels(affinity: Floats, resolution: float = 1.0) -> Order:
    """Module of each unit by the Louvain method of networkx, on each unit's strongest neighbours."""
    graph = nearest_graph(affinity)
    found = nx.community.louvain_communities(graph, weight="weight", resolution=resolution, seed=_SEED)
    label = np.empty(len(affinity), np.int64)
    for k, members in enumerate(sorted(found, key=min)):
        label[list(members)] = k
    return label


def nearest_graph(affinity: Floats) -> nx.Graph[int]:
    """Return units as nodes; an edge where one is among the strongest neighbours of the other."""
    n = len(affinity)
    count = min(_NEIGHBOURS, n - 1)
    inner = affinity - np.diag(np.diag(affinity))
    near = np.argpartition(-inner, count - 1, axis=1)[:, :count]
    kept = np.zeros((n, n), bool)
    np.put_along_axis(kept, near, True, axis=1)
    one, two = np.nonzero(np.triu((kept | kept.T) & (inner > 0), 1))
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_weighted_edges_from(zip(one.tolist(), two.tolist(), inner[one, two].tolist(), strict=True))
    return graph


def community_order(affinity: Floats) -> Order:
    """Communities (`community_labels`) one after the other: these, and the units in each, in leaf order."""
    return grouped_order(affinity, community_labels(affinity))


def grouped_order(affinity: Floats, label: Order) -> Order:
    """Modules by number 0, 1, ... one after the other: these by their mean affinity, and the units in each, in leaf
    order.
    """
    members = [np.flatnonzero(label == k) for k in range(int(label.max()) + 1)]
    among = module_means(affinity, label)
    inside = [part[_small_order(affinity[np.ix_(part, part)])] for part in members]
    return _chained(affinity, [inside[k] for k in _small_order(checked(among)).tolist()])


def module_means(affinity: Floats, label: Order) -> Floats:
    """Return mean affinity between modules, (modules, modules)."""
    hot = np.eye(int(label.max()) + 1)[label]
    size = hot.sum(axis=0)
    return np.asarray(hot.T @ affinity @ hot / np.outer(size, size), np.float64)


def _small_order(affinity: Floats) -> Order:
    return np.arange(len(affinity)) if len(affinity) < 3 else leaf_order(affinity)


METHODS: dict[str, Callable[[Floats], Order]] = {
    "leaf-order": leaf_order,
    "spectral": spectral_order,
    "path": path_order,
    "communities": community_order,
}
"""Methods by name."""
