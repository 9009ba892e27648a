"""What a choice of units would cost, without building the model: multiply-accumulates, parameters, units.

The numbers are those that the restricted program reports. Sizes come from counting kept labels, all one-axis factors in
one pass; `cipm_ir.ops.costs` turns shapes into multiply-accumulates.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.bodies import is_control_flow
from cipm_ir.ir.labels import Labels
from cipm_ir.ir.places import Place
from cipm_ir.ops.costs import Site, Uncounted, macs_of
from cipm_ir.symmetry.consumers import Incidence
from cipm_ir.symmetry.counting import first_output, node_macs, site_of
from cipm_ir.symmetry.leaves import Leaf
from cipm_ir.symmetry.primitives.sizes import grid_shape, outer_first
from cipm_ir.symmetry.program import Program

Mask = npt.NDArray[np.bool_]
Slots = tuple[tuple[int, int], ...]
"""(axis, which of the counted sizes)."""
Sized = tuple[tuple[int, ...], Slots]
"""A shape now, and which of its axes follow what is kept."""


@dataclass
class _Node:
    """A node whose cost depends on what is kept; ``known``: costs by the sizes that it follows."""

    site: Site
    inputs: list[Sized | None]
    outputs: list[Sized | None]
    known: dict[builtins.bytes, int] = field(default_factory=dict)
    follows: Labels = field(init=False)

    def __post_init__(self) -> None:
        pairs = [p for p in (*self.inputs, *self.outputs) if p is not None]
        self.follows = np.unique(np.asarray([slot for _, slots in pairs for _, slot in slots], np.int64))


class _Sum:
    """A sum of costs that follow sizes: only those whose sizes changed since the last call are counted again.

    Args:
        follows: of each cost, the slots of the sizes that it follows.
        cost: the cost of a number, at sizes.
    """

    def __init__(self, follows: Sequence[Labels], cost: Callable[[int, Labels], int]) -> None:
        self._users = Incidence.of(follows)
        self._cost = cost
        self._costs = [0] * len(follows)
        self._sizes: Labels | None = None
        self._total = 0

    def at(self, sizes: Labels) -> int:
        """Return the sum at some sizes."""
        if self._sizes is None:
            changed: Sequence[int] = range(len(self._costs))
        else:
            changed = self._users.holding(np.flatnonzero(sizes != self._sizes)).tolist()
        self._sizes = None  # where a cost cannot be counted, all are counted again next time
        for k in changed:
            cost = self._cost(k, sizes)
            self._total += cost - self._costs[k]
            self._costs[k] = cost
        self._sizes = sizes
        return self._total


@dataclass
class _Part:
    """What a graph costs: a number, the nodes that follow what is kept, and parts that bodies are."""

    fixed: int = 0
    nodes: list[_Node] = field(default_factory=list)
    branches: list[list[_Part]] = field(default_factory=list)
    """Of each If, its branches, of which the dearest counts."""
    repeated: list[tuple[int, _Part]] = field(default_factory=list)
    """Of each Loop and Scan, how often its body runs."""
    sum: _Sum | None = None
    """Of the nodes, once all are known."""


@dataclass
class _Tensor:
    """The uses of one parameter; differently sliced ones become tensors of their own."""

    leaves: list[Leaf]
    shapes: list[Sized]


@dataclass
class _Counter:
    """Sizes of the axes of factors, given which classes and cells stay (`Classes.refined`)."""

    of: Labels
    slot: dict[int, int] = field(default_factory=dict)
    flat: list[Labels] = field(default_factory=list)
    flat_slot: list[int] = field(default_factory=list)
    grids: list[tuple[Labels, list[int], int]] = field(default_factory=list)
    alive: list[Labels] = field(default_factory=list)
    count: int = 0
    full: Labels = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sizes with everything kept."""

    def add(self, labels: Labels) -> int:
        """First slot of the sizes of a label array (atoms); the same array is counted once."""
        known = self.slot.get(id(labels))
        if known is None:
            known = self.slot[id(labels)] = self.count
            self.alive.append(labels)
            self.count += labels.ndim
            if labels.ndim == 1:
                self.flat.append(self.of[labels])
                self.flat_slot.append(known)
            else:
                self.grids.append((self.of[labels], outer_first(labels), known))
        return known

    def close(self) -> None:
        """Prepare for counting."""
        lengths = [len(c) for c in self.flat]
        self._index = np.concatenate(self.flat) if self.flat else np.zeros(0, np.int64)
        self._start = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
        self._slots = np.asarray(self.flat_slot, np.int64)
        self.full = self.sizes(np.ones(int(self.of.max(initial=-1)) + 1, bool))

    def sizes(self, stays: Mask) -> Labels:
        """Return all sizes; a ragged grid counts as its longest row."""
        out = np.zeros(self.count, np.int64)
        if len(self._index):
            out[self._slots] = np.add.reduceat(stays[self._index], self._start, dtype=np.int64)
        for classes, order, slot in self.grids:
            mask = stays[classes]
            shape = mask.shape if mask.all() else grid_shape(mask, order)
            if shape is None:
                shape = tuple(int(mask.sum(axis=k).max()) for k in range(mask.ndim))
            out[slot : slot + mask.ndim] = shape
        return out


class CostModel:
    """Costs of a program as functions of the mask of classes that stay (closed under blocks).

    Args:
        program: the program before anything goes.
        sizes: of dynamic dimensions, by name, as for `Program.count`.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int] | None = None) -> None:
        self.program = program
        walk = program.analysis.walk
        self.counted = program.count(sizes)
        self._counter = _Counter(program.analysis.classes.refined())
        self._leaves: dict[int, Sized] = {}
        self._position = {first_output(node): k for k, node in enumerate(walk.nodes)}
        self._part = self._part_of(self.counted.places)
        tensors = self._group_tensors(walk.leaves)
        self._shared = [tensor for tensor in tensors if len(tensor.leaves) > 1]
        self._sums = {u: self._sum_of(u, [t for t in tensors if len(t.leaves) == 1]) for u in ("params", "bytes")}
        self._units = [s.table[:, 0] for s in program.analysis.spaces if s.kind == "units"]
        self._counter.close()

    # ------------------------------------------------------------ costs
    def macs(self, stays: Mask) -> int:
        """Return multiply-accumulates as `Program.count` counts them."""
        return self._part_macs(self._part, self._counter.sizes(self._refined(stays)))

    def _refined(self, stays: Mask) -> Mask:
        return self.program.analysis.classes.stays(stays)

    def _part_macs(self, part: _Part, sizes: Labels) -> int:
        if part.sum is None:
            part.sum = _Sum([n.follows for n in part.nodes], lambda k, now: self._node_macs(part.nodes[k], now))
        total = part.fixed + part.sum.at(sizes)
        total += sum(max(self._part_macs(one, sizes) for one in branches) for branches in part.branches)
        return total + sum(trips * self._part_macs(one, sizes) for trips, one in part.repeated)

    def params(self, stays: Mask) -> int:
        """Return entries of floating-point parameters."""
        return self._weights("params", stays)

    def bytes(self, stays: Mask) -> int:
        """Return bytes of floating-point parameters."""
        return self._weights("bytes", stays)

    def _weights(self, unit: str, stays: Mask) -> int:
        refined = self._refined(stays)
        sizes = self._counter.sizes(refined)
        total = self._sums[unit].at(sizes)
        for tensor in self._shared:
            shapes = [self._shape(sized, sizes) for sized in tensor.shapes]
            slices = {self._slice(leaf, refined): shape for leaf, shape in zip(tensor.leaves, shapes, strict=True)}
            total += _in_unit(unit, tensor, sum(math.prod(shape) for shape in slices.values()))
        return total

    def _sum_of(self, unit: str, tensors: list[_Tensor]) -> _Sum:
        """Return the sum over tensors with one leaf, in a unit."""
        follows = [np.asarray([slot for _, slot in tensor.shapes[0][1]], np.int64) for tensor in tensors]
        return _Sum(
            follows, lambda k, sizes: _in_unit(unit, tensors[k], math.prod(self._shape(tensors[k].shapes[0], sizes)))
        )

    def units(self, stays: Mask) -> int:
        """Hidden units that stay."""
        return sum(int(stays[classes].sum()) for classes in self._units)

    # ------------------------------------------------------------ building
    def _part_of(self, places: Sequence[Place]) -> _Part:
        part = _Part()
        for place in places:
            if is_control_flow(place.node) and place.bodies:
                made = [self._part_of(body) for body in place.bodies]
                if place.node.op_type == "If":
                    part.branches.append(made)
                elif place.trips:
                    part.repeated.append((place.trips, made[0]))
            elif macs := node_macs(place):
                self._add_node(part, self._position[first_output(place.node)], macs, place)
        return part

    def _add_node(self, part: _Part, position: int, macs: int, place: Place) -> None:
        """A node with a cost: it stays fixed, or follows what is kept."""
        walk = self.program.analysis.walk
        node = place.node
        inputs: list[Sized | None] = []
        for k, value in enumerate(node.inputs):
            leaf = walk.use_leaf.get((position, k))
            shape = place.inputs[k]
            if leaf is not None:
                inputs.append(self._leaf(walk.leaves[leaf]))
            else:
                inputs.append(self._value("" if value is None else value.name or "", shape))
        outputs = [self._value(v.name or "", shape) for v, shape in zip(node.outputs, place.outputs, strict=True)]
        if not any(pair is not None and pair[1] for pair in [*inputs, *outputs]):
            part.fixed += macs
            return
        part.nodes.append(_Node(site_of(place), inputs, outputs))

    def _value(self, name: str, shape: tuple[int, ...] | None) -> Sized | None:
        """Return a value with the axes that labels move along.

        At other sizes than those of the analysis it has the same.
        """
        if shape is None:
            return None
        state = self.program.analysis.walk.states.get(name)
        if state is None or state.rank != len(shape):
            return shape, ()
        slots: list[tuple[int, int]] = []
        for f in state.factors:
            first = self._counter.add(f.labels)
            slots.extend((axis, first + k) for k, axis in enumerate(f.axes))
        return shape, tuple(slots)

    def _leaf(self, leaf: Leaf) -> Sized:
        known = self._leaves.get(id(leaf))
        if known is None:
            slots = []
            for f in leaf.factors:
                if f.active:
                    # a grouped axis is a grid (groups, size): its second slot is the size of the axis
                    first = self._counter.add(np.arange(f.base, f.base + f.size).reshape(f.shape))
                    slots.append((f.axes[-1], first + len(f.shape) - 1))
            known = self._leaves[id(leaf)] = (leaf.shape, tuple(slots))
        return known

    def _group_tensors(self, leaves: list[Leaf]) -> list[_Tensor]:
        by_name: dict[str, _Tensor] = {}
        for leaf in leaves:
            if not leaf.dtype.is_floating_point():
                continue
            tensor = by_name.setdefault(leaf.name, _Tensor([], []))
            tensor.leaves.append(leaf)
            tensor.shapes.append(self._leaf(leaf))
        return list(by_name.values())

    def _slice(self, leaf: Leaf, stays: Mask) -> builtins.bytes:
        refined = self.program.analysis.classes.refined()
        return b"".join(stays[refined[f.base : f.base + f.size]].tobytes() for f in leaf.factors if f.active)

    # ------------------------------------------------------------ sizes
    def _shape(self, sized: Sized, sizes: Labels) -> tuple[int, ...]:
        """Return the shape that would remain: an axis shrinks as its labels do."""
        base, slots = sized
        if not slots:
            return base
        out = list(base)
        for axis, slot in slots:
            out[axis] = out[axis] * int(sizes[slot]) // max(int(self._counter.full[slot]), 1)
        return tuple(out)

    def _node_macs(self, node: _Node, sizes: Labels) -> int:
        """Return the operator's own rule, on the shapes that would remain."""
        key = sizes[node.follows].tobytes()
        if key not in node.known:
            inputs = [None if p is None else self._shape(p, sizes) for p in node.inputs]
            outputs = [None if p is None else self._shape(p, sizes) for p in node.outputs]
            try:
                node.known[key] = macs_of(replace(node.site, inputs=inputs, outputs=outputs))
            except Uncounted as reason:
                which = f"{node.site.node.op_type} {node.site.node.name!r}"
                raise SymmetryError(f"What {which} costs with fewer units cannot be predicted: {reason}.") from reason
        return node.known[key]


def _in_unit(unit: str, tensor: _Tensor, count: int) -> int:
    return count if unit == "params" else int(tensor.leaves[0].dtype.itemsize * count)
