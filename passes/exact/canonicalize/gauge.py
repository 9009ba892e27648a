"""Gauge fixing: one scale and one sign for every hidden unit, from rows that do not depend on the gauge of others.

Row of a unit at a member: the entries there, over those positions of the other axes whose own gauge is already fixed.
Its largest magnitude does not depend on the order of the other axes, so gauges are fixed before anything is sorted.

1. Scale: the first member with a row that is not zero, and in which one direction of the unit is still open, takes
   this direction to a largest magnitude in [1/2, 1) (exact: by a power of two) or to Euclidean norm 1. In graph order
   this is the weight that makes the unit.
2. Sign: the entry of largest magnitude becomes positive; where it occurs with both signs, the next member decides.
   Vectors come before matrices, as they cost less to read.
3. What is zero in every member has no gauge: scale 1. A scale that a weight could not take without rounding (16 bits,
   or very far from 1) is given up for that unit: the model computes what it did, but is not canonical there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cipm_ir.ir.labels import Array, Labels
from cipm_ir.passes.exact.canonicalize.gauge_limits import give_up_rounding, magnitude
from cipm_ir.passes.exact.canonicalize.members import Floats, Member, Members

TOLERANCE = 1e-5


class Gauge:
    """Log2 of the scale and the sign of every class and direction, and which of them are fixed."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.exact = members.exact
        self.scale: Floats = np.zeros((members.count, members.scales))
        self.scaled = np.zeros((members.count, members.scales), bool)
        self.sign = np.ones((members.count, members.signs), np.int8)
        self.signed = np.zeros((members.count, members.signs), bool)
        self._read: dict[tuple[int, bool], int] = {}

    def fix(self) -> None:
        """Fix all scales, then all signs that some row decides."""
        self._sweep(signs=False)
        self.scaled[:] = True
        give_up_rounding(self.members, self.scale)
        self._sweep(signs=True)

    def magnitude(self, m: Member) -> Floats:
        """Return what each position of a member is to be multiplied by, up to sign."""
        return magnitude(self.members, m, self.scale)

    def weight(self, m: Member) -> Floats:
        """Return the same with signs; open signs count as plus."""
        return self.magnitude(m) * self.parity(m)

    def parity(self, m: Member) -> Floats:
        """Return the sign of each position of a member."""
        return np.asarray(np.where(m.sign == 1, self._at(m, self.sign), 1).prod(1), np.float64)

    def settled(self, m: Member) -> Array:
        """Return positions of a member whose sign is fixed, or plays no part."""
        return np.asarray((self._at(m, self.signed) | (m.sign == 0)).all(1))

    def _at(self, m: Member, table: Array, position: Labels | slice = slice(None)) -> Array:
        """Return a table by class and direction, at positions of a member and the directions that play a part there."""
        on = m.sign_at if table is self.sign or table is self.signed else m.scale_at
        return np.asarray(table[m.classes[position][:, None], on])

    # ------------------------------------------------------------ rounds
    def _sweep(self, *, signs: bool) -> None:
        order = [m for m in self.members.all if len(m.sign_at if signs else m.scale_at)]
        if signs:
            order.sort(key=lambda m: not m.line)
        step = self._fix_sign if signs else self._fix_scale
        while any([step(m) for m in order]):  # a list: every member has its turn in every round
            pass

    def _open(self, m: Member, *, signs: bool) -> tuple[Labels, Labels, Labels]:
        """Return classes with exactly one open direction at a member.

        A position, the direction and the class of each.
        """
        exponent, fixed = (m.sign, self.signed) if signs else (m.scale, self.scaled)
        todo = (exponent != 0) & ~self._at(m, fixed)
        here = np.flatnonzero(todo.sum(1) == 1)
        classes, first = np.unique(m.classes[here], return_index=True)
        return here[first], todo[here[first]].argmax(1), classes

    def _weights(self, m: Member, *, signs: bool) -> list[Array]:
        """Return weights of the other axes: zero where they are not fixed yet."""
        out = []
        for o in self.members.on_leaf[m.factor.leaf]:
            if o is not m:
                known = (self._at(o, self.scaled) | (o.scale == 0)).all(1)
                vector = self.magnitude(o) * known
                out.append(o.spread(vector * self.parity(o) * self.settled(o) if signs else vector))
        return out

    def _seen(self, m: Member, weights: list[Array], open_classes: Labels, *, signs: bool) -> bool:
        """Return whether this member was read before with the same other axes and found nothing for these classes."""
        state = hash((open_classes.tobytes(), *(w.tobytes() for w in weights)))
        key = (m.factor.base, signs)
        if self._read.get(key) == state:
            return True
        self._read[key] = state
        return False

    def _per_class(self, m: Member, values: Array, ufunc: np.ufunc) -> Array:
        out = np.zeros(self.members.count)
        ufunc.at(out, m.classes, values)
        return out

    def _reduce(self, m: Member, weights: list[Array], ufunc: np.ufunc, shape: str) -> Array:
        """Row-wise reduction of |x|, x or x^2; infinities and NaN in a weight are left out."""
        leaf = m.factor.leaf
        for clean in (False, True):
            blocks = _shaped(self.members.blocks(leaf, weights, m.epsilon, narrow=self.exact), shape, clean)
            with np.errstate(invalid="ignore", over="ignore"):
                out = self.members.reduce(m, blocks, ufunc)
            if np.isfinite(out).all():
                break
        return np.where(np.isfinite(out), out, 0.0).astype(np.float64)

    def _fix_scale(self, m: Member) -> bool:
        position, direction, classes = self._open(m, signs=False)
        if not len(classes):
            return False
        weights = self._weights(m, signs=False)
        if self._seen(m, weights, classes, signs=False):
            return False
        if self.exact:
            size = self._per_class(m, self._reduce(m, weights, np.maximum, "magnitude"), np.maximum)[classes]
        else:
            size = np.sqrt(self._per_class(m, self._reduce(m, weights, np.add, "square"), np.add)[classes])
        good = size > 0
        position, direction, classes, size = position[good], direction[good], classes[good], size[good]
        rest = m.scale[position].astype(np.float64)
        exponent = rest[np.arange(len(rest)), direction].copy()
        known = self._at(m, self.scaled, position)
        own = np.where(known, rest * self._at(m, self.scale, position), 0.0).sum(1)
        if self.exact:
            power = np.frexp(size)[1] + own
            fixed = -np.sign(exponent) * np.floor(power / np.abs(exponent))
        else:
            fixed = -(np.log2(size) + own) / exponent
        self.scale[classes, m.scale_at[direction]] = fixed
        self.scaled[classes, m.scale_at[direction]] = True
        return bool(len(classes))

    def _fix_sign(self, m: Member) -> bool:
        position, direction, classes = self._open(m, signs=True)
        if not len(classes):
            return False
        weights = self._weights(m, signs=True)
        if self._seen(m, weights, classes, signs=True):
            return False
        high = self._per_class(m, self._reduce(m, weights, np.maximum, "value"), np.maximum)[classes]
        low = self._per_class(m, self._reduce(m, weights, np.minimum, "value"), np.minimum)[classes]
        margin = 0.0 if self.exact else TOLERANCE
        value = np.where(np.abs(high + low) > margin * (high - low), high + low, 0)
        return self.decide(m, position, direction, classes, value)

    def decide(self, m: Member, position: Labels, direction: Labels, classes: Labels, value: Array) -> bool:
        """Fix the open sign of some classes such that their values at a member become positive; zeros stay open."""
        good = value != 0
        position, direction, classes, value = position[good], direction[good], classes[good], value[good]
        known = (m.sign[position] == 1) & self._at(m, self.signed, position)
        own = np.where(known, self._at(m, self.sign, position), 1).prod(1)
        self.sign[classes, m.sign_at[direction]] = np.sign(value) * own
        self.signed[classes, m.sign_at[direction]] = True
        return bool(len(classes))


def _shaped(blocks: Iterator[tuple[slice, Array]], shape: str, clean: bool) -> Iterator[tuple[slice, Array]]:
    for part, block in blocks:
        if clean:
            block = np.where(np.isfinite(block), block, 0.0)
        if shape == "magnitude":
            block = np.abs(block, out=block if block.flags.owndata and block.flags.writeable else None)
        elif shape == "square":
            block = np.square(block, dtype=np.float64)
        yield part, block
