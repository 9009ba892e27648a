"""Signs of units by the range of the weights: what asymmetric quantization of a tensor has to span.

The range of a tensor is r = max(0, largest) - min(0, smallest); its quantization error is proportional to r. Flipping a
unit exchanges, in the rows that it owns, the largest entry with the smallest. We minimize the mean of log r over the
matrices. A maximum does not feel a single flip while another unit spans as much, so it is smoothed to the p-norm of the
units' largest entries, with which every flip has a gain of its own in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.gauge import Gauge
from cipm_ir.passes.exact.canonicalize.members import Floats, Member

POWER = 12.0
_ROUNDS = 4
_GAIN = 1e-9


@dataclass
class Side:
    """What the units of one space contribute to the range of one tensor, smoothed.

    up, down: (units,) sums of p-th powers of the largest positive and negative entries of each unit, over all its
    positions. rest: the same two sums over all positions that do not belong to these units. All relative to the
    largest entry of the tensor.
    """

    up: Floats
    down: Floats
    rest: tuple[float, float]

    def gains(self) -> Floats:
        """By how much log r changes when each unit alone is flipped."""
        up, down = self.up.sum() + self.rest[0], self.down.sum() + self.rest[1]
        return _log_range(up - self.up + self.down, down - self.down + self.up) - _log_range(up, down)

    def flip(self, unit: int) -> None:
        """Exchange the two ends of a unit."""
        self.up[unit], self.down[unit] = self.down[unit], self.up[unit]


def _log_range(up: Floats | float, down: Floats | float) -> Floats:
    ends = [np.maximum(x, 0.0) ** (1 / POWER) for x in (up, down)]
    return np.asarray(np.log(np.maximum(ends[0] + ends[1], 1e-30)))


class Ranges:
    """The ranges of all matrices of a program under the signs of a gauge."""

    def __init__(self, signs: Signs) -> None:
        self.signs = signs
        self.members = signs.members
        self.matrices = [m for m in self.members.all if not m.line and len(m.sign_at)]
        self.leaves = sorted({m.factor.leaf for m in self.matrices})
        self._groups = self._found_groups()
        self._extremes: dict[int, tuple[Floats, Floats]] = {}

    def total(self) -> float:
        """Return mean over the matrices that a sign reaches of the log of the range."""
        found = [r for leaf in self.leaves if (r := self._range(leaf)) > 0]
        return float(np.mean(np.log(found))) if found else 0.0

    def reset(self) -> None:
        """To be called when the signs of the gauge were set from outside."""
        self._extremes.clear()

    def descend(self) -> None:
        """Flip units of one space and direction after the other, as long as the mean log range shrinks."""
        best, kept = self.total(), self.signs.sign.copy()
        for _ in range(_ROUNDS):
            moved = [self._one(*group) for group in self._groups]
            now = self.total()
            better = now < best - _GAIN
            if better:
                best, kept = now, self.signs.sign.copy()
            if not better or not any(moved):
                break
        self.signs.sign[:] = kept
        self.reset()

    def _found_groups(self) -> list[tuple[int, int]]:
        """Return pairs (space, direction) that some matrix has a sign of, in graph order."""
        found: dict[tuple[int, int], list[Member]] = {}
        for m in self.matrices:
            for column, direction in enumerate(m.sign_at.tolist()):
                spaces = np.unique(self.members.space_of[m.classes[m.sign[:, column] == 1]])
                for k in spaces[spaces >= 0].tolist():
                    found.setdefault((k, direction), []).append(m)
        self._members = found
        return sorted(found)

    def _range(self, leaf: int) -> float:
        high, low = self._ends(next(m for m in self.matrices if m.factor.leaf == leaf))
        return float(max(high.max(), 0.0) - min(low.min(), 0.0))

    def _ends(self, m: Member) -> tuple[Floats, Floats]:
        """Return largest and smallest entry of every position of a member, with all signs."""
        known = self._extremes.get(id(m))
        if known is None:
            known = self._extremes[id(m)] = self.signs.extremes(m)
        high, low = known
        flipped = self.signs.parity(m) < 0
        return np.where(flipped, -low, high), np.where(flipped, -high, low)

    def _one(self, space: int, direction: int) -> bool:
        """Flip units of one space in one direction, the best first; whether any was."""
        classes = self.members.analysis.spaces[space].table[:, 0]
        unit = np.full(self.members.count, -1, np.int64)
        unit[classes] = np.arange(len(classes))
        members = self._members[space, direction]
        sides = [s for m in members if (s := self._side(m, unit, len(classes), direction)) is not None]
        count = 0
        while sides and count < len(classes):
            gains = np.sum([s.gains() for s in sides], axis=0)
            first = int(np.argmin(gains))
            if gains[first] >= -_GAIN:
                break
            for side in sides:
                side.flip(first)
            self.signs.sign[classes[first], direction] *= -1
            count += 1
        if count:
            for m in members:  # what the other axes of these tensors see has changed
                for other in self.members.on_leaf[m.factor.leaf]:
                    if other is not m:
                        self._extremes.pop(id(other), None)
        return count > 0

    def _side(self, m: Member, unit: Labels, count: int, direction: int) -> Side | None:
        """Return the part of one tensor; None where it is zero."""
        column = int(np.flatnonzero(m.sign_at == direction)[0])
        owner = np.where(m.sign[:, column] == 1, unit[m.classes], -1)
        high, low = self._ends(m)
        size = max(float(high.max()), -float(low.min()))
        if size <= 0:
            return None
        up, down = (np.maximum(x / size, 0.0) ** POWER for x in (high, -low))
        mine = owner >= 0
        parts = [np.zeros(count), np.zeros(count)]
        for part, x in zip(parts, (up, down), strict=True):
            np.add.at(part, owner[mine], x[mine])
        return Side(parts[0], parts[1], (float(up[~mine].sum()), float(down[~mine].sum())))


class Signs(Gauge):
    """The sign part of a gauge at the scales that came in."""

    def fix(self) -> None:
        """Make the entry of largest magnitude of the first row of each unit positive; vectors come before matrices."""
        self.scaled[:] = True
        self._sweep(signs=True)
        self.signed[:] = True

    def extremes(self, m: Member) -> tuple[Floats, Floats]:
        """Return largest and smallest entry of every position of a member, with the signs of the other axes."""
        weights = self._weights(m, signs=True)
        return self._reduce(m, weights, np.maximum, "value"), self._reduce(m, weights, np.minimum, "value")

    def shrink_ranges(self) -> tuple[float, float]:
        """Flip signs so that ranges shrink; the mean log range with the signs that came in, and with those chosen."""
        ranges = Ranges(self)
        chosen = self.sign.copy()
        self.sign[:] = 1
        given = ranges.total()
        self.sign[:] = chosen
        ranges.reset()
        ranges.descend()
        found = ranges.total()
        if found > given + 1e-9:
            self.sign[:] = 1
        return given, min(found, given)
