"""Ordering: a colour per class, refined until every class has its own.

Colours are ranks. At first all classes that the group can exchange share one; then cells are split by what does not
depend on how the group arranged them:

1. vectors: their values;
2. blocks: the colours of what they hold, and the other way round;
3. rows of a matrix whose other axes are fully ordered: their entries, in that order, compared bit by bit;
4. rows whose other axes are not: a hash of the multiset of (entry, colour of its column), as in colour refinement;
5. signs that the gauge left open: the first entry that is not zero, in order, becomes positive;
6. where all this says nothing: one class of the first cell is set apart (all of them, in large cells and after some
   rounds), as in the search for canonical labellings (McKay, Practical graph isomorphism, 1981), without backtracking:
   units that no automorphism exchanges and that 1 to 5 do not tell apart may keep the order they came in.

With ``exact`` unset, entries are compared through random projections whose values are rounded coarsely first, since a
gauge fixed in floating point leaves noise of about 1e-7.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.labels import Array, Labels, mix
from cipm_ir.passes.exact.canonicalize.gauge import TOLERANCE, Gauge
from cipm_ir.passes.exact.canonicalize.members import CHUNK, Floats, Member, Members
from cipm_ir.passes.exact.canonicalize.partition import Partition
from cipm_ir.symmetry.classes import Hashes

_SINGLES = 16
_CHOICES = 48
_PROJECTIONS = 2


class Ordering:
    """Refines the partition of the classes and cells of a program whose gauge is fixed."""

    def __init__(self, members: Members, gauge: Gauge) -> None:
        self.members = members
        self.gauge = gauge
        self.exact = members.exact
        self.part = Partition(members.analysis)
        self._done: set[int] = set()
        self._read: dict[int, int] = {}
        self._choices = 0
        self._find_open_signs()

    def run(self) -> Labels:
        """Return the final colours: equal only where nothing distinguishes and nothing may be exchanged."""
        for m in self.members.all:
            if m.line:
                self._by_row(m)
        while True:
            self.part.propagate()
            if not (self._ordered() or self._hashed() or self._signs(zeros=False) or self._signs(zeros=True)):
                if not self.part.tied().any():
                    return self.part.colour
                self._choose()

    # ------------------------------------------------------------ steps
    def _ordered(self) -> bool:
        if not self.exact:
            return False
        progress = False
        for k, m in enumerate(self.members.all):
            if k not in self._done and not m.line and self.part.tied()[m.places].any() and self._columns_known(m):
                self._done.add(k)
                progress |= self._by_row(m)
        return progress

    def _hashed(self) -> bool:
        progress = False
        for k, m in enumerate(self.members.all):
            if not self.part.tied()[m.places].any() or (k in self._done and not m.line):
                continue
            others = self.members.on_leaf[m.factor.leaf]
            state = hash((self._unsigned(m), *(self.part.colour[o.places].tobytes() for o in others)))
            if self._read.get(k) != state:
                self._read[k] = state
                progress |= self._by_content(m)
        return progress

    def _signs(self, *, zeros: bool) -> bool:
        """Signs that the gauge could not decide; with ``zeros``, by the sign bit of what is zero."""
        progress = False
        for m in self._signed_members:
            unsigned = (m.sign == 1) & ~self.gauge.signed[m.classes[:, None], m.sign_at]
            here = np.flatnonzero(unsigned.sum(1) == 1)
            here = here[np.argsort(self.part.colour[m.places[here]], kind="stable")]
            if not len(here) or not (m.line or self._columns_known(m)):
                continue
            classes, first = np.unique(m.classes[here], return_index=True)
            position = here[first]
            value = self._leading(m, position, zeros=zeros)
            progress |= self.gauge.decide(m, position, unsigned[position].argmax(1), classes, value)
        if progress:
            self._done.clear()
            self._find_open_signs()
        return progress

    def _find_open_signs(self) -> None:
        self._signed_members = [m for m in self.members.all if not self.gauge.settled(m).all()]

    def _choose(self) -> None:
        self._choices += 1
        if self._choices > _CHOICES:
            self.part.spread_all()
        else:
            self.part.choose(single=self._choices <= _SINGLES)

    # ------------------------------------------------------------ rows of ordered columns
    def _columns_known(self, m: Member) -> bool:
        tied = self.part.tied()
        return not any(tied[o.places].any() for o in self.members.on_leaf[m.factor.leaf] if o is not m)

    def _positions(self, m: Member) -> list[tuple[Labels, Labels]]:
        """Tied classes of a member and their positions in matching order, (classes, occurrences), by occurrences."""
        here = np.flatnonzero(self.part.tied()[m.places])
        here = here[np.lexsort((m.rank[here], m.places[here]))]
        classes, times = np.unique(m.places[here], return_counts=True)
        each = np.repeat(times, times)
        return [(classes[times == n], here[each == n].reshape(-1, n)) for n in np.unique(times).tolist()]

    def _by_row(self, m: Member) -> bool:
        """Split by the entries of each row, a few columns first, more where they do not decide."""
        if not self.exact:
            return self._by_content(m)
        return any([self._rows_split(m, classes, positions) for classes, positions in self._positions(m)])

    def _rows_split(self, m: Member, classes: Labels, positions: Labels) -> bool:
        progress, lo, width, total = False, 0, 4, self._row_length(m)
        bare = self._unsigned(m)
        while len(classes) and lo < total:
            hi = min(total, lo + max(1, min(width, 8 * CHUNK // positions.size)))
            values = self._entries(m, positions.ravel(), np.arange(lo, hi))
            keys = _sortable(np.abs(values) if bare else values).reshape(len(classes), -1)
            progress |= self.part.split(classes, keys)
            left = self.part.tied()[classes]
            classes, positions, lo, width = classes[left], positions[left], hi, width * 16
        return progress

    def _row_length(self, m: Member) -> int:
        return int(np.prod(m.shape)) // (m.factor.shape[-1] * max(1, m.groups))

    def _unsigned(self, m: Member) -> bool:
        """Return whether signs on this parameter are still open, so that only magnitudes may be compared."""
        return not all(self.gauge.settled(o).all() for o in self.members.on_leaf[m.factor.leaf])

    def _entries(self, m: Member, positions: Labels, columns: Labels) -> Floats:
        """Return entries (positions, columns) of a parameter, columns counted in the order of the colours."""
        return self.members.entries(m.factor.leaf, self._index(m, positions, columns), self.gauge.weight)

    def _index(self, m: Member, positions: Labels, columns: Labels) -> list[Array]:
        """Return one index array per axis, (positions, columns)."""
        sizes = [1 if a == m.axis else n for a, n in enumerate(m.shape)]
        if m.groups:
            sizes[0] //= m.groups
        where = [np.broadcast_to(x, (len(positions), len(columns))) for x in np.unravel_index(columns, sizes)]
        index: list[Array] = list(where)
        group: Array = np.zeros((len(positions), 1), np.int64)
        index[m.axis] = np.broadcast_to(positions[:, None], where[0].shape)
        if m.groups:
            group, inside = np.divmod(positions[:, None], m.factor.shape[1])
            index[m.axis] = np.broadcast_to(inside, where[0].shape)
            index[0] = where[0] + group * sizes[0]
        for o in self.members.on_leaf[m.factor.leaf]:
            if o is m:
                continue
            key = self.part.colour[o.places] * (o.rank.max() + 1) + o.rank
            if o.groups:  # the columns of a row are those of its group
                order = np.argsort(key.reshape(o.factor.shape), axis=1)
                index[o.axis] = order[positions[:, None] * o.groups // m.shape[0], where[o.axis]]
            elif m.groups and o.axis == 0:
                order = np.argsort(key.reshape(m.groups, -1), axis=1)
                index[0] = order[group, where[0]] + group * sizes[0]
            else:
                index[o.axis] = np.argsort(key)[where[o.axis]]
        return index

    def _leading(self, m: Member, positions: Labels, *, zeros: bool) -> Floats:
        """Return the first entry of each row that tells a sign; 0 where there is none."""
        out = np.zeros(len(positions))
        total, lo = self._row_length(m), 0
        others = [o for o in self.members.on_leaf[m.factor.leaf] if o is not m]
        while lo < total and len(left := np.flatnonzero(out == 0)):
            hi = min(total, lo + max(1, 8 * CHUNK // len(left)))
            index = self._index(m, positions[left], np.arange(lo, hi))
            values = self.members.entries(m.factor.leaf, index, self.gauge.weight)
            known = np.isfinite(values)
            for o in others:
                known &= o.at(self.gauge.settled(o), index)
            size = np.where(known, np.abs(values), 0.0)
            margin = 0.0 if self.exact else TOLERANCE * size.max(1, keepdims=True)
            usable = known if zeros else known & (size > margin)
            first = usable.argmax(1)
            value = values[np.arange(len(left)), first]
            out[left] = np.where(usable.any(1), np.where(np.signbit(value), -1.0, 1.0), 0.0)
            lo = hi
        return out

    # ------------------------------------------------------------ rows of unordered columns
    def _labels(self, m: Member, axis: int) -> Hashes:
        """Return a hash per index of an axis (shaped to broadcast) of what lies there.

        Zero on the member's own axis.
        """
        shape = [1] * len(m.shape)
        shape[axis] = m.shape[axis]
        base = mix(np.arange(m.shape[axis]) + (1 << 40))
        if axis == m.axis:
            return np.zeros([1] * len(m.shape), np.uint64)
        if m.groups and axis == 0:
            base = mix(np.arange(m.shape[0]) % (m.shape[0] // m.groups) + (1 << 40))
        for o in self.members.on_leaf[m.factor.leaf]:
            if o is not m and o.axis == axis:
                known = mix(self.part.colour[o.places] * (1 << 20) + o.rank)
                return np.asarray(mix(o.spread(known) + np.uint64(axis)), np.uint64)
        return np.asarray(mix(base + np.uint64(axis)), np.uint64).reshape(shape)

    def _by_content(self, m: Member) -> bool:
        labels = [self._labels(m, axis) for axis in range(len(m.shape))]
        weights = [o.spread(self.gauge.weight(o)) for o in self.members.on_leaf[m.factor.leaf]]
        bare = self._unsigned(m)
        groups = self._positions(m)
        if not groups:
            return False
        if self.exact:
            rows = self.members.reduce(m, self._hashes(m, weights, labels, bare), np.add)
            return any([self.part.split(classes, rows[places].view(np.int64)) for classes, places in groups])
        progress = False
        for salt, squared in [(s, q) for q in ((True,) if bare else (False, True)) for s in range(_PROJECTIONS)]:
            projected = self._projected(m, weights, labels, salt, squared)
            rows = self.members.reduce(m, projected, np.add)
            size = self.members.reduce(m, self._sizes(m, weights, squared), np.maximum)
            for classes, places in groups:
                for k in range(places.shape[1]):
                    progress |= self.part.split_close(classes, rows[places[:, k]], size[places[:, k]])
        return progress

    def _hashes(
        self, m: Member, weights: list[Array], labels: list[Hashes], bare: bool
    ) -> Iterator[tuple[slice, Array]]:
        for part, block in self.members.blocks(m.factor.leaf, weights, m.epsilon):
            wide = block.astype(np.float64)
            code = _sortable(np.abs(wide) if bare else wide).view(np.uint64)
            with np.errstate(over="ignore"):
                for k, label in enumerate(labels):
                    code = code + np.uint64(2 * k + 3) * (label[part] if label.shape[0] > 1 else label)
            yield part, mix(code)

    def _projected(
        self, m: Member, weights: list[Array], labels: list[Hashes], salt: int, squared: bool
    ) -> Iterator[tuple[slice, Array]]:
        random = [_uniform(mix(x + np.uint64(salt))) for k, x in enumerate(labels) if k != m.axis]
        for part, block in self.members.blocks(m.factor.leaf, weights, m.epsilon):
            out = np.square(block, dtype=np.float64) if squared else block.astype(np.float64)
            for r in random:
                out = out * (r[part] if r.shape[0] > 1 else r)
            yield part, np.where(np.isfinite(out), out, 0.0)

    def _sizes(self, m: Member, weights: list[Array], squared: bool) -> Iterator[tuple[slice, Array]]:
        for part, block in self.members.blocks(m.factor.leaf, weights, m.epsilon):
            out = np.square(block, dtype=np.float64) if squared else np.abs(block)
            yield part, np.where(np.isfinite(out), out, 0.0)


def _sortable(values: Floats) -> Labels:
    """Integers in the order of the floats, equal only where all bits are."""
    bits = np.ascontiguousarray(values).view(np.int64)
    return np.asarray(bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))


def _uniform(hashes: npt.NDArray[np.uint64]) -> Floats:
    """Return numbers in [-1, 1) from hashes."""
    return np.asarray((hashes >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0)
