"""Structured pruning: drop the least important hidden units, heads and groups until a budget is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import check_counted, listed, pins, within
from cipm_ir.passes.framework.registry import register
from cipm_ir.passes.pruning.budget.cost import CostModel, Mask
from cipm_ir.passes.pruning.budget.search import Choice, Found, Scores, Search, even, grids_of, link_spaces, make_choice
from cipm_ir.passes.pruning.compress.candidates import kept_elements, kept_numbers, wanted_spaces
from cipm_ir.passes.pruning.importance.criteria import Importance, ScoreFunction, make_importance
from cipm_ir.passes.pruning.limits import Footprint, Limits
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

_BUDGETS = {"macs": "multiply-accumulates", "params": "parameters", "ratio": "units"}
_TIE = 1e-9
"""How far equal scores are drawn apart, in means of a space."""


@register("prune")
@dataclass(frozen=True)
class Prune(Pass):
    """Drop the least important hidden units, heads and groups, down to a budget.

    Rules: (1) every free space of units and of blocks may shrink, to the elements with the largest `importance`;
    (2) under ``global`` ranking scores are divided by the mean of their space and compared across spaces, under
    ``local`` every space keeps the same fraction; (3) unit spaces of sibling blocks keep equal numbers, each its own
    best; (4) the largest model within the budget is taken; (5) with ``compensate`` what reads the removed units is
    refitted first (`compress` also lets the outputs decide how much goes where). Refused: spaces whose rows would be
    uneven are left as they are, and the summary says so. Source: Fang et al. 2023, DepGraph (group magnitude).

    Raises:
        OptionError: contradictory options.
        SymmetryError: the budget is out of reach.
    """

    kind: ClassVar[Kind] = Kind.APPROXIMATE

    macs: float | None = option(None, "fraction of the original multiply-accumulates that may remain", above=0, high=1)
    params: float | None = option(None, "fraction of the original parameters that may remain", above=0, high=1)
    ratio: float | None = option(None, "fraction of the units to remove", low=0, high=1)
    norm: Literal["l1", "l2"] = option("l2", "norm of a group of weights")
    scope: Literal["global", "local"] = option("global", "compare units across spaces, or shrink all spaces alike")
    round_to: int | None = option(
        1, "widths of pruned spaces are multiples of this; none: of what kernels are fast at on this machine", low=1
    )
    include: tuple[str, ...] = option(
        (), "only spaces whose names match; a pattern that matches none stands for tensors that move with them"
    )
    exclude: tuple[str, ...] = option((), "no spaces whose names match; patterns as for include")
    blocks: bool = option(True, "also drop whole heads and groups")
    min_keep: float = option(0.1, "what every space keeps: a fraction below 1, or a number of units", low=0)
    importance: str | Importance | ScoreFunction = option("magnitude", "criterion: a name, or an object with score()")  # noqa: RUF009 — a field
    compensate: bool = option(False, "refit what reads the removed units by least squares on the data")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "got none"
            raise OptionError(f"Pass 'prune' takes exactly one of macs, params and ratio; {what}.")
        make_importance(self.importance, self.norm)

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rank, search, restrict."""
        if self.compensate and ctx.data is None:
            raise OptionError("Pass 'prune': compensate looks at activations; give it calibration inputs (data=, or --data on the command line).")
        costs = CostModel(program, ctx.sizes_of(program))
        cost, budget, original = self._budget(program, ctx, costs)
        choices, notes, remarks = self._choices(program, ctx)
        while True:
            search = Search(program.analysis, choices, cost)
            found = search.run(budget)
            if found.cost > budget:
                raise SymmetryError(self._out_of_reach(program, found, original, [*notes, *remarks]))
            keep = _kept(program, choices, found.levels)
            if not keep:
                why = [within(self._what, found.cost, original, budget), *([] if choices else pins(program)), *notes]
                return PassResult(program, False, "; ".join([*why, *remarks]))
            stays = search.mask(found.levels)
            try:
                made, said = self._applied(program, keep, ctx)
            except SymmetryError as refusal:
                choices = _without_refused(program, choices, found.levels, refusal)
                notes = [*notes, str(refusal)]
                continue
            return self._result(program, made, keep, costs, stays, [*notes, *remarks, *said])

    # ------------------------------------------------------------ budget
    def _budget(self, program: Program, ctx: Context, costs: CostModel) -> tuple[Callable[[Mask], float], float, float]:
        """Return what a mask costs, what it may cost, and what the original costs."""
        original = ctx.original or program
        if self.macs is not None:
            check_counted("prune", costs.counted, "params= or ratio=")
            whole = original.count(ctx.sizes_of(program)).total
            return costs.macs, self.macs * whole, whole
        if self.params is not None:
            return costs.params, self.params * original.parameters, original.parameters
        units = costs.units(np.ones(program.analysis.classes.count, bool))
        return costs.units, (1.0 - (self.ratio or 0.0)) * units + 1e-9, units

    @property
    def _what(self) -> str:
        """What the budget counts."""
        return next(word for name, word in _BUDGETS.items() if getattr(self, name) is not None)

    def _out_of_reach(self, program: Program, found: Found, original: float, notes: Sequence[str]) -> str:
        name = next(n for n in _BUDGETS if getattr(self, n) is not None)
        reached = found.least / max(original, 1)
        asked = getattr(self, name) if name != "ratio" else 1.0 - (self.ratio or 0.0)
        why = "; ".join([*notes, *pins(program)])
        return (
            f"prune cannot come down to {asked:.3g} of the {self._what}: with all spaces that it may touch at their "
            f"minimum, {reached:.3g} remain{f' ({why})' if why else ''}; allow more, or lower min_keep, round_to or "
            "exclude."
        )

    # ------------------------------------------------------------ choices
    def _choices(self, program: Program, ctx: Context) -> tuple[list[Choice], list[str], list[str]]:
        """Return what may be chosen, notes on what may not, and remarks on the scores."""
        analysis = program.analysis
        links = link_spaces(analysis)
        wanted = wanted_spaces(program, "prune", self.include, self.exclude, self.blocks)
        criterion = make_importance(self.importance, self.norm)
        choices, stuck, fixed, equal, hidden, shared = [], [], [], [], [], []
        grids = grids_of(analysis)
        for group in links.groups:
            spaces = [program.spaces[k] for k in group]
            if not all(k in wanted for k in group) or max(s.size for s in spaces) < 2:
                continue
            levels = kept_numbers(spaces, self.min_keep, self.round_to)
            if len(levels) < 2:
                fixed.append(spaces[0].name)
                continue
            if getattr(criterion, "observes", False) and any(program.unseen(s) for s in spaces):
                hidden.append(spaces[0].name)
                continue
            if self.compensate and any(analysis.part_atoms(k) is not None for k in group):
                shared.append(spaces[0].name)
                continue
            scores = [self._score(criterion, program, s, ctx) for s in spaces]
            equal += [space.name for space, score in zip(spaces, scores, strict=True) if np.ptp(score) == 0]
            choice = _untied(make_choice(analysis, group, scores, levels, local=self.scope == "local"))
            if links.frozen.isdisjoint(group) and _fits(program, choice, grids):
                choices.append(choice)
            else:
                stuck.append(spaces[0].name)
        reasons = {
            "rows would become uneven": stuck,
            "min_keep and round_to leave no smaller width": fixed,
            f"bodies use them, and {self._named()} looks at values, which it cannot inside bodies": hidden,
            "what reads one of several query heads that share a key head is not refitted on its own": shared,
        }
        notes = [
            f"left as they are, because {why}: {listed(['@' + n for n in names], 8)}"
            for why, names in reasons.items()
            if names
        ]
        remarks = [*getattr(criterion, "warnings", ())]
        if equal:
            more = f" (and those of {len(equal) - 1} more)" if len(equal) > 1 else ""
            remarks.append(
                f"all units of @{equal[0]}{more} have the same {self._named()}, so which of them went means nothing"
            )
        return choices, notes, remarks

    def _named(self) -> str:
        one = self.importance
        return one if isinstance(one, str) else str(getattr(one, "__name__", type(one).__name__))

    def _score(self, criterion: Importance, program: Program, space: Space, ctx: Context) -> Scores:
        given = np.asarray(criterion.score(program, space, ctx))
        if given.shape != (space.size,) or given.dtype.kind not in "biuf" or not np.isfinite(given).all():
            raise OptionError(
                f"The criterion {self._named()!r} must give {space.size} finite numbers for @{space.name}."
            )
        scores = given.astype(np.float64)
        if self.scope == "global" and scores.min() < 0:
            raise OptionError(
                f"The criterion {self._named()!r} gives negative numbers for @{space.name}, which cannot be compared "
                "with those of other spaces over the mean; give none below zero, or use scope=local."
            )
        mean = float(scores.mean())
        return scores / mean if mean > 0 else scores

    # ------------------------------------------------------------ doing it
    def _applied(self, program: Program, keep: Mapping[Space, Labels], ctx: Context) -> tuple[Program, list[str]]:
        """Return the program without the other units, and what could not be compensated."""
        if not self.compensate or ctx.data is None:
            return program.restrict(keep), []
        stays = program.kept_classes(keep)
        limits = Limits()
        size = Footprint.measure(program.model, ctx.data).batch(limits.memory)
        work = Compensation(ctx.data, size, seed=ctx.seed, limits=limits, progress=ctx.progress)
        done = work.run(program, stays)
        made = done.program
        notes = (
            done.notes
            if done.sums
            else [*done.notes, "nothing was compensated: no product that loses units was refitted"]
        )
        return made.restrict({made.space(space.name): kept for space, kept in keep.items()}), notes

    def _result(
        self,
        before: Program,
        after: Program,
        keep: Mapping[Space, Labels],
        costs: CostModel,
        stays: Mask,
        notes: Sequence[str],
    ) -> PassResult:
        whole = np.ones(len(stays), bool)
        metrics = {
            "macs": [costs.macs(whole), costs.macs(stays)],
            "params": [costs.params(whole), costs.params(stays)],
            "units": [costs.units(whole), costs.units(stays)],
            "widths": {space.name: [space.size, len(kept)] for space, kept in keep.items()},
            "warnings": list(notes),
        }
        shares = {k: metrics[k][1] / max(metrics[k][0], 1) for k in ("macs", "params")}  # type: ignore[index]
        units = metrics["units"]
        summary = (
            f"{units[0] - units[1]} of {units[0]} units in {len(keep)} space{'s' * (len(keep) > 1)} removed; "  # type: ignore[index]
            f"{shares['macs']:.1%} of the multiply-accumulates and {shares['params']:.1%} of the parameters remain"
        )
        return PassResult(
            after,
            True,
            "; ".join([summary, *notes]),
            {"kept": {space.name: kept for space, kept in keep.items()}},
            metrics,
        )


def _untied(choice: Choice) -> Choice:
    """Return the same with a falling curve: elements of equal worth would otherwise all stay, or all go."""
    return replace(choice, curve=choice.curve - _TIE * np.arange(len(choice.curve)) / len(choice.curve))


def _fits(program: Program, choice: Choice, grids: Sequence[Labels]) -> bool:
    """Return whether the lowest level leaves grids that are grids."""
    if not grids:
        return True
    search = Search(program.analysis, [choice], lambda _: 0.0)
    return even(program.analysis, grids, search.mask([0]))


def _kept(program: Program, choices: Sequence[Choice], levels: Sequence[int]) -> dict[Space, Labels]:
    """Kept elements of every space that shrinks, in graph order."""
    return kept_elements(
        program,
        (
            pair
            for choice, level in zip(choices, levels, strict=True)
            for pair in zip(choice.spaces, choice.kept(int(choice.levels[level])), strict=True)
        ),
    )


def _without_refused(
    program: Program, choices: list[Choice], levels: Sequence[int], refusal: SymmetryError
) -> list[Choice]:
    """Return the choices that can be restricted on their own at these levels; what cannot is left alone from now on."""
    good = []
    for choice, level in zip(choices, levels, strict=True):
        keep = _kept(program, [choice], [level])
        try:
            if keep:
                program.restrict(keep)
        except SymmetryError:
            continue
        good.append(choice)
    if len(good) == len(choices):
        raise SymmetryError(f"prune: the chosen sizes do not fit together: {refusal}") from refusal
    return good
