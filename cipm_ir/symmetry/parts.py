"""Parts: what may be exchanged inside coupled classes, since it uses copies of the same.

Query heads that share a key head are tied to it unit by unit: query entries and key entries of one position are of one
class. Exchanging two such heads maps every class to itself, so no exchange of classes shows it. To find it, copies are
taken as classes of their own, each with the name of its source. Of the blocks that may then be exchanged, those that
only move atoms inside the real classes, or of classes that are fixed (keys from a cache hold each of their query heads
for themselves), are parts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cipm_ir.ir.labels import Labels
from cipm_ir.symmetry.classes import Classes, Parts, atoms_by_class, find_classes
from cipm_ir.symmetry.spaces import RawSpace, find_blocks
from cipm_ir.symmetry.walk import Walk


def with_parts(walk: Walk, classes: Classes, spaces: list[RawSpace]) -> tuple[Classes, list[RawSpace]]:
    """Return classes with the parts numbered behind them, and spaces with those of parts in front of the blocks."""
    apart = find_classes(walk, apart=True) if walk.rec.copies else None
    found, holders = ([], []) if apart is None else _exchangeable(apart, classes)
    if not found:
        return classes, spaces
    of = np.full(len(classes.of), -1, np.int64)
    parts, made, count = Parts(of, atoms=found), list[RawSpace](), classes.count
    for atoms, holder in zip(found, holders, strict=True):
        numbers = np.arange(count, count + len(atoms))
        count += len(atoms)
        of[atoms] = numbers[:, None]
        parts.spaces.append(numbers)
        made.append(RawSpace("blocks", numbers[:, None], holder))
    inside = np.flatnonzero(of >= 0)
    pairs, cell = np.unique(np.stack([classes.of[inside], of[inside]]), axis=1, return_inverse=True)
    parts.cell_class, parts.cell_part = pairs
    parts.cell = classes.of.copy()
    parts.cell[inside] = count + cell.ravel()
    _tie(walk, parts)
    more = count - classes.count
    grown = replace(
        classes,
        count=count,
        free=np.r_[classes.free, np.ones(more, bool)],
        block=np.r_[classes.block, np.ones(more, bool)],
        real=np.r_[classes.real, np.ones(more, bool)],
        signature=np.r_[classes.signature, np.zeros(more, np.uint64)],
        parts=parts,
    )
    place = next((k for k, raw in enumerate(spaces) if raw.kind == "blocks" or raw.table.shape[1] > 1), len(spaces))
    return grown, [*spaces[:place], *made, *spaces[place:]]


def _exchangeable(apart: Classes, classes: Classes) -> tuple[list[Labels], list[int]]:
    """Atoms of the parts of each space, (parts, atoms), no atom twice; and the class of the block around each space."""
    spaces = [raw for raw in find_blocks(apart) if len(raw.table) > 1]
    spaces = [raw for raw in spaces if apart.real[raw.table[0, 1:]].any()]
    used = np.zeros(apart.count, bool)
    for raw in spaces:
        used[raw.table] = True
    order, start = atoms_by_class(apart, np.flatnonzero(used[apart.of]))
    taken = np.zeros(len(classes.of), bool)
    found: list[tuple[int, Labels, int]] = []
    for raw in spaces:
        width = start[raw.table[0] + 1] - start[raw.table[0]]
        offset = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
        atoms = order[np.repeat(start[raw.table], width, axis=1) + offset]
        inside = classes.of[atoms]
        held = (inside == inside[0]).all(axis=0) | ~classes.free[inside].any(axis=0)
        if (inside[:, 0] == inside[0, 0]).all() and held.all() and not taken[atoms].any():
            taken[atoms] = True
            found.append((int(atoms.min()), atoms, int(inside[0, 0])))
    found.sort(key=lambda one: one[0])
    return [atoms for _, atoms, _ in found], [holder for _, _, holder in found]


def _tie(walk: Walk, parts: Parts) -> None:
    """Note which spaces share copies: every source that stays must keep equally many."""
    assert parts.of is not None
    space_of = np.full(int(parts.of.max()) + 1, -1, np.int64)
    for k, numbers in enumerate(parts.spaces):
        space_of[numbers] = k
    for k in walk.rec.copies:
        part = parts.of[walk.rec.unifications[k].a]
        tied = np.unique(space_of[part[part >= 0]]).tolist()
        parts.ties.append(tied)
        if (part < 0).any():
            parts.frozen.update(tied)
