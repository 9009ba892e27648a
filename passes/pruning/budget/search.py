"""Which numbers of units may be kept together, and the search for the largest model within a budget.

A reshape into heads, or a grouped convolution, fixes the length of every row: the unit spaces of sibling blocks must
keep equally many units each. Such spaces form one `Choice`, with one number to choose; each space keeps its own best
units. Where rows and columns cross (channel shuffle), all spaces of the grid keep the same number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.components import connected_components
from cipm_ir.ir.labels import Labels
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.primitives.restrict import closed_keep
from cipm_ir.symmetry.primitives.sizes import grid_shape, outer_first

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]
Cost = Callable[[Mask], float]
Tie = tuple[int, int]
_CLOSE = 0.002
"""A budget counts as met when this fraction of it, or less, is left over."""
_ROUNDS = 3
"""How often each choice may be raised by a step once the threshold is found."""


# ---------------------------------------------------------------- links
@dataclass
class Links:
    """Spaces (by index) that keep equal numbers, and spaces whose numbers cannot change; every space is in one link."""

    groups: list[list[int]]
    frozen: set[int]


def link_spaces(analysis: Analysis) -> Links:
    """Return spaces that must keep equally many elements each.

    Because they share grids whose rows stay equally long.
    """
    owner = np.full(analysis.classes.count, -1, np.int64)
    for k, space in enumerate(analysis.spaces):
        if space.kind == "blocks":
            owner[space.table[:, 0]] = k
        elif space.kind == "units":
            owner[space.table] = k
    ties: list[Tie] = []
    frozen: set[int] = set()
    seen: set[bytes] = set()
    partitions: list[dict[int, int]] = []
    for table in _row_tables(analysis):
        rows = np.sort(owner[table], axis=1)
        if (rows == rows[:1]).all():
            continue
        distinct = np.unique(rows, axis=0)
        key = distinct.tobytes()
        if key not in seen:
            seen.add(key)
            counts = [Counter(row) for row in distinct.tolist()]
            ties += _link_rows(counts, analysis, frozen)
            partitions.append(_partition(counts))
    parts = analysis.classes.parts
    shared = [[int(owner[parts.spaces[i][0]]) for i in tie] for tie in parts.ties]
    for together in (*_crossings(partitions), *shared):
        ties += [(together[0], k) for k in together[1:]]
    frozen.update(int(owner[parts.spaces[i][0]]) for i in parts.frozen)
    groups: dict[int, list[int]] = {}
    ends = np.asarray(ties, np.int64).reshape(-1, 2)
    label = connected_components(ends[:, 0], ends[:, 1], len(analysis.spaces))[1].tolist()
    for k, group in enumerate(label):
        groups.setdefault(group, []).append(k)
    return Links(list(groups.values()), {j for k in frozen for j in groups[label[k]]})


def _partition(rows: list[Counter[int]]) -> dict[int, int]:
    """Return which row each space lies in, for those that lie in one."""
    times = Counter(k for row in rows for k in row)
    return {k: r for r, row in enumerate(rows) for k in row if k >= 0 and times[k] == 1}


def _crossings(partitions: list[dict[int, int]]) -> Iterable[list[int]]:
    """Yield spaces on which two partitions cross like rows and columns: neither row decides the other."""
    of_space: dict[int, list[int]] = {}
    for p, partition in enumerate(partitions):
        for k in partition:
            of_space.setdefault(k, []).append(p)
    pairs = {(a, b) for found in of_space.values() for i, a in enumerate(found) for b in found[i + 1 :]}
    for a, b in sorted(pairs):
        common = sorted(partitions[a].keys() & partitions[b].keys())
        cells = {(partitions[a][k], partitions[b][k]) for k in common}
        if len(cells) > max(len({r for r, _ in cells}), len({c for _, c in cells})):
            yield common


def _row_tables(analysis: Analysis) -> Iterable[Labels]:
    """Yield classes in grids whose rows must stay equally long, one row each."""
    of, walk = analysis.classes.of, analysis.walk
    for link in walk.rec.links:
        if len(link.children) > 1:
            yield of[link.children]
    for labels in grids_of(analysis):
        ordered = labels.transpose(outer_first(labels))
        for depth in range(1, labels.ndim):
            yield of[ordered].reshape(int(np.prod(ordered.shape[:depth])), -1)


def grids_of(analysis: Analysis) -> list[Labels]:
    """Label arrays with several axes, each once: of values, and of weights of grouped convolutions."""
    walk = analysis.walk
    found = {id(f.labels): f.labels for s in walk.states.values() for f in s.factors if f.labels.ndim > 1}
    grouped = [np.arange(f.base, f.base + f.size).reshape(f.shape) for f in walk.leaf_factors if f.groups and f.active]
    return [*found.values(), *grouped]


def _link_rows(rows: list[Counter[int]], analysis: Analysis, frozen: set[int]) -> list[Tie]:
    """Return ties of the spaces of all rows: one by one where rows look alike, else all of them to one number."""
    sizes = [len(s.table) for s in analysis.spaces]
    free = [sorted((sizes[k], n, k) for k, n in row.items() if k >= 0) for row in rows]
    alike = all([x[:2] for x in row] == [x[:2] for x in free[0]] for row in free)
    if alike and len({row[-1] for row in rows}) == 1:
        return [(a, b) for row in free for (_, _, a), (_, _, b) in zip(free[0], row, strict=True)]
    spaces = sorted({k for row in free for _, _, k in row})
    # k kept units in every space make rows of k times the occurrences, plus what is fixed: equal rows, or never
    if len({sum(n // sizes[k] for s, n, k in row) for row in free}) > 1 or len({row[-1] for row in rows}) > 1:
        frozen.update(spaces)
    return [(spaces[0], k) for k in spaces[1:]]


# ---------------------------------------------------------------- choices
@dataclass
class Choice:
    """One number to choose: how many elements each of some linked spaces keeps.

    ``ranked[i]``: the classes of space i that are removed with each element, best element first. ``curve``: what the
    next element is worth, not increasing. ``levels``: the numbers allowed, ascending; the last keeps everything.
    """

    spaces: list[int]
    ranked: list[Labels]
    curve: Scores
    levels: Labels
    order: list[Labels] = field(default_factory=list)

    def kept(self, number: int) -> list[Labels]:
        """Kept elements of each space, sorted."""
        return [np.sort(order[:number]) for order in self.order]

    def worth(self, level: int) -> float:
        """Return what the first element above a level is worth."""
        return float(self.curve[self.levels[level]])

    def at(self, threshold: float) -> int:
        """Return which level keeps what is worth at least ``threshold``, rounded down."""
        number = int(np.searchsorted(-self.curve, -threshold, side="right"))
        return max(0, int(np.searchsorted(self.levels, number, side="right")) - 1)


def make_choice(
    analysis: Analysis, spaces: Sequence[int], scores: Sequence[Scores], levels: Labels, *, local: bool
) -> Choice:
    """Rank the elements of linked spaces; ``local`` makes the curve a function of the rank alone."""
    order = [np.argsort(-s, kind="stable") for s in scores]
    ranked = [analysis.spaces[k].table[o] for k, o in zip(spaces, order, strict=True)]
    least, most = min(len(o) for o in order), max(len(o) for o in order)
    if local:
        curve = 1.0 - np.arange(most) / most
    else:
        curve = np.mean([s[o][:least] for s, o in zip(scores, order, strict=True)], axis=0)
        curve = np.concatenate([curve, np.full(most - least, curve[-1])])
    return Choice(list(spaces), ranked, np.asarray(curve, np.float64), levels, order)


def allowed_levels(least: int, most: int, floor: int, round_to: int) -> Labels:
    """Return numbers that may be kept: multiples of ``round_to`` from ``floor`` on, or all.

    ``least`` and ``most``: sizes of the smallest and the largest space of the link.
    """
    first = -(-max(floor, 1) // round_to) * round_to
    levels = np.arange(first, least + 1, round_to, dtype=np.int64)
    return np.append(levels[levels < most], most)


# ---------------------------------------------------------------- search
@dataclass
class Found:
    """A level for each choice, what it costs, and the least that could be reached."""

    levels: list[int]
    cost: float
    least: float


class Search:
    """Finds the largest model whose cost is at most a budget."""

    def __init__(self, analysis: Analysis, choices: list[Choice], cost: Cost) -> None:
        self.analysis = analysis
        self.choices = choices
        self.cost = cost

    def mask(self, levels: Sequence[int]) -> Mask:
        """Return classes that stay, closed under blocks."""
        stays = np.ones(self.analysis.classes.count, bool)
        for choice, level in zip(self.choices, levels, strict=True):
            for ranked in choice.ranked:
                stays[ranked[choice.levels[level] :]] = False
        return np.asarray(closed_keep(self.analysis, stays), bool)

    def run(self, budget: float) -> Found:
        """Bisect on the threshold, then give back single steps while the budget allows."""
        full = [len(c.levels) - 1 for c in self.choices]
        whole = self._price(full)
        if whole <= budget or not self.choices:
            return Found(full, whole, whole)
        lowest = [0] * len(full)
        least = self._price(lowest)
        if least > budget:
            return Found(lowest, least, least)
        worth = np.unique(np.concatenate([c.curve for c in self.choices]))
        best, cost = lowest, least
        lo, hi = 0, len(worth)  # at worth[hi] the budget is met
        while hi - lo > 1:
            middle = (lo + hi) // 2
            levels = [c.at(worth[middle]) for c in self.choices]
            price = self._price(levels)
            if price <= budget:
                hi, best, cost = middle, levels, price
            else:
                lo = middle
        best, cost = self._give_back(best, cost, budget)
        return Found(best, cost, least)

    def _price(self, levels: Sequence[int]) -> float:
        return self.cost(self.mask(levels))

    def _give_back(self, levels: list[int], cost: float, budget: float) -> tuple[list[int], float]:
        """Raise one choice after the other by a step, the most valuable first, while the budget allows."""
        levels = list(levels)
        for _ in range(_ROUNDS):
            before = cost
            open_ = [k for k, c in enumerate(self.choices) if levels[k] + 1 < len(c.levels)]
            for k in sorted(open_, key=lambda k: -self.choices[k].worth(levels[k])):
                if budget - cost <= _CLOSE * budget:
                    return levels, cost
                levels[k] += 1
                price = self._price(levels)
                if price <= budget:
                    cost = price
                else:
                    levels[k] -= 1
            if cost == before:
                break
        return levels, cost


def even(analysis: Analysis, grids: Sequence[Labels], stays: Mask) -> bool:
    """Return whether every grid stays a grid: equally many entries in each row that is left."""
    refined = analysis.classes.stays(stays)
    for labels in grids:
        mask = refined[analysis.classes.refined(labels)]
        if not mask.all() and grid_shape(mask, outer_first(labels)) is None:
            return False
    return True
