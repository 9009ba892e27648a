"""What makes the units of a space and what reads them: one row of weights per unit, from every tensor that moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.passes.exact.canonicalize.members import CHUNK, Floats, Member, Members
from cipm_ir.symmetry.primitives.absorb import absorb_edits
from cipm_ir.symmetry.space import Space


@dataclass(frozen=True, eq=False)
class Row:
    """One tensor's share in the units of a space.

    Attributes:
        member: the axis of the tensor.
        places: (units, occurrences) positions along the axis (of a joint axis: in all groups, one after the other).
        array: gives the tensor.
        scale: exponent of each scale direction of the space.
        sign: parity of each sign direction of the space.
    """

    member: Member
    places: Labels
    array: Callable[[], Array]
    scale: Labels
    sign: Labels

    @property
    def leaf(self) -> int:
        """The tensor, among the leaves of the walk."""
        return self.member.factor.leaf

    @property
    def width(self) -> int:
        """Entries of a unit."""
        return int(math.prod(self.member.shape) * self.places.shape[1] // self.member.factor.size)

    @property
    def values(self) -> Floats:
        """(units, entries) float64; of a variance, with epsilon added. Read again each time."""
        return self.of(np.arange(len(self.places)))

    def of(self, units: Labels) -> Floats:
        """Return the same for some units."""
        values = by_position(self.array(), self.member)[self.places[units]].reshape(len(units), -1).astype(np.float64)
        return values if self.member.epsilon is None else values + self.member.epsilon

    def parts(self) -> Iterator[tuple[Labels, Floats]]:
        """Yield the same for all units, some at a time."""
        step = max(1, CHUNK // max(self.width, 1))
        for lo in range(0, len(self.places), step):
            units = np.arange(lo, min(lo + step, len(self.places)))
            yield units, self.of(units)


@dataclass(frozen=True, eq=False)
class UnitRows:
    """Rows of all tensors of a space: of those that make its units, and of the weights that sum over them."""

    index: int
    space: Space
    producers: tuple[Row, ...]
    consumers: tuple[Row, ...]

    @property
    def matrices(self) -> tuple[Row, ...]:
        """Producers with more than a number per unit: weights, not biases or statistics."""
        return tuple(row for row in self.producers if not row.member.line)

    def reading(self) -> Floats:
        """(units, all entries) of the consumers, side by side."""
        return np.concatenate([row.values for row in self.consumers], axis=1)


def unit_rows(members: Members, index: int) -> UnitRows:
    """Return rows of the units of a space.

    Raises:
        SymmetryError: something reads the units that cannot absorb a mixing of them.
    """
    program, analysis = members.program, members.analysis
    space, classes = program.spaces[index], analysis.spaces[index].table[:, 0]
    n = space.size
    nothing = np.zeros((n, 1), np.uint8)  # only which weights would be mixed counts here
    edits, _ = absorb_edits(analysis, program.model, index, np.zeros(1, np.int64), nothing, None)
    reading = {(leaf, axis) for leaf, edit in edits.items() for axis in edit.mix}
    producers: list[Row] = []
    consumers: list[Row] = []
    for m in members.holding(classes):
        row = _row(members, m, classes, space)
        (consumers if (row.leaf, m.axis) in reading and not m.groups else producers).append(row)
    if not any(not row.member.line for row in producers):
        raise SymmetryError(f"No weight makes the units of @{space.name}.")
    return UnitRows(index, space, tuple(producers), tuple(consumers))


def _row(members: Members, m: Member, classes: Labels, space: Space) -> Row:
    places = members.analysis.factor_positions(m.factor, classes)
    first = int(places[0, 0])
    scale, sign = np.zeros(space.group.scales, np.int64), np.zeros(space.group.signs, np.int64)
    _spread(scale, m.scale_at, m.scale[first])
    _spread(sign, m.sign_at, m.sign[first])
    return Row(m, places, lambda: members.array(m.factor.leaf), scale, sign)


def _spread(out: Labels, at: Labels, values: Labels) -> None:
    own = at < len(out)
    out[at[own]] = values[own]


def by_position(array: Array, m: Member) -> Array:
    """(positions, *others) view of a tensor: what lies at each position of a member."""
    if not m.groups:
        return np.moveaxis(array, m.axis, 0)
    rows = array.reshape(m.groups, array.shape[0] // m.groups, *array.shape[1:])
    front = np.moveaxis(rows, m.axis + 1, 1)
    return front.reshape(m.groups * front.shape[1], *front.shape[2:])


def from_positions(flat: Floats, m: Member) -> Floats:
    """Return the tensor in its own shape, from what `by_position` gave."""
    if not m.groups:
        return np.ascontiguousarray(np.moveaxis(flat, 0, m.axis))
    front = flat.reshape(m.groups, flat.shape[0] // m.groups, *flat.shape[1:])
    return np.ascontiguousarray(np.moveaxis(front, 1, m.axis + 1)).reshape(m.shape)
