"""Classes of axes that every event treats as a whole, found at one position of them.

Most axes of a network (the channels of a plain convolution) meet only events that list all of their positions in
order. Position k of such an axis is coupled to positions k of others in the same way for every k, so that one position
stands for all. What is left of a network of 160,000 atoms is a few hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.labels import Labels
from cipm_ir.ops.events import Equation, Link, Pin, Recorder, Unification
from cipm_ir.symmetry.classes import Classes, find_classes
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.walk import Walk

AnyEntry = TypeVar("AnyEntry", bound=np.generic)


@dataclass(frozen=True)
class Shortened:
    """Events in which an axis that is always met as a whole has one atom.

    Attributes:
        rec: the events; their number and order are those of the walk.
        leaf_factors: the factors, in the order of the walk.
        base, size: of each range of atoms of the walk, in order: its first atom, and how many it has.
        start: of each range, its first atom here.
        one: of each range, whether it has one atom here.
    """

    rec: Recorder
    leaf_factors: list[LeafFactor]
    base: Labels
    size: Labels
    start: Labels
    one: npt.NDArray[np.bool_]

    def before(self, atoms: Labels) -> Labels:
        """Return the atoms of the walk that some atoms here are, or are the first of."""
        k = np.searchsorted(self.start, atoms, side="right") - 1
        return np.asarray(atoms + (self.base - self.start)[k])

    def here(self, atoms: Labels) -> Labels:
        """Return the atoms here that stand for some atoms of the walk."""
        k = np.searchsorted(self.base, atoms, side="right") - 1
        return np.asarray(self.start[k] + np.where(self.one[k], 0, atoms - self.base[k]))

    def spread(self, values: npt.NDArray[AnyEntry]) -> npt.NDArray[AnyEntry]:
        """Return for each atom of the walk the value of the atom here that stands for it."""
        spread = np.repeat(values[self.start], self.size)
        for k in np.flatnonzero(~self.one).tolist():
            base, start, size = self.base[k], self.start[k], self.size[k]
            spread[base : base + size] = values[start : start + size]
        return spread


def classes_of(walk: Walk) -> Classes:
    """Return the classes of a walked graph, as `find_classes` finds them atom by atom."""
    short = shorten(walk.rec, walk.leaf_factors)
    found = find_classes(replace(walk, rec=short.rec, leaf_factors=short.leaf_factors))
    # A class is numbered by its first atom: of a whole axis at the same position of the first such axis.
    start = np.zeros(found.count, np.int64)
    start[found.of[::-1]] = short.before(np.arange(short.rec.atoms))[::-1]
    root = short.spread(start[found.of])
    position = np.arange(walk.rec.atoms)
    for base, size in zip(short.base[short.one].tolist(), short.size[short.one].tolist(), strict=True):
        root[base : base + size] += position[:size]
    first = np.flatnonzero(root == position)
    number = np.zeros(walk.rec.atoms, np.int64)
    number[first] = position[: len(first)]
    stands = found.of[short.here(first)]
    links = replace(found.links, parent=short.before(found.links.parent), child=short.before(found.links.child))
    return Classes(
        number[root], len(first), found.free[stands], found.block[stands], found.real[stands],
        found.signature[stands], short.spread(found.colour), links,
    )  # fmt: skip


def shorten(rec: Recorder, leaf_factors: Sequence[LeafFactor]) -> Shortened:
    """Return the events with one atom for each axis that every event mentions as a whole, or not at all."""
    found = _Ranges(rec, leaf_factors)
    for u in rec.unifications:
        found.join(u.a, u.b)
    for labels in (*(p.labels for p in rec.pins), *(e.labels for e in rec.equations)):
        if found.whole(labels) is None:
            found.split(labels)
    linked = (x for k in rec.links for x in (k.parents, k.children, k.whole))
    for labels in (*(labels for labels, _ in rec.marks), *linked):
        found.split(labels)
    return found.shortened()


class _Ranges:
    """The ranges of atoms that were allocated at once, those coupled as wholes joined."""

    def __init__(self, rec: Recorder, leaf_factors: Sequence[LeafFactor]) -> None:
        self.rec, self.factors = rec, leaf_factors
        spans = sorted([*((f.base, f.size) for f in leaf_factors), *((lo, hi - lo) for lo, hi in rec.fresh_ranges)])
        spans = [span for span in spans if span[1]]
        ends = [0, *(base + size for base, size in spans)]
        gaps = [
            (lo, hi - lo) for lo, hi in zip(ends, [*(base for base, _ in spans), rec.atoms], strict=True) if lo < hi
        ]
        spans = sorted(spans + gaps)
        self.base = np.asarray([base for base, _ in spans], np.int64)
        self.size = np.asarray([size for _, size in spans], np.int64)
        self.number = {span: k for k, span in enumerate(spans)}
        self.parent = list(range(len(spans)))
        self.partial = {self.number[gap] for gap in gaps}  # atoms of nothing
        self.known: dict[int, int | None] = {}
        self.made: dict[int, Labels] = {}

    def whole(self, labels: Labels) -> int | None:
        """Return the range that the labels are, in order; None where they are none."""
        key = id(labels)
        if key not in self.known:
            flat = labels.ravel()
            number = self.number.get((int(flat[0]), flat.size)) if flat.size else None
            if number is not None and not np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):
                number = None
            self.known[key] = number
        return self.known[key]

    def join(self, a: Labels, b: Labels) -> None:
        """Couple two ranges position by position."""
        one, other = self.whole(a), self.whole(b)
        if one is None or other is None:
            self.split(a)
            self.split(b)
        else:
            self.parent[self._root(one)] = self._root(other)

    def _root(self, k: int) -> int:
        while self.parent[k] != k:
            self.parent[k] = k = self.parent[self.parent[k]]
        return k

    def split(self, labels: Labels) -> None:
        """Note the ranges of some labels as ones whose positions differ."""
        self.partial.update(np.unique(np.searchsorted(self.base, labels.ravel(), side="right") - 1).tolist())

    def shortened(self) -> Shortened:
        """Return the events with one atom for each range that nothing splits."""
        rec, roots = self.rec, [self._root(k) for k in range(len(self.parent))]
        split = {roots[k] for k in self.partial}
        one = np.asarray([root not in split for root in roots], bool)
        length = np.where(one, 1, self.size)
        start = np.cumsum(length) - length
        self.one, self.start = one, start
        reduced = replace(
            rec,
            atoms=int(length.sum()),
            unifications=[Unification(self._labels(u.a), self._labels(u.b), u.node) for u in rec.unifications],
            pins=[Pin(self._labels(p.labels), p.node, p.reason) for p in rec.pins],
            links=[
                Link(self._moved(k.parents), self._moved(k.children), k.axes, self._labels(k.whole)) for k in rec.links
            ],
            marks=[(self._moved(labels), colour) for labels, colour in rec.marks],
            equations=[Equation(self._labels(e.labels), e.terms, e.scale, e.sign, e.inexact) for e in rec.equations],
            fresh_ranges=[(lo, lo + length) for lo, length in (self._span(lo, hi - lo) for lo, hi in rec.fresh_ranges)],
        )
        factors = []
        for f in self.factors:
            base, size = self._span(f.base, f.size)
            factors.append(f if (base, size) == (f.base, f.size) else replace(f, base=base, shape=(size,)))
        return Shortened(reduced, factors, self.base, self.size, start, one)

    def _span(self, base: int, size: int) -> tuple[int, int]:
        """First atom and number of atoms of a range, shortened."""
        k = self.number.get((base, size))
        return (0, 0) if k is None else (int(self.start[k]), 1 if self.one[k] else size)

    def _labels(self, labels: Labels) -> Labels:
        """Return labels of an event, shortened; the same object gives the same object."""
        made = self.made.get(id(labels))
        if made is None:
            k = self.whole(labels)
            made = self.start[k : k + 1] if k is not None and self.one[k] else self._moved(labels)
            self.made[id(labels)] = made
        return made

    def _moved(self, labels: Labels) -> Labels:
        """Return labels within ranges that keep their atoms."""
        k = np.searchsorted(self.base, labels, side="right") - 1
        return np.asarray(labels + (self.start - self.base)[k])
