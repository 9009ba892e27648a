"""What may shrink: linked spaces, the numbers that they may keep, and which patterns let them through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil

import numpy as np

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.dead.contributions import find_sums
from cipm_ir.passes.exact.dead.liveness import Liveness
from cipm_ir.passes.pruning.budget.search import Mask, allowed_levels, even, grids_of, link_spaces
from cipm_ir.passes.pruning.refit.layers import Layer
from cipm_ir.runtime.intervals.bounds import find_intervals
from cipm_ir.runtime.kernels import channel_block
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.primitives.restrict import closed_keep
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import WeightConsumer, products, readers, weight_uses
from cipm_ir.symmetry.space import Space

_BLOCKS = 4
"""Spaces of at least so many blocks of the kernels keep whole ones."""
_ALIGNED = 4
"""Convolutions of onnxruntime are slow where channels are no multiple of this."""


def wanted_spaces(
    program: Program, name: str, include: tuple[str, ...], exclude: tuple[str, ...], blocks: bool
) -> set[int]:
    """Return spaces that the patterns and ``blocks`` let through; a link with one that is excluded stays as it is.

    Raises:
        OptionError: the message names the pass, for a pattern that matches nothing.
    """
    spaces = program.spaces
    chosen = {k for k, s in enumerate(spaces) if s.kind != "cells" and (blocks or s.kind != "blocks")}
    if include:
        included = _matching(spaces, include, name, "include")
        chosen &= {k for group in link_spaces(program.analysis).groups if included & set(group) for k in group}
    excluded = _matching(spaces, exclude, name, "exclude")
    if excluded:
        table = [program.analysis.spaces[k].table for k in sorted(excluded)]
        classes = np.unique(np.concatenate([t.ravel() for t in table]))
        chosen = {k for k in chosen if not np.isin(program.analysis.spaces[k].table, classes).any()}
    return chosen


def _matching(spaces: Sequence[Space], patterns: Sequence[str], name: str, option_name: str) -> set[int]:
    """Return indices of the spaces whose names match, or else of those with a tensor that does."""
    found: set[int] = set()
    for pattern in patterns:
        hit = {k for k, s in enumerate(spaces) if fnmatchcase(s.name, pattern.removeprefix("@"))}
        if not hit:
            tensors = [{m.rpartition("[")[0] for m in s.members} for s in spaces]
            hit = {k for k, names in enumerate(tensors) if any(fnmatchcase(name, pattern) for name in names)}
        if not hit:
            raise OptionError(
                f"Pass {name!r}: {option_name} pattern {pattern!r} matches no space and no tensor that moves with one."
            )
        found |= hit
    return found


def kept_numbers(spaces: Sequence[Space], min_keep: float, round_to: int | None) -> Labels:
    """Return numbers of elements that linked spaces may keep, ascending; the last is all.

    Args:
        spaces: the linked ones.
        min_keep: the least, as a fraction below 1 or as a number.
        round_to: they are multiples of this; None: of what kernels compute at once, or of a part of it in narrow
            spaces, for which such steps would be too coarse.
    """
    sizes = [s.size for s in spaces]
    if round_to is None:
        round_to = channel_block()
        if max(sizes) < _BLOCKS * round_to:
            round_to = _ALIGNED if max(sizes) >= _BLOCKS * _ALIGNED else 1
    floor = ceil(min_keep * max(sizes)) if min_keep < 1 else int(min_keep)
    return allowed_levels(min(sizes), max(sizes), floor, round_to if spaces[0].kind == "units" else 1)


_FINE = 33
"""About so many levels of a candidate are told apart in the end."""


@dataclass(frozen=True)
class Pair:
    """A space with one weight that makes its units and another that reads them, or two that make the factors of a sum;
    both factors may come from one weight.

    Attributes:
        space: its index.
        first: the product that makes the units; of two factors the one whose mean counts.
        second: what reads them, or makes the other factor.
        left: (units,) their places among the outputs of ``first``.
        right: (units,) their places among the inputs of ``second``, or its outputs.
        chain: whether ``second`` reads the units.
        centred: whether the mean of ``second`` makes no difference.
    """

    space: int
    first: Layer
    second: Layer
    left: Labels
    right: Labels
    chain: bool
    centred: bool = False


@dataclass
class Candidate:
    """Linked spaces, each with what reads it, that keep one number of elements.

    ``levels``: the numbers that are looked at, ascending, the last all; ``kept[level][i]``: sorted elements of space i.
    ``numbers``: those that it may keep. ``order[i]``: the elements of space i, those to go first first. ``measured``:
    which levels divergence is measured at. ``pairs[i]``: what makes space i, if only activations read it; such spaces
    come first.
    """

    spaces: list[int]
    readers: list[list[WeightConsumer]]
    levels: Labels
    numbers: Labels
    kept: list[list[Labels]] = field(default_factory=list)
    order: list[Labels] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    measured: Labels = field(init=False)

    def __post_init__(self) -> None:
        self.measured = np.arange(len(self.levels))

    @property
    def first(self) -> int:
        """The first node that reads a unit, or makes one of a pair."""
        made = [pair.first.reader.node for pair in self.pairs]
        return min([*made, *(r.node for found in self.readers for r in found)])

    def with_steps(self, steps: int) -> Candidate:
        """Return the same, before units are chosen, with at most so many levels below the last."""
        if steps + 1 >= len(self.levels):
            return self
        chosen = np.unique(np.linspace(0, len(self.numbers) - 1, steps + 1).round().astype(int))
        return Candidate(self.spaces, self.readers, self.numbers[chosen], self.numbers, pairs=self.pairs)

    def finer(self) -> Candidate:
        """Return the same with more of the allowed numbers as levels; what they keep lies between what was chosen."""
        chosen = np.unique(np.linspace(0, len(self.numbers) - 1, _FINE).round().astype(int))
        levels = np.union1d(self.numbers[chosen], self.levels)
        made = Candidate(self.spaces, self.readers, levels, self.numbers, [], self.order, self.pairs)
        made.measured = np.searchsorted(levels, self.levels)
        for number in levels.tolist():
            above = int(np.searchsorted(self.levels, number))
            if self.levels[above] == number:
                made.kept.append(self.kept[above])
                continue
            made.kept.append([])
            for low, high, order in zip(self.kept[above - 1], self.kept[above], self.order, strict=True):
                rank = np.argsort(order)
                between = np.setdiff1d(high, low)
                between = between[np.argsort(rank[between])]
                made.kept[-1].append(np.setdiff1d(high, between[: max(0, len(high) - number)]))
        return made


def find_candidates(
    program: Program,
    wanted: set[int],
    min_keep: float,
    round_to: int | None,
    steps: int,
    pairs: Mapping[int, Pair] | None = None,
) -> tuple[list[Candidate], list[str]]:
    """Return spaces that only weights read, so that a removal can be compensated; and why others are left alone.

    ``pairs``: spaces that activations may read too: their units are in the order of what they matter.
    """
    analysis = program.analysis
    links, grids = link_spaces(analysis), grids_of(analysis)
    found = find_intervals(program.model, analysis)
    sums = find_sums(found)
    inner = group_statistics(analysis)
    liveness = apart = Liveness(analysis)
    recurrent = {reader.node for reader in products(program, every=True) if reader.index == 2}
    liveness.read(found, sums, recurrent)
    if inner:
        apart = Liveness(analysis.without_statistics(inner))
        apart.read(found, sums, recurrent)
    candidates: list[Candidate] = []
    notes: list[str] = []
    for group in links.groups:
        spaces = [program.spaces[k] for k in group]
        if not all(k in wanted for k in group) or max(s.size for s in spaces) < 2:
            continue
        numbers = kept_numbers(spaces, min_keep, round_to)
        if len(numbers) < 2:
            continue
        paired = [k for k in group if k in pairs and not pairs[k].chain] if pairs else []
        read = [k for k in group if k not in paired]
        whole = spaces[0].kind == "blocks" and not any(_mixed(analysis, analysis.spaces[k].table, inner) for k in group)
        summed = (apart if whole else liveness).summed
        why = _refusal(program, group, read, links.frozen, summed, numbers, grids)
        if why:
            notes.append(f"@{spaces[0].name}{f' and {len(group) - 1} alike' if len(group) > 1 else ''}: {why}")
            continue
        chosen = np.unique(np.linspace(0, len(numbers) - 1, steps + 1).round().astype(int))
        by_space: list[list[WeightConsumer]] = [[] for _ in paired]
        by_space += [readers(program, program.spaces[k], every=True) for k in read]
        made = [pairs[k] for k in paired] if pairs else []
        candidates.append(Candidate([*paired, *read], by_space, numbers[chosen], numbers, pairs=made))
    return sorted(candidates, key=lambda c: c.first), notes


def group_statistics(analysis: Analysis) -> list[Labels]:
    """Return the classes over which each normalization in groups takes its statistics, (groups, members)."""
    found = []
    for node in analysis.walk.nodes:
        value = node.inputs[0] if node.op_type in ("GroupNormalization", "InstanceNormalization") else None
        state = None if value is None else analysis.walk.states.get(value.name or "")
        for f in () if state is None else state.factors:
            rows = f.labels.shape[0] if f.axes[0] == 1 and len(f.axes) > 1 else 1
            rows = attribute(node, "num_groups", 1) if node.op_type == "GroupNormalization" else rows
            found.append(f.labels.reshape(rows, -1))
    return found


def _mixed(analysis: Analysis, table: Labels, inner: Sequence[Labels]) -> bool:
    """Return whether statistics of a group are taken over several elements of a space."""
    element = np.full(analysis.classes.count, -1)
    element[table] = np.arange(len(table))[:, None]
    owners = [element[analysis.classes.of[labels]] for labels in inner]
    return any((owner != owner[:, :1]).any() for owner in owners)


def _refusal(
    program: Program,
    group: list[int],
    read: list[int],
    frozen: set[int],
    summed: Mask,
    numbers: Labels,
    grids: list[Labels],
) -> str:
    """Return why linked spaces cannot shrink with compensation; empty where they can. ``read``: by weights alone."""
    analysis = program.analysis
    tables = [analysis.spaces[k].table for k in group]
    if any(analysis.part_atoms(k) is not None for k in group):
        return "what reads one of several query heads that share a key head is not refitted on its own"
    hidden = next((why for k in group if (why := program.unseen(program.spaces[k]))), "")
    if hidden:
        return hidden
    if not frozen.isdisjoint(group):
        return "rows would become uneven"
    loop = _recurrent(analysis, tables)
    if loop is not None and loop not in {r.node for k in read for r in _state_readers(program, k)}:
        node = analysis.walk.nodes[loop]
        return f"{node.op_type} {node.name} feeds its units back to itself, and its weights or states cannot be seen"
    if any(summed[t.ravel()].any() for t in tables):
        return "a normalization, softmax or sum runs over its units"
    uses = weight_uses(program)
    try:
        for k in read:
            found = readers(program, program.spaces[k], every=True)
            tied = next((r.weight for r in found if uses[r.weight] > 1), None)
            if tied is not None:
                return f"{tied} is used in several places"
    except SymmetryError as error:
        return str(error).rstrip(".")
    smallest = [np.arange(min(int(numbers[0]), len(t))) for t in tables]
    if grids and not even(analysis, grids, mask_of(program, zip(group, smallest, strict=True))):
        return "rows would become uneven"
    return ""


def _state_readers(program: Program, space: int) -> list[WeightConsumer]:
    """Return the products of recurrent layers with states that are units of a space."""
    try:
        return [r for r in readers(program, program.spaces[space], every=True) if r.index == 2]
    except SymmetryError:
        return []


def _recurrent(analysis: Analysis, tables: Sequence[Labels]) -> int | None:
    """Return the position of the recurrent layer whose state these units are."""
    walk = analysis.walk
    for position in analysis.consumers.nodes(np.concatenate([t.ravel() for t in tables])):
        node = walk.nodes[position]
        state = walk.input_state(position, 2) if node.op_type in ("LSTM", "GRU", "RNN") else None
        for f in () if state is None else state.factors:
            if any(np.isin(t, analysis.classes.of[f.labels]).any() for t in tables):
                return int(position)
    return None


def mask_of(program: Program, kept: Iterable[tuple[int, Labels]]) -> Mask:
    """Return classes that stay, for pairs (space, kept elements); blocks go with their contents."""
    analysis = program.analysis
    stays = np.ones(analysis.classes.count, bool)
    for k, elements in kept:
        table = analysis.spaces[k].table
        stays[np.delete(table, elements, axis=0)[:, 0]] = False
    return closed_keep(analysis, stays)


class LevelMask:
    """The classes that stay with each candidate at a level: updated where levels change, not built again.

    Args:
        program: the program before anything goes.
        candidates: with the elements that they keep at each level.
    """

    def __init__(self, program: Program, candidates: Sequence[Candidate]) -> None:
        self._analysis, self._candidates = program.analysis, candidates
        self._levels = [len(c.levels) - 1 for c in candidates]
        self._times = np.zeros(program.analysis.classes.count, np.int64)
        """How many candidates drop each class."""
        self._dropped: dict[tuple[int, int], Labels] = {}

    def at(self, levels: Sequence[int]) -> Mask:
        """Return the classes that stay at some levels, as `mask_of` does."""
        for k, (old, new) in enumerate(zip(self._levels, levels, strict=True)):
            if old != new:
                self._times[self._drops(k, old)] -= 1
                self._times[self._drops(k, new)] += 1
                self._levels[k] = new
        return closed_keep(self._analysis, self._times == 0)

    def _drops(self, k: int, level: int) -> Labels:
        """Return the classes that a candidate drops at a level; none at the last."""
        if (k, level) not in self._dropped:
            one = self._candidates[k]
            kept = zip(one.spaces, one.kept[level], strict=True) if level + 1 < len(one.levels) else ()
            tables = ((self._analysis.spaces[space].table, elements) for space, elements in kept)
            gone = [np.delete(table[:, 0], elements) for table, elements in tables]
            self._dropped[k, level] = np.unique(np.concatenate([np.zeros(0, np.int64), *gone]))
        return self._dropped[k, level]


def kept_elements(program: Program, kept: Iterable[tuple[int, Labels]]) -> dict[Space, Labels]:
    """Kept elements of each space that shrinks, in graph order, for pairs (space, kept elements)."""
    found = {k: elements for k, elements in kept if len(elements) < program.spaces[k].size}
    return {program.spaces[k]: found[k] for k in sorted(found)}
