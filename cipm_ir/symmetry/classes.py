"""From events to coupled classes: one connected-components call, then blocks to a fixpoint.

A class is the unit of removal: all positions of all tensors that belong to one hidden unit. Each class gets a
signature. Two classes with equal signatures look alike to every event of the walk, so exchanging them, atom by atom in
order of colour, is a symmetry of the whole graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.components import connected_components
from cipm_ir.ir.labels import Labels, mix
from cipm_ir.ops.events import Link
from cipm_ir.symmetry.walk import Walk

Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
_LOW = np.uint64((1 << 30) - 1)
_FACTOR, _MARK, _EQUATION, _CLASS, _RANK, _EVENT, _SOURCE = range(1, 8)  # salts


@dataclass
class Links:
    """Flat block links: row k says that block atom ``parent[k]`` holds ``child[k]``; ``event`` names the marginal."""

    parent: Labels
    child: Labels
    event: Labels


@dataclass
class Parts:
    """Sets of atoms that are exchanged inside their classes: query heads of one key head (`cipm_ir.symmetry.parts`).

    A part is numbered as a class behind all classes, but no atom is of it: its atoms are of the key head's classes.
    A *cell*, numbered behind the parts, is where a class and a part cross.

    Attributes:
        of: per atom, the part that it lies in, or -1; None where there are no parts.
        cell: per atom, its cell, or its class where it lies in no part; None where there are no parts.
        cell_class, cell_part: the class and the part of each cell.
        spaces: the parts that may be exchanged, per space.
        atoms: their atoms in matching order, (parts, atoms), per space.
        ties: spaces that must keep equally many parts.
        frozen: spaces that cannot lose a part, since what shares their copies is in no space.
    """

    of: Labels | None = None
    cell: Labels | None = None
    cell_class: Labels = field(default_factory=lambda: np.zeros(0, np.int64))
    cell_part: Labels = field(default_factory=lambda: np.zeros(0, np.int64))
    spaces: list[Labels] = field(default_factory=list)
    atoms: list[Labels] = field(default_factory=list)
    ties: list[list[int]] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)


@dataclass
class Classes:
    """Coupled classes and what is known of each.

    ``of[atom]`` is the class of an atom. ``free``, ``block``, ``real``, ``signature`` are per class: nothing pins it,
    it contains block labels, it contains positions of a parameter, what it looks like. ``colour`` is per atom.
    """

    of: Labels
    count: int
    free: Flags
    block: Flags
    real: Flags
    signature: Hashes
    colour: Hashes
    links: Links
    parts: Parts = field(default_factory=Parts)

    def refined(self, atoms: Labels | slice = slice(None)) -> Labels:
        """Of each atom, its class, or the cell where its class and the part that it lies in cross."""
        return (self.of if self.parts.cell is None else self.parts.cell)[atoms]

    def stays(self, keep: np.ndarray) -> np.ndarray:
        """Return which classes and cells stay: a cell needs its class and its part."""
        if not len(self.parts.cell_class):
            return keep
        return np.concatenate([keep, keep[self.parts.cell_class] & keep[self.parts.cell_part]])


def components(count: int, pairs: list[tuple[Labels, Labels]]) -> tuple[int, Labels]:
    """Connected components of ``count`` nodes under pairs of arrays of equal length."""
    if not pairs:
        return count, np.arange(count, dtype=np.int64)
    a = np.concatenate([p[0] for p in pairs])
    b = np.concatenate([p[1] for p in pairs])
    return connected_components(a, b, count)


def unique_pairs(a: Labels, b: Labels) -> Labels:
    """Distinct rows (a, b), sorted; entries below 2^31."""
    key = np.sort((a << 31) | b)  # several times faster than np.unique, which hashes
    key = key[np.r_[True, key[1:] != key[:-1]][: len(key)]]
    return np.stack([key >> 31, key & ((1 << 31) - 1)], 1)


def scatter_sum(index: Labels, hashes: Hashes, count: int) -> Hashes:
    """Return the sum of 60 bits of the hashes by index; exact in float64 up to 2^23 terms each."""
    low = np.bincount(index, weights=(hashes & _LOW).astype(np.float64), minlength=count).astype(np.uint64)
    high = np.bincount(index, weights=((hashes >> np.uint64(30)) & _LOW).astype(np.float64), minlength=count).astype(
        np.uint64
    )
    with np.errstate(over="ignore"):
        return np.asarray(mix(low) + mix(high + np.uint64(1)), dtype=np.uint64)


def find_classes(walk: Walk, *, apart: bool = False) -> Classes:
    """Return classes, pins, blocks and signatures of a walked graph.

    With ``apart``, copies are of classes of their own. A source is then told from every other, and so are its copies
    from those of others.
    """
    rec = walk.rec
    copies = set(rec.copies) if apart else set[int]()
    tied = [k for k in range(len(rec.unifications)) if k not in copies]
    count, of = components(rec.atoms, [(rec.unifications[k].a, rec.unifications[k].b) for k in tied])
    links = _flat_links(walk)
    if len(links.parent):
        count, of = _close_blocks(count, of, links)
    free = np.ones(count, bool)
    for pin in rec.pins:
        free[of[pin.labels]] = False
    _hold(walk, of, free)
    block = np.zeros(count, bool)
    block[of[links.parent]] = True
    real, atom_colour = _colours(walk, of, count)
    real &= _touched(walk, of, count) & _owned(walk, of, count)
    with np.errstate(over="ignore"):
        for k in copies:
            event = rec.unifications[k]
            name = mix(event.b, salt=_SOURCE)
            atom_colour[event.a] += name
            atom_colour[event.b] = name  # not a sum: it may stand there for several copies
    colour = _ranked(of, atom_colour)
    signature = _signatures(walk, of, count, colour, tied)
    return Classes(of, count, free, block, real, signature, colour, links)


def atoms_by_class(classes: Classes, atoms: Labels | None = None) -> tuple[Labels, Labels]:
    """Atoms (all, or some) by (class, colour), and where each class starts."""
    if atoms is None:
        order = np.lexsort((classes.colour, classes.of))
    else:
        order = atoms[np.lexsort((classes.colour[atoms], classes.of[atoms]))]
    return order, np.searchsorted(classes.of[order], np.arange(classes.count + 1))


def kinds_of_atoms(walk: Walk, classes: Classes) -> Hashes:
    """Return a hash per atom, equal for atoms of one kind.

    An exchange takes the k-th of a class and kind to the k-th.
    """
    return _colours(walk, classes.of, classes.count)[1]


def _hold(walk: Walk, of: Labels, free: Flags) -> None:
    """What lies in a block that is pinned along every dimension of its labels cannot move (``free`` in place)."""
    by_labels: dict[int, list[Link]] = {}
    for link in walk.rec.links:
        if len(link.axes) == 1 and not free[of[link.parents]].all():
            by_labels.setdefault(id(link.whole), []).append(link)
    for found in by_labels.values():
        labels = found[0].whole
        pinned = np.zeros((labels.ndim, *labels.shape), bool)
        for link in found:
            (axis,) = link.axes
            shape = [-1 if k == axis else 1 for k in range(labels.ndim)]
            pinned[axis] |= ~free[of[link.parents]].reshape(shape)
        free[of[labels[pinned.all(axis=0)]]] = False


def _flat_links(walk: Walk) -> Links:
    parents, children, events = [], [], []
    for k, link in enumerate(walk.rec.links):
        rows, width = link.children.shape
        parents.append(np.repeat(link.parents, width))
        children.append(link.children.ravel())
        events.append(np.full(rows * width, k, np.int64))
    if not parents:
        empty = np.zeros(0, np.int64)
        return Links(empty, empty, empty)
    return Links(np.concatenate(parents), np.concatenate(children), np.concatenate(events))


def _close_blocks(count: int, of: Labels, links: Links) -> tuple[int, Labels]:
    """Unify block labels that hold the same classes, and those of one event that share a class, to a fixpoint."""
    while True:
        child, parent = of[links.child], of[links.parent]
        rows = unique_pairs(links.parent, child)
        atoms, index = np.unique(rows[:, 0], return_inverse=True)
        content = scatter_sum(index, mix(rows[:, 1]), len(atoms))
        size = np.bincount(index)
        order = np.lexsort((size, content))
        same = (content[order][1:] == content[order][:-1]) & (size[order][1:] == size[order][:-1])
        pairs = [(of[atoms[order[1:][same]]], of[atoms[order[:-1][same]]])]
        order = np.lexsort((child, links.event))
        same = (child[order][1:] == child[order][:-1]) & (links.event[order][1:] == links.event[order][:-1])
        pairs.append((parent[order[1:][same]], parent[order[:-1][same]]))
        number, label = components(count, pairs)
        if number == count:
            return count, of
        count, of = number, label[of]


def _colours(walk: Walk, of: Labels, count: int) -> tuple[Flags, Hashes]:
    """Return which classes are real, and a colour per atom.

    The factor it comes from and the selections it went through.
    """
    rec = walk.rec
    leaves = [f for f in walk.leaf_factors if f.active]
    base = np.asarray([f.base for f in leaves] + [lo for lo, _ in rec.fresh_ranges], np.int64)
    size = np.asarray([f.size for f in leaves] + [hi - lo for lo, hi in rec.fresh_ranges], np.int64)
    atoms = np.arange(size.sum()) + np.repeat(base - (np.cumsum(size) - size), size)
    colour = np.zeros(rec.atoms, np.uint64)
    colour[atoms] = np.repeat(mix(np.arange(len(base)), salt=_FACTOR), size)
    real = np.zeros(count, bool)
    real[of[atoms[: size[: len(leaves)].sum()]]] = True
    whole = set(zip(base.tolist(), size.tolist(), strict=True))
    seen: set[int] = set()
    tags = mix(np.arange(len(rec.equations)), salt=_EQUATION)
    with np.errstate(over="ignore"):
        for k, (labels, salt) in enumerate(rec.marks):
            colour[labels] += mix(np.asarray(salt) + (k << 40), salt=_MARK)
        for k, eq in enumerate(rec.equations):
            labels = eq.labels
            if id(labels) in seen or not labels.size or (int(labels[0]), labels.size) in whole:
                continue  # a whole factor: tells nothing apart
            seen.add(id(labels))
            colour[labels] += tags[k]  # once per atom, however often it is listed
    return real, colour


def _touched(walk: Walk, of: Labels, count: int) -> Flags:
    """Return classes that some event mentions: rows of a table that nothing ever reads are not units."""
    rec = walk.rec
    touched = np.zeros(count, bool)
    seen: set[int] = set()
    events = [x for u in rec.unifications for x in (u.a, u.b)] + [e.labels for e in rec.equations]
    for labels in events + [link.children.ravel() for link in rec.links]:
        if id(labels) not in seen:
            seen.add(id(labels))
            touched[of[labels]] = True
    return touched


def _owned(walk: Walk, of: Labels, count: int) -> Flags:
    """Return classes with a position of a parameter.

    Entries of constants that a program makes for itself are not units.
    """
    owned = np.zeros(count, bool)
    for f in walk.leaf_factors:
        if not walk.leaves[f.leaf].constant:
            owned[of[f.base : f.base + f.size]] = True
    return owned


def _ranked(of: Labels, colour: Hashes) -> Hashes:
    """Tell atoms of one class and colour apart by their order."""
    with np.errstate(over="ignore"):
        key = mix(of, salt=_CLASS) + colour
        hit = _suspects(key)
        rank = np.zeros(len(of), np.int64)
        order = hit[np.argsort(key[hit], kind="stable")]
        position = np.arange(len(order))
        first = np.r_[True, key[order][1:] != key[order][:-1]][: len(order)]
        rank[order] = position - np.maximum.accumulate(np.where(first, position, 0))
        return mix(colour + mix(rank, salt=_RANK) - mix(0, salt=_RANK), salt=_RANK)


def _suspects(key: Hashes) -> Labels:
    """Return positions whose key occurs more than once, in order."""
    ordered = np.sort(key)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(key, twice)) if len(twice) else np.zeros(0, np.int64)


def _signatures(walk: Walk, of: Labels, count: int, colour: Hashes, tied: list[int]) -> Hashes:
    total = scatter_sum(of, colour, count)
    events = [walk.rec.unifications[k] for k in tied]
    if not events:
        return total
    a = np.concatenate([u.a for u in events])
    b = np.concatenate([u.b for u in events])
    event = np.repeat(np.asarray(tied), [len(u.a) for u in events])
    with np.errstate(over="ignore"):
        edges = mix(colour[a] + np.uint64(3) * colour[b] + mix(event, salt=_EVENT))
        return np.asarray(total + scatter_sum(of[a], edges, count), dtype=np.uint64)
