"""What a run of a program costs in multiply-accumulates, which nodes could not be counted, and at which sizes.

Dynamic sizes count at small stand-ins, or at those of the data that is given: the first axis at 1 (per sample; 2 where
a Squeeze would drop it), other axes at 128, axes of images (the third and later of four or more) at 224. Where a model
cannot run at these (a window of 400 steps over 128), larger ones are tried. An If costs its dearer branch, or the one
that a constant condition takes; a Loop its body times the most runs that it can make; a Scan its body times the length
that it scans. A branch that cannot run at these sizes costs nothing beside one that can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.places import Place, place_nodes
from cipm_ir.ir.shapes import dynamic_sizes
from cipm_ir.ops import load_rules
from cipm_ir.ops.costs import Site, Uncounted, is_free, macs_of

STAND_INS = ((128, 224), (512, 256), (1024, 512), (16384, 1024))
"""Sizes for dynamic axes in general and for those of images, in the order in which they are tried."""
_SHARE = 1e-3
"""Nodes that cannot be counted do not matter where they cost at most this fraction of what is counted."""
_NAMED = 3


@dataclass(frozen=True)
class Unknown:
    """A node that could not be counted.

    Attributes:
        name, op: of the node.
        reason: why.
        most: a bound on its multiply-accumulates, where all its shapes are known: every output entry a product with
            every input entry. None where there is no bound.
    """

    name: str
    op: str
    reason: str
    most: int | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}: {self.reason}"


@dataclass(frozen=True)
class Count:
    """Multiply-accumulates of one run.

    Attributes:
        total: of the nodes that could be counted.
        unknown: the others.
        sizes: dynamic sizes by name (``x[2]`` where an axis of input x has none), empty where none is.
        places: the nodes of the main graph with their shapes at these sizes.
    """

    total: int
    unknown: tuple[Unknown, ...]
    sizes: Mapping[str, int]
    places: Sequence[Place] = field(repr=False, default=())

    @property
    def left_out(self) -> int:
        """Number of branches that cannot run at these sizes, and cost nothing."""
        return sum(place.left_out for place in self.places)

    @property
    def doubtful(self) -> tuple[Unknown, ...]:
        """The nodes that could not be counted, if they could matter; none where all of them together are small."""
        most = [one.most for one in self.unknown]
        if None not in most and sum(m or 0 for m in most) <= _SHARE * self.total:
            return ()
        return self.unknown


def sizes_in_words(sizes: Mapping[str, int]) -> str:
    """Dynamic sizes in words: ``N=1, T=128``; empty where all sizes are fixed."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def named(unknown: Sequence[Unknown]) -> str:
    """Some nodes that could not be counted, in one line."""
    more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
    return "; ".join(map(str, unknown[:_NAMED])) + more


def count_macs(
    model: ir.Model, sizes: Mapping[str, int] | None = None, shapes: Mapping[str, Sequence[int]] | None = None
) -> Count:
    """Count a model without model-local functions.

    Args:
        model: the model.
        sizes: dynamic sizes that are known, by name.
        shapes: of its values by the analysis, where more than one sample is taken: a value of another rank here says
            that a first axis of 1 was squeezed.
    """
    load_rules()
    best: Count | None = None
    for chosen in _choices(model.graph, sizes or {}):
        found = _counted(model, chosen)
        if _squeezed(found.places, shapes or {}):
            found = _counted(model, {name: max(size, 2) for name, size in chosen.items()})
        if best is None or _gaps(found) < _gaps(best):
            best = found
        if not any(_gaps(found)):
            break
    assert best is not None
    return best


def _gaps(count: Count) -> tuple[int, int]:
    """Return numbers of nodes that could not be counted and of branches that cannot run at these sizes."""
    return len(count.unknown), count.left_out


def _counted(model: ir.Model, sizes: Mapping[str, int]) -> Count:
    try:
        places = place_nodes(model, sizes)
    except InputError as error:
        reason = str(error).splitlines()[0]
        nodes = list(model.graph)
        lost = tuple(Unknown(n.name or "", n.op_type, reason) for n in nodes if not is_free(n))
        return Count(0, lost, sizes)
    unknown: list[Unknown] = []
    costs = [_cost(place, unknown) for place in places]
    return Count(sum(costs), tuple(unknown), sizes, places)


def _choices(graph: ir.Graph, given: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Dynamic sizes to try, one after the other; one choice where nothing is left open."""
    found = dynamic_sizes(graph)
    batch = {name for name, places in found.items() if all(axis == 0 for _, axis in places)}
    image = {name for name, places in found.items() if any(axis > 1 and len(v.shape or ()) > 3 for v, axis in places)}
    tried: list[dict[str, int]] = []
    for length, side in STAND_INS:
        stand_in = {name: 1 if name in batch else side if name in image else length for name in found}
        chosen = {name: given.get(name, size) for name, size in stand_in.items()}
        if chosen not in tried:
            tried.append(chosen)
            yield chosen


def _squeezed(places: Sequence[Place], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether a Squeeze of all axes of length 1 dropped the first one, too."""
    names = [(v.name or "", s) for p in places for v, s in zip(p.node.outputs, p.outputs, strict=True)]
    return any(s is not None and name in shapes and len(shapes[name]) != len(s) for name, s in names)


def _cost(place: Place, unknown: list[Unknown]) -> int:
    """Return multiply-accumulates of a node; what cannot be counted is noted."""
    if place.bodies or subgraphs(place.node):
        return _nested(place, unknown)
    site = site_of(place)
    try:
        return macs_of(site)
    except Uncounted as reason:
        unknown.append(
            Unknown(place.node.name or first_output(place.node), place.node.op_type, str(reason), _most(place))
        )
        return 0


def node_macs(place: Place) -> int:
    """Return multiply-accumulates of a node with everything in it; 0 for what cannot be counted."""
    return _cost(place, [])


def _nested(place: Place, unknown: list[Unknown]) -> int:
    node, op = place.node, place.node.op_type
    costs, lost = [], []
    for body in place.bodies:
        inside: list[Unknown] = []
        costs.append(sum(_cost(one, inside) for one in body))
        lost += inside
    name = node.name or first_output(place.node)
    if op == "If" and not node.domain:
        unknown += lost
        return max(costs, default=0)
    if op in ("Loop", "Scan") and not node.domain and len(costs) == 1:
        if place.trips == 0 or (not costs[0] and not lost):
            return 0
        # a bound on one run says nothing of an unknown number of runs
        times = place.trips
        unknown += [replace(u, most=None if times is None or u.most is None else u.most * times) for u in lost]
        if times is None and costs[0]:
            unknown.append(Unknown(name, op, f"it is not known how often it runs {costs[0]:,} multiply-accumulates"))
        return costs[0] * (times or 0)
    if any(costs) or lost:
        unknown.append(Unknown(name, op, "there is no rule that counts what its subgraphs cost"))
    return 0


def site_of(place: Place) -> Site:
    """Return a node as its rule takes it."""
    return Site(place.node, place.inputs, place.outputs, place.version, place.numbers)


def _most(place: Place) -> int | None:
    """Return every output entry a product with every input entry.

    None where a shape is unknown or weights may be hidden.
    """
    if place.node.domain not in ("", "com.microsoft"):
        return None
    inputs = [s for v, s in zip(place.node.inputs, place.inputs, strict=True) if v is not None]
    outputs = [s for v, s in zip(place.node.outputs, place.outputs, strict=True) if v.name]
    if not inputs or any(s is None or min(s, default=0) < 0 for s in (*inputs, *outputs)):
        return None
    if any(a.type not in _SMALL_ATTRIBUTES for a in place.node.attributes.values()):
        return None
    entries = [sum(math.prod(s or ()) for s in side) for side in (inputs, outputs)]
    return entries[0] * entries[1]


_SMALL_ATTRIBUTES = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING, ir.AttributeType.INTS)


def first_output(node: ir.Node) -> str:
    """Return what a node goes by: names of values are unique in an analysed graph, and clones of it keep them."""
    return next((value.name for value in node.outputs if value.name), "")
