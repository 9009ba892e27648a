"""From events to coupled classes: one connected-components call, then blocks to a fixpoint.

A class is the unit of removal: all positions of all tensors that belong to one hidden unit. Each class gets a
signature. Two classes with equal signatures look alike to every event of the walk, so exchanging them, atom by atom in
order of colour, is a symmetry of the whole graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.components import connected_components
from cipm_ir.ir.labels import Labels, mix
from cipm_ir.symmetry.walk import Walk

Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
_LOW = np.uint64((1 << 30) - 1)
_FACTOR, _MARK, _EQUATION, _CLASS, _RANK, _EVENT = range(1, 7)  # salts


@dataclass
class Links:
    """Flat block links: row k says that block atom ``parent[k]`` holds ``child[k]``; ``event`` names the marginal."""

    parent: Labels
    child: Labels
    event: Labels


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
    """Sum of 60 bits of the hashes by index; exact in float64 up to 2^23 terms each."""
    low = np.bincount(index, weights=(hashes & _LOW).astype(np.float64), minlength=count).astype(np.uint64)
    high = np.bincount(index, weights=((hashes >> np.uint64(30)) & _LOW).astype(np.float64), minlength=count).astype(
        np.uint64
    )
    with np.errstate(over="ignore"):
        return np.asarray(mix(low) + mix(high + np.uint64(1)), dtype=np.uint64)


def find_classes(walk: Walk) -> Classes:
    """Classes, pins, blocks and signatures of a walked graph."""
    rec = walk.rec
    pairs = [(u.a, u.b) for u in rec.unifications]
    count, of = components(rec.atoms, pairs)
    links = _flat_links(walk)
    if len(links.parent):
        count, of = _close_blocks(count, of, links)
    free = np.ones(count, bool)
    for pin in rec.pins:
        free[of[pin.labels]] = False
    block = np.zeros(count, bool)
    block[of[links.parent]] = True
    real, atom_colour = _colours(walk, of, count)
    real &= _touched(walk, of, count) & _owned(walk, of, count)
    colour = _ranked(of, atom_colour)
    signature = _signatures(walk, of, count, colour)
    return Classes(of, count, free, block, real, signature, colour, links)


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
    """Which classes are real, and a colour per atom: the factor it comes from and the selections it went through."""
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
    """Classes that some event mentions: rows of a table that nothing ever reads are not units."""
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
    """Classes with a position of a parameter: entries of constants that a program makes for itself are not units."""
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
    """Positions whose key occurs more than once, in order."""
    ordered = np.sort(key)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(key, twice)) if len(twice) else np.zeros(0, np.int64)


def _signatures(walk: Walk, of: Labels, count: int, colour: Hashes) -> Hashes:
    total = scatter_sum(of, colour, count)
    if not walk.rec.unifications:
        return total
    a = np.concatenate([u.a for u in walk.rec.unifications])
    b = np.concatenate([u.b for u in walk.rec.unifications])
    event = np.repeat(np.arange(len(walk.rec.unifications)), [len(u.a) for u in walk.rec.unifications])
    with np.errstate(over="ignore"):
        edges = mix(colour[a] + np.uint64(3) * colour[b] + mix(event, salt=_EVENT))
        return np.asarray(total + scatter_sum(of[a], edges, count), dtype=np.uint64)
