"""Folding: hidden units that say the same are merged, and what reads them takes the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.sparse import csr_array

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.members import Floats, Members
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import check_counted, left_alone, pins, within
from cipm_ir.passes.framework.registry import register
from cipm_ir.passes.merging.equal_units import Duplicates, find_duplicates
from cipm_ir.passes.merging.merge import Merge, merge_spaces
from cipm_ir.passes.merging.plan import METHODS, Method, Planner
from cipm_ir.passes.merging.rows import UnitRows, unit_rows
from cipm_ir.passes.pruning.budget.cost import CostModel, Mask
from cipm_ir.passes.pruning.budget.search import (
    Choice,
    Search,
    allowed_levels,
    even,
    grids_of,
    link_spaces,
    make_choice,
)
from cipm_ir.passes.pruning.importance.criteria import Magnitude
from cipm_ir.symmetry.consumers import Incidence
from cipm_ir.symmetry.primitives.restrict import closed_keep
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

_WORDS = {"macs": "multiply-accumulates", "params": "parameters", "ratio": "units"}
_BUDGETS = tuple(_WORDS)


@register("fold")
@dataclass(frozen=True)
class Fold(Pass):
    """Merge hidden units that compute the same, or nearly the same down to a budget; their consumers take the sum.

    1. Without a budget: units whose weight rows agree within ``tolerance``, up to an element of their space's group
       (scales, signs), are brought to one gauge and merged. This is exact.
    2. With a budget, every qualifying space then keeps the same fraction of its units (those of the largest magnitude):
       ``least-squares``: consumers of a removed unit take its best approximation by the kept ones, with moments from
       data or, without data, estimated from the weights. ``k-means``: units with similar weights become their mean, and
       consumers sum. ``correlation``: the same for units that are correlated on data.
    3. The mean of N units has a smaller variance than each of them. The factor N / sqrt(N + (N^2 - N) c), where c is
       their mean similarity, corrects this: on the scale of the batch normalization if there is one, else on the
       columns of the consumers if the group has a positive scale (``least-squares``: one factor for all consumers of
       a space).
    4. Spaces that must stay equally wide (sibling heads) merge equally many units each; each merges units of its own.

    Left alone, and named in the summary: spaces under a normalization or softmax, and spaces that anything but weights
    consumes. Sources: Wang et al., ICLR 2025 (model folding); Stoica et al., ICLR 2024 (ZipIt).

    Raises:
        OptionError: options contradict each other.
        SymmetryError: the budget is out of reach.
    """

    kind: ClassVar[Kind] = Kind.EXACT

    macs: float | None = option(None, "fraction of the original multiply-accumulates that may remain", above=0, high=1)
    params: float | None = option(None, "fraction of the original parameters that may remain", above=0, high=1)
    ratio: float | None = option(None, "fraction of the units that can be merged to remove", low=0, high=1)
    method: Literal["least-squares", "k-means", "correlation"] = option("least-squares", "how a budget is met")
    tolerance: float = option(1e-6, "how far rows of exact duplicates may differ, relative to their norm", low=0)
    correct: bool = option(True, "correct the variance that merging reduces")
    streams: bool = option(False, "with a budget, also merge residual streams, where several values are added up")
    round_to: int = option(1, "with a budget, widths of merged spaces are multiples of this", low=1)
    include: tuple[str, ...] = option((), "only spaces whose names match")
    exclude: tuple[str, ...] = option((), "no spaces whose names match")
    min_keep: float = option(0.1, "the least that every space keeps: a fraction below 1, or a number of units", low=0)
    rounds: int = option(4, "how often exact duplicates are searched for again after some were merged", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"Pass 'fold' takes at most one of macs, params and ratio; got {' and '.join(given)}.")

    @property
    def approximates(self) -> bool:
        """With a budget."""
        return any(getattr(self, name) is not None for name in _BUDGETS)

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Merge duplicates; then, with a budget, what is nearly the same."""
        budget = next((name for name in _BUDGETS if getattr(self, name) is not None), None)
        if budget is not None and METHODS[self.method].needs_data and ctx.data is None:
            raise OptionError(f"Pass 'fold': method {self.method!r} looks at data, but none was given; pass data=.")
        if budget == "macs":
            check_counted("fold", program.count(ctx.sizes_of(program)), "params= or ratio=")
        tally = _Tally(program)
        current = self._duplicates(program, tally, ctx)
        if budget is not None:
            current = self._approximate(current, tally, ctx, budget)
        return tally.result(current)

    # ------------------------------------------------------------ exact
    def _duplicates(self, program: Program, tally: _Tally, ctx: Context) -> Program:
        blocked: set[str] = set()
        number = 0
        while number < self.rounds:
            ctx.progress("duplicates", number / self.rounds)
            chosen, _ = self._readable(program, tally)
            free = {k: rows for k, rows in chosen.items() if rows.space.name not in blocked}
            found = _equally_many(program, {k: find_duplicates(rows, self.tolerance) for k, rows in free.items()})
            if not found:
                break
            elements = {program.spaces[k]: d.element for k, d in found.items() if not d.element.is_identity}
            same = program.act(elements) if elements else program
            made, failed = _all_merged(same, {k: _as_merge(d) for k, d in found.items()})
            for k, why in failed.items():
                blocked.add(program.spaces[k].name)
                tally.refuse(program.spaces[k], why)
            if not failed:
                tally.note_duplicates(program, found)
                program, number = made, number + 1
        return program

    def _readable(self, program: Program, tally: _Tally) -> tuple[dict[int, UnitRows], Members]:
        """Return rows of the spaces whose readers can absorb a mixing."""
        members = Members(program, exact=False)
        out = {}
        for k in sorted(self._wanted(program)):
            space = program.spaces[k]
            if space.kind != "units" or space.size < 2:
                continue
            try:
                out[k] = unit_rows(members, k)
            except SymmetryError as refusal:
                tally.refuse(space, str(refusal))
        return out, members

    def _wanted(self, program: Program) -> set[int]:
        names = [space.name for space in program.spaces]
        chosen = set(range(len(names)))
        if self.include:
            chosen = _matching(names, self.include, "include")
        return chosen - _matching(names, self.exclude, "exclude")

    # ------------------------------------------------------------ down to a budget
    def _approximate(self, program: Program, tally: _Tally, ctx: Context, budget: str) -> Program:
        rows, members = self._readable(program, tally)
        for k in [k for k in rows if program.unseen(program.spaces[k])]:
            tally.refuse(program.spaces[k], program.unseen(program.spaces[k]))
            del rows[k]
        planner = Planner(program, members, METHODS[self.method], ctx, self.correct, self.streams)
        able = planner.able(rows, tally.refuse)
        choices = self._choices(program, able, tally, ctx)
        costs = CostModel(program, ctx.sizes_of(program))
        cost, limit, whole = self._limit(program, choices, ctx, costs, budget)
        while True:
            search = Search(program.analysis, choices, cost)
            found = search.run(limit)
            if found.cost > limit:
                raise SymmetryError(self._out_of_reach(budget, found.least / max(whole, 1), tally))
            numbers = {
                k: int(choice.levels[level])
                for choice, level in zip(choices, found.levels, strict=True)
                for k in choice.spaces
                if choice.levels[level] < program.spaces[k].size
            }
            if not numbers:
                tally.idle = self._idle(program, choices, found.cost, whole, limit, budget)
                return program
            ranks = {k: o for c in choices for k, o in zip(c.spaces, c.order, strict=True)}
            merges = planner.merges({k: able[k] for k in numbers}, numbers, ranks)
            made, failed = _all_merged(program, merges)
            if not failed:
                tally.note_merges(program, merges, self.method)
                tally.warnings += planner.warnings
                return made
            for k, why in failed.items():
                tally.refuse(program.spaces[k], why)
            choices = [c for c in choices if not failed.keys() & set(c.spaces)]

    def _choices(self, program: Program, able: Mapping[int, UnitRows], tally: _Tally, ctx: Context) -> list[Choice]:
        links, criterion, grids = link_spaces(program.analysis), Magnitude(), grids_of(program.analysis)
        choices = []
        for group in links.groups:
            if not all(k in able for k in group):
                continue
            sizes = [program.spaces[k].size for k in group]
            floor = ceil(self.min_keep * max(sizes)) if self.min_keep < 1 else int(self.min_keep)
            levels = allowed_levels(min(sizes), max(sizes), floor, self.round_to)
            if len(levels) < 2:
                tally.refuse(program.spaces[group[0]], "min_keep and round_to leave no smaller width")
                continue
            scores = [criterion.score(program, program.spaces[k], ctx) for k in group]
            choice = make_choice(program.analysis, group, scores, levels, local=True)
            lowest = Search(program.analysis, [choice], lambda _: 0.0).mask([0])
            if links.frozen.isdisjoint(group) and even(program.analysis, grids, lowest):
                choices.append(choice)
            else:
                tally.refuse(program.spaces[group[0]], "rows would become uneven")
        return choices

    def _limit(
        self, program: Program, choices: Sequence[Choice], ctx: Context, costs: CostModel, budget: str
    ) -> tuple[Callable[[Mask], float], float, float]:
        """Return what a mask costs, what it may cost, and what the whole costs."""
        original = ctx.original or program
        if budget == "macs":
            whole = original.count(ctx.sizes_of(program)).total
            return costs.macs, (self.macs or 0.0) * whole, whole
        if budget == "params":
            return costs.params, (self.params or 0.0) * original.parameters, original.parameters
        tables = [program.analysis.spaces[k].table[:, 0] for choice in choices for k in choice.spaces]
        classes = np.concatenate([np.zeros(0, np.int64), *tables])
        limit = (1.0 - (self.ratio or 0.0)) * len(classes) + 1e-9
        return lambda stays: float(stays[classes].sum()), limit, len(classes)

    def _out_of_reach(self, budget: str, least: float, tally: _Tally) -> str:
        asked = getattr(self, budget) if budget != "ratio" else 1.0 - (self.ratio or 0.0)
        what = _WORDS[budget]
        why = "; ".join(x for x in (left_alone(tally.refused), *pins(tally.program)) if x)
        return (
            f"fold cannot come down to {asked:.3g} of the {what}: with all spaces that it may merge at their minimum, "
            f"{least:.3g} remain{f' ({why})' if why else ''}; allow more, or lower min_keep or round_to."
        )

    def _idle(
        self, program: Program, choices: Sequence[Choice], cost: float, whole: float, limit: float, budget: str
    ) -> str:
        """Return why nothing is merged for the budget."""
        if not choices and budget == "ratio":
            return "; ".join(["no space can be merged", *pins(program)])
        return within(_WORDS[budget], cost, whole, limit)


def _all_merged(program: Program, merges: Mapping[int, Merge]) -> tuple[Program, dict[int, str]]:
    """Return all merges together, or why some of them cannot be."""
    try:
        return merge_spaces(program, merges), {}
    except SymmetryError as refusal:
        together = str(refusal)
    failed = {}
    for k, merge in merges.items():
        try:
            merge_spaces(program, {k: merge})
        except SymmetryError as refusal:
            failed[k] = str(refusal)
    return program, failed or dict.fromkeys(merges, together)


def _matching(names: Sequence[str], patterns: Sequence[str], option_name: str) -> set[int]:
    """Return spaces whose names match.

    Raises:
        OptionError: a pattern that matches none.
    """
    found: set[int] = set()
    for pattern in patterns:
        hit = {k for k, name in enumerate(names) if fnmatchcase(name, pattern.removeprefix("@"))}
        if not hit:
            raise OptionError(f"Pass 'fold': {option_name} pattern {pattern!r} matches no space.")
        found |= hit
    return found


def _as_merge(found: Duplicates) -> Merge:
    kept = np.flatnonzero(found.leader == np.arange(len(found.leader)))
    return Merge(kept, (found.leader[:, None] == kept).astype(np.uint8))


def _equally_many(program: Program, found: Mapping[int, Duplicates]) -> dict[int, Duplicates]:
    """Of linked spaces as many duplicates as all of them have; only what keeps rows equally long."""
    analysis = program.analysis
    links, grids, classes = link_spaces(analysis), grids_of(analysis), analysis.classes
    crossed = Incidence.of(classes.refined(labels) for labels in grids)
    stays = np.ones(classes.count, bool)
    out: dict[int, Duplicates] = {}
    for group in links.groups:
        if not links.frozen.isdisjoint(group):
            continue
        extra = {k: found[k].extra if k in found else np.zeros(0, np.int64) for k in group}
        number = min(len(e) for e in extra.values())
        if not number:
            continue
        part = {k: found[k].only(e[len(e) - number :]) for k, e in extra.items()}
        trial = stays.copy()
        for k, one in part.items():
            trial[analysis.spaces[k].table[one.extra]] = False
        trial = closed_keep(analysis, trial)
        changed = np.flatnonzero(classes.stays(stays) != classes.stays(trial))
        if even(analysis, [grids[k] for k in crossed.holding(changed)], trial):
            stays = trial
            out.update(part)
    return out


# ---------------------------------------------------------------- what was done
@dataclass(frozen=True, eq=False)
class _Dense(Mapping[str, Floats]):
    """Arrays that are made when they are asked for: of wide spaces they would be larger than the weights."""

    sparse: Mapping[str, csr_array]

    def __getitem__(self, name: str) -> Floats:
        return np.asarray(self.sparse[name].toarray(), np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sparse)

    def __len__(self) -> int:
        return len(self.sparse)


@dataclass
class _Tally:
    """Kept units, and what stands for the others, in the labels of the program that came in."""

    program: Program
    kept: dict[str, Labels] = field(default_factory=dict)
    mixing: dict[str, csr_array] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    merged: int = 0
    method: str = ""
    warnings: list[str] = field(default_factory=list)
    idle: str = ""
    """Why the budget asked for nothing."""

    def refuse(self, space: Space, why: str) -> None:
        """Note why a space stays as it is."""
        self.refused.setdefault(space.name, why)

    def note_duplicates(self, program: Program, found: Mapping[int, Duplicates]) -> None:
        """Account for exact merges: a unit is its leader, divided by what its own element multiplied it by."""
        for k, d in found.items():
            element = d.element
            size = np.prod(element.scale, axis=0) * np.prod(element.sign, axis=0)
            merge = _as_merge(d)
            mixing = csr_array(merge.mixing).astype(np.float64)
            mixing.data /= np.repeat(size, np.diff(mixing.indptr))
            self._note(program.spaces[k], merge.kept, mixing)
            self.duplicates += len(d.extra)

    def note_merges(self, program: Program, merges: Mapping[int, Merge], method: Method) -> None:
        """Account for approximate merges."""
        self.method = method
        for k, merge in merges.items():
            self._note(program.spaces[k], merge.kept, csr_array(merge.mixing))
            self.merged += program.spaces[k].size - len(merge.kept)

    def _note(self, space: Space, kept: Labels, mixing: csr_array) -> None:
        before = self.kept.get(space.name, np.arange(space.size))
        earlier = self.mixing.get(space.name)
        self.kept[space.name] = before[kept]
        self.mixing[space.name] = mixing if earlier is None else csr_array(earlier @ mixing)

    def result(self, program: Program) -> PassResult:
        """Summary, witness and numbers."""
        sizes = {space.name: space.size for space in self.program.spaces}
        metrics: dict[str, Any] = {
            "duplicates": self.duplicates, "merged": self.merged, "method": self.method,
            "widths": {name: [sizes[name], len(kept)] for name, kept in self.kept.items()}, "refused": self.refused,
            "warnings": self.warnings,
        }  # fmt: skip
        parts = [
            f"{count} {what}"
            for count, what in (
                (self.duplicates, "duplicate" + "s" * (self.duplicates > 1)),
                (self.merged, f"by {self.method}"),
            )
            if count
        ]
        where = f"in {len(self.kept)} space{'s' * (len(self.kept) > 1)}"
        summary = f"units merged: {', '.join(parts)}, {where}" if parts else "nothing to merge"
        summary = "; ".join(part for part in (summary, self.idle, *self.warnings, left_alone(self.refused)) if part)
        if not parts:
            return PassResult(self.program, False, summary, metrics=metrics)
        kind = Kind.APPROXIMATE if self.merged else Kind.EXACT
        witness = {"kept": self.kept, "mixing": _Dense(self.mixing)}
        return PassResult(program, True, summary, witness, metrics, kind)
