"""The three scales of clustering: each space alone, spaces aligned with their neighbours, and the network as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cipm_ir.passes.clustering.metrics import split
from cipm_ir.passes.clustering.network import Couplings, joint_affinity
from cipm_ir.passes.clustering.order import Order, checked, forwards, order_units
from cipm_ir.passes.clustering.weights import normalized

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Tick = Callable[[int, int], None]

_SWEEPS = 2
FLAT_UP_TO = 3000
"""Units of the network that are ordered as one matrix; with more, its modules are."""


@dataclass
class Arrangement:
    """Per space: the order (gather form), and the module of each place of that order.

    Modules are numbered within the space, along the order; with ``shared`` over the whole network.
    """

    orders: list[Order]
    modules: list[Labels]
    shared: bool = False
    flat: bool = True
    remarks: list[str] = field(default_factory=list)


def arrange(
    affinities: Sequence[Floats],
    couplings: Couplings,
    *,
    scale: str,
    method: str,
    resolution: float = 1.0,
    strength: float = 0.5,
    hierarchical: bool | None = None,
    tick: Tick = lambda _done, _count: None,
) -> Arrangement:
    """Orders of all spaces.

    Args:
        affinities: one per space, see `cluster_order`.
        couplings: between spaces, see `Weights.couplings`.
        scale: "layer", "aligned" or "network".
        method: of ordering, see `cluster_order.METHODS`.
        resolution: of modules; above 1 there are more, and smaller ones.
        strength: what couplings weigh against the affinities, 0 to 1.
        hierarchical: for "network": order modules of layers instead of units; None: where there are many units.
        tick: called with the number of spaces done, and their count.
    """
    if scale == "layer" or not couplings:
        made = _alone(affinities, method, resolution, tick)
        if scale != "layer":
            made.remarks.append(f"no weight joins two of the spaces, so scale={scale} is scale=layer here")
        return made
    clean = [checked(a) for a in affinities]
    if scale == "aligned":
        return _aligned(clean, couplings, method, resolution, strength, tick)
    many = sum(len(a) for a in clean) > FLAT_UP_TO
    if many if hierarchical is None else hierarchical:
        return _network_of_modules(clean, couplings, method, resolution, strength, tick)
    return _network(clean, couplings, method, resolution, strength)


def _alone(affinities: Sequence[Floats], method: str, resolution: float, tick: Tick) -> Arrangement:
    orders, modules = [], []
    for k, affinity in enumerate(affinities):
        tick(k, len(affinities))
        affinity = checked(affinity)
        order = order_units(affinity, method)
        orders.append(order)
        modules.append(split(affinity[np.ix_(order, order)], resolution))
    return Arrangement(orders, modules)


# ------------------------------------------------------------ aligned
def _aligned(
    affinities: Sequence[Floats], couplings: Couplings, method: str, resolution: float, strength: float, tick: Tick
) -> Arrangement:
    """Co-clustering in sweeps over the spaces.

    1. Two units of a space are alike where their weights are, and where they are bound to the same modules of the
       neighbours: both affinities are mixed, and the method orders the mixture.
    2. The modules that come out are put in the order of what they are bound to, so that weight matrices become
       diagonal by blocks; the order inside stays.
    """
    around = _neighbours(len(affinities), couplings)
    made = _alone(affinities, method, resolution, tick)
    done = [False] * len(affinities)
    for sweep in range(_SWEEPS):
        for k, affinity in enumerate(affinities):
            tick(sweep * len(affinities) + k, _SWEEPS * len(affinities))
            near = [(j, bound) for j, bound in around[k] if done[j]]
            if near:
                mixed = _mixed(affinity, _bound_alike(near, made), strength)
                made.orders[k], made.modules[k] = _along(near, made, checked(mixed), method, resolution)
            done[k] = True
    return made


def _neighbours(count: int, couplings: Couplings) -> list[list[tuple[int, Floats]]]:
    around: list[list[tuple[int, Floats]]] = [[] for _ in range(count)]
    for (i, j), bound in couplings.items():
        around[i].append((j, bound))
        around[j].append((i, bound.T))
    return around


def _bound_alike(near: Sequence[tuple[int, Floats]], made: Arrangement) -> Floats:
    """Cosine of what units are bound to, by modules of the neighbours, above what sizes alone give; not negative."""
    parts = []
    for j, bound in near:
        label = made.modules[j]
        hot = np.eye(int(label.max()) + 1)[label]
        by_module = bound[:, made.orders[j]] @ hot
        parts.append(by_module / np.maximum(by_module.sum(axis=1, keepdims=True), 1e-300) - hot.mean(axis=0))
    rows = normalized(np.concatenate(parts, axis=1), centred=False)
    return np.asarray(np.maximum(rows @ rows.T, 0.0), np.float64)


def _mixed(one: Floats, two: Floats, strength: float) -> Floats:
    """Both, each over the standard deviation of what lies beside its diagonal; at most 1."""
    beside = ~np.eye(len(one), dtype=bool)
    spread = [max(float(m[beside].std()), 1e-12) for m in (one, two)]
    mixed = (1 - strength) * one / spread[0] + strength * two / spread[1]
    return np.asarray(mixed / max(float(mixed[beside].max()), 1e-300), np.float64)


def _along(
    near: Sequence[tuple[int, Floats]], made: Arrangement, affinity: Floats, method: str, resolution: float
) -> tuple[Order, Labels]:
    """Return the order of the method, its modules sorted by the mean place (0 to 1) of what they are bound to."""
    order = order_units(affinity, method)
    label = split(affinity[np.ix_(order, order)], resolution)
    pull, mass = np.zeros(len(order)), np.zeros(len(order))
    for j, bound in near:
        place = np.empty(bound.shape[1])
        place[made.orders[j]] = (np.arange(len(place)) + 0.5) / len(place)
        pull += bound @ place
        mass += bound.sum(axis=1)
    count = int(label.max()) + 1
    weight = np.bincount(label, mass[order], count)
    mean = np.bincount(label, pull[order], count) / np.maximum(weight, 1e-300)
    rank = np.argsort(np.argsort(np.where(weight > 0, mean, 0.5), kind="stable"), kind="stable")
    moved = np.argsort(rank[label], kind="stable")
    order = _turned(order[moved], rank[label][moved], pull, mass)
    return order, np.sort(rank[label])


def _turned(order: Order, label: Labels, pull: Floats, mass: Floats) -> Order:
    """Each module turned so that what its units are bound to grows along it."""
    turned = order.copy()
    where = pull / np.maximum(mass, 1e-300)
    for k in range(int(label.max()) + 1):
        inside = label == k
        units = order[inside]
        slope = (np.arange(len(units)) - (len(units) - 1) / 2) @ where[units]
        turned[inside] = units if slope >= 0 else units[::-1]
    return turned


# ------------------------------------------------------------ network
def _network(
    affinities: Sequence[Floats], couplings: Couplings, method: str, resolution: float, strength: float
) -> Arrangement:
    """Return one affinity over all units of all spaces, one order of it, one set of modules."""
    sizes = [len(a) for a in affinities]
    joint = joint_affinity(affinities, couplings, strength)
    order = forwards(order_units(joint, method))
    label = split(joint[np.ix_(order, order)], resolution)
    return _cut_up(order, label, sizes)


def _cut_up(order: Order, label: Labels, sizes: Sequence[int]) -> Arrangement:
    """Return the order and the modules of the network, space by space."""
    start = np.r_[0, np.cumsum(sizes)]
    space = np.searchsorted(start, order, side="right") - 1
    orders = [order[space == k] - start[k] for k in range(len(sizes))]
    modules = [label[space == k] for k in range(len(sizes))]
    return Arrangement(orders, modules, shared=True)


def _network_of_modules(
    affinities: Sequence[Floats],
    couplings: Couplings,
    method: str,
    resolution: float,
    strength: float,
    tick: Tick,
) -> Arrangement:
    """Return the same with the modules of each layer in place of its units.

    The order inside a module is that of its layer.
    """
    made = _alone(affinities, method, resolution, tick)
    labels = []
    for order, label in zip(made.orders, made.modules, strict=True):
        of = np.empty(len(order), np.int64)
        of[order] = label
        labels.append(of)
    joint = joint_affinity(affinities, couplings, strength, labels)
    over = forwards(order_units(joint, method))
    whole = split(joint[np.ix_(over, over)], resolution)
    of_modules = _cut_up(over, whole, [int(label.max()) + 1 for label in labels])
    orders, modules = [], []
    for k, inner in enumerate(made.orders):
        rank = np.argsort(of_modules.orders[k])
        moved = np.argsort(rank[made.modules[k]], kind="stable")
        orders.append(inner[moved])
        modules.append(of_modules.modules[k][rank[made.modules[k]]][moved])
    return Arrangement(orders, modules, shared=True, flat=False)
