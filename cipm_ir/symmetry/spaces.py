"""Spaces: maximal sets of classes that may be exchanged.

* *Units* are free classes with the same signature that lie in the same blocks.
* *Cells* lie where two families of blocks cross (head by RoPE plane); alone they may be scaled, not exchanged.
* *Blocks* are exchanged as wholes, each with all that it holds. Two are alike when their contents match one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cipm_ir.algebra import Dense
from cipm_ir.ir.labels import Labels, mix
from cipm_ir.symmetry.classes import Classes, Hashes, scatter_sum, unique_pairs

_LABEL, _CODE, _SELF, _RANK, _CONTENT, _SUB, _OUTER = range(16, 23)  # salts


@dataclass
class RawSpace:
    """``table[i]``: the classes that move when element i of the space moves; column 0 is the class itself."""

    kind: str
    table: Labels
    parent_class: int = -1
    """Innermost block (a class) that holds a unit space, or -1."""


@dataclass
class _Holds:
    """Class-level links, one row for each (block label, class): transitively closed."""

    label: Labels
    block: Labels
    child: Labels
    code: Hashes
    """Event, rank of the label among those of its block, and which atoms of the class lie there: what is the same for
    two blocks that may be exchanged."""
    atoms: Hashes
    """Which atoms of the class (by colour) lie there, each as often as it does."""


def find_spaces(classes: Classes) -> list[RawSpace]:
    """Return all spaces: units and cells in order of first atom, then blocks from inner to outer."""
    holds = _closed(classes)
    cells, innermost, nested = _crossings(classes, holds)
    loose = classes.free & classes.real & ~classes.block
    key = classes.signature.copy()
    with np.errstate(over="ignore"):
        if len(holds.child):
            key += scatter_sum(holds.child, mix(holds.label, salt=_LABEL) * (holds.atoms | np.uint64(1)), classes.count)
    spaces = []
    for table in _grouped(np.flatnonzero(loose & ~cells), key):
        spaces.append(RawSpace("units", table[:, None], int(innermost[table[0]])))
    for table in _grouped(np.flatnonzero(loose & cells), classes.signature):
        spaces.append(RawSpace("cells", table[:, None]))
    first = _first_atom(classes)
    spaces.sort(key=lambda s: first[s.table[0, 0]])
    return spaces + _block_spaces(classes, holds, cells, nested, first)


def find_blocks(classes: Classes) -> list[RawSpace]:
    """Return the spaces of blocks alone, from inner to outer."""
    holds = _closed(classes)
    cells, _, nested = _crossings(classes, holds)
    return _block_spaces(classes, holds, cells, nested, _first_atom(classes))


def _first_atom(classes: Classes) -> Labels:
    first = np.full(classes.count, len(classes.of), np.int64)
    np.minimum.at(first, classes.of, np.arange(len(classes.of)))
    return first


def _grouped(members: Labels, key: Hashes) -> list[Labels]:
    """Members with equal keys, in order of member."""
    if not len(members):
        return []
    order = members[np.argsort(key[members], kind="stable")]
    cut = np.flatnonzero(key[order][1:] != key[order][:-1]) + 1
    return [np.asarray(part) for part in np.split(order, cut)]


def _closed(classes: Classes) -> _Holds:
    """Deduplicated links between labels and classes; a block that holds a block holds what that holds."""
    links, of = classes.links, classes.of
    if not len(links.parent):
        empty = np.zeros(0, np.int64)
        return _Holds(empty, empty, empty, empty.astype(np.uint64), empty.astype(np.uint64))
    rows = unique_pairs(links.parent, of[links.child])
    atoms, where = np.unique(links.parent, return_index=True)
    event = links.event[where]
    block = of[atoms]
    order = np.lexsort((atoms, event, block))
    rank = np.empty(len(atoms), np.int64)
    same = np.r_[False, (block[order][1:] == block[order][:-1]) & (event[order][1:] == event[order][:-1])]
    position = np.arange(len(atoms))
    rank[order] = position - np.maximum.accumulate(np.where(same, 0, position))
    code = mix(event * 1_000_003 + rank, salt=_CODE)
    at = np.searchsorted(atoms, rows[:, 0])
    pair = np.searchsorted((rows[:, 0] << 31) | rows[:, 1], (links.parent << 31) | of[links.child])
    which = scatter_sum(pair, mix(classes.colour[links.child], salt=_RANK), len(rows))
    with np.errstate(over="ignore"):
        code_of = mix(code[at] + which, salt=_CODE)
    label, child, codes, found = rows[:, 0], rows[:, 1], code_of, which
    frontier = (label, child, codes, found)
    for _ in range(8):
        inner = np.flatnonzero(classes.block[frontier[1]])
        if not len(inner):
            break
        by_block = np.argsort(of[rows[:, 0]], kind="stable")
        held = of[rows[by_block, 0]]
        lo, hi = np.searchsorted(held, frontier[1][inner]), np.searchsorted(held, frontier[1][inner], side="right")
        times = hi - lo
        index = by_block[np.repeat(lo, times) + np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)]
        with np.errstate(over="ignore"):
            fresh = (
                np.repeat(frontier[0][inner], times),
                rows[index, 1],
                mix(np.repeat(frontier[2][inner], times) * np.uint64(3) + code_of[index], salt=_CODE),
                mix(np.repeat(frontier[3][inner], times) * np.uint64(3) + which[index], salt=_RANK),
            )
        known = set(zip(label.tolist(), child.tolist(), strict=True))
        new = np.array([(p, c) not in known for p, c in zip(fresh[0].tolist(), fresh[1].tolist(), strict=True)], bool)
        frontier = (fresh[0][new], fresh[1][new], fresh[2][new], fresh[3][new])
        label, child, codes, found = (
            np.concatenate([x, y]) for x, y in zip((label, child, codes, found), frontier, strict=True)
        )
    return _Holds(label, of[label], child, codes, found)


def _crossings(classes: Classes, holds: _Holds) -> tuple[np.ndarray, Labels, Labels]:
    """Cells, the innermost block of each class, and pairs (outer, inner) of nested blocks."""
    cells = np.zeros(classes.count, bool)
    innermost = np.full(classes.count, -1, np.int64)
    none = np.zeros((0, 2), np.int64)
    if not len(holds.label):
        return cells, innermost, none
    pairs = unique_pairs(holds.block, holds.child)
    blocks, row = np.unique(pairs[:, 0], return_inverse=True)
    size = np.bincount(row)
    first, second = _alike_pairs(pairs[:, 1])
    shared, which, counts = np.unique(
        row[first] * len(blocks) + row[second], return_inverse=True, return_counts=True
    )  # by pair of blocks: how many classes lie in both
    i, j = shared // len(blocks), shared % len(blocks)
    off = i != j
    inside = off & (counts == size[j])  # j's classes all lie in i
    nested = np.stack([blocks[i[inside]], blocks[j[inside]]], 1)
    order = np.lexsort((-size[row], pairs[:, 1]))  # the last write, the smallest block, wins
    innermost[pairs[order, 1]] = pairs[order, 0]
    # a cell is the only class that two crossing blocks share
    crossing = off & (counts == 1) & (size[i] > 1) & (size[j] > 1)
    cells[pairs[first[crossing[which]], 1]] = True
    return cells, innermost, nested


def _alike_pairs(keys: Labels) -> tuple[Labels, Labels]:
    """Return all pairs of positions with equal keys, each position with itself too."""
    order = np.argsort(keys, kind="stable")
    _, start, width = np.unique(keys[order], return_index=True, return_counts=True)
    own_start, own_width = np.repeat(start, width), np.repeat(width, width)  # of the run that each position is in
    first = np.repeat(np.arange(len(keys)), own_width)
    offset = np.arange(len(first)) - np.repeat(np.cumsum(own_width) - own_width, own_width)
    return order[first], order[np.repeat(own_start, own_width) + offset]


def _block_spaces(classes: Classes, holds: _Holds, cells: np.ndarray, nested: Labels, first: Labels) -> list[RawSpace]:
    """Exchangeable blocks with their contents in matching order."""
    if not len(holds.label):
        return []
    count = classes.count
    with np.errstate(over="ignore"):
        absolute = mix(holds.label, salt=_LABEL) * holds.code
        every = np.zeros(count, np.uint64)
        np.add.at(every, holds.child, absolute)
        key = holds.block * count + holds.child
        pair, row = np.unique(key, return_inverse=True)
        own = np.zeros(len(pair), np.uint64)
        np.add.at(own, row, mix(holds.code, salt=_SELF) - absolute)  # to itself: by event and rank instead of by name
        block, child = pair // count, pair % count
        inner = _nested_ranks(nested, first)
        extra = np.zeros(len(pair), np.uint64)
        for outer, sub, rank in inner:
            mine = holds.block == sub
            at = np.searchsorted(pair, outer * count + holds.child[mine])
            np.add.at(extra, at, mix(holds.code[mine] + mix(rank, salt=_RANK), salt=_SELF) - absolute[mine])
        look = classes.signature[child] + every[child] + own + extra
    blocks = np.unique(block)
    sub_of: dict[int, list[tuple[int, int]]] = {}
    for outer, sub, rank in inner:
        sub_of.setdefault(outer, []).append((rank, sub))
    bad = np.zeros(count, bool)
    bad[block[~classes.free[child]]] = True
    bad[nested[~classes.free[nested[:, 1]], 0]] = True  # what cannot move holds back all that lies around it
    usable = [int(b) for b in blocks if classes.free[b] and not bad[b]]
    start = np.searchsorted(block, blocks)
    stop = np.searchsorted(block, blocks, side="right")
    span = {int(b): (int(lo), int(hi)) for b, lo, hi in zip(blocks, start, stop, strict=True)}
    rows: dict[int, Labels] = {}
    profile = np.zeros(count, np.uint64)
    for b in usable:
        lo, hi = span[b]
        order = np.lexsort((first[child[lo:hi]], look[lo:hi]))
        subs = [s for _, s in sorted(sub_of.get(b, [])) if s not in set(child[lo:hi].tolist())]
        rows[b] = np.concatenate([[b], child[lo:hi][order], np.asarray(subs, np.int64)])
        with np.errstate(over="ignore"):
            content = mix(np.sort(look[lo:hi]) + mix(np.arange(hi - lo), salt=_RANK), salt=_CONTENT).sum(
                dtype=np.uint64
            )
            content += sum(
                (mix(classes.signature[s] + mix(k, salt=_RANK), salt=_SUB) for k, s in enumerate(subs)), np.uint64(0)
            )
            profile[b] = classes.signature[b] + content + mix(len(subs), salt=_SUB)
            profile[b] += _outer_names(b, nested)
    spaces = []
    for members in _grouped(np.asarray(sorted(usable), np.int64), profile):
        members = members[np.argsort(first[members], kind="stable")]
        table = np.stack([rows[int(b)] for b in members])
        inside = table[:, 1:]
        kind = "units" if inside.size and cells[inside].all() else "blocks"
        spaces.append(RawSpace(kind, table))
    spaces.sort(key=lambda s: (s.table.shape[1], first[s.table[0, 1]] if s.table.shape[1] > 1 else 0))
    return spaces


def _outer_names(block: int, nested: Labels) -> np.uint64:
    """Return blocks around this one, by name: blocks are exchanged inside the same outer blocks only."""
    outer = nested[nested[:, 1] == block, 0]
    with np.errstate(over="ignore"):
        return np.uint64(mix(outer, salt=_OUTER).sum(dtype=np.uint64)) if len(outer) else np.uint64(0)


def _nested_ranks(nested: Labels, first: Labels) -> list[tuple[int, int, int]]:
    """(outer, inner, rank of the inner block in the outer one)."""
    out = []
    if len(nested):
        order = np.lexsort((first[nested[:, 1]], nested[:, 0]))
        ranks: dict[int, int] = {}
        for outer, sub in nested[order].tolist():
            ranks[outer] = ranks.get(outer, -1) + 1
            out.append((outer, sub, ranks[outer]))
    return out


@dataclass(frozen=True)
class Linearity:
    """How linear everything on a space is.

    Attributes:
        level: the dense group that the structure admits: "O", "GL", or "" for none.
        gammas: leaves that multiply unit by unit: the level holds only where their entries are equal.
        normalized: whether lengths of its vectors are taken, as a normalization does.
        reason: why the level is "".
    """

    level: Dense = ""
    gammas: tuple[int, ...] = ()
    normalized: bool = False
    reason: str = ""
