"""What `compress` measures before the budget matters, and what it makes of it for each budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.framework.base import Context, Progress
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.search import Mask
from cipm_ir.passes.pruning.compress.allocation import Allocation, Levels, allocate, fill
from cipm_ir.passes.pruning.compress.candidates import Candidate, LevelMask, Pair
from cipm_ir.passes.pruning.compress.cost import Budget, make_budget
from cipm_ir.passes.pruning.compress.held_out import split
from cipm_ir.passes.pruning.compress.sensitivity import Curve, Probe, choose_units, gather
from cipm_ir.passes.pruning.limits import Effort, Footprint, Limits
from cipm_ir.passes.pruning.refit.bilinear import outputs_to_zero
from cipm_ir.passes.pruning.refit.compensation import ROWS, Compensated, Compensation
from cipm_ir.passes.pruning.refit.layers import Layer, layers_of
from cipm_ir.runtime.activations.linear_geometry import NormalEquations
from cipm_ir.runtime.activations.observe import count_samples, samples
from cipm_ir.runtime.inputs.generate import Feeds, batches
from cipm_ir.symmetry.program import Program

_STILL = 1e-10
"""An input whose variance is at most this share of its mean square is constant up to rounding."""
_TRIED, _PART = 512, 4
"""Levels are compared after compensation on a part of the samples, but not on fewer than that."""
_TINY = 1e-6
_LAST_ROUND = 0.6
"""Part of the time after which sensitivity is not measured again."""
_NAMED = 4
"""So many weights are named in a warning."""


@dataclass(frozen=True)
class Settings:
    """Options of `compress` that say how to measure; see there."""

    samples: int
    probes: int
    rounds: int
    steps: int
    damping: float
    divergence: str
    threads: int
    joint: bool = True


@dataclass
class Plan:
    """All that was measured: from here on, each budget costs one compensation."""

    program: Program
    candidates: list[Candidate]
    probe: Probe
    curves: list[Curve]
    costs: CostModel
    budget: Budget
    compensation: Compensation
    settings: Settings
    notes: list[str]
    limits: Limits
    held: Probe
    """The outputs of the original on samples left out, or on those of ``probe`` where there are few."""
    again: bool
    """Whether there is time to measure sensitivity again."""
    _mask: LevelMask = field(init=False, repr=False)
    _prices: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._mask = LevelMask(self.program, self.candidates)

    def price(self, levels: Levels) -> float:
        """Cost of levels, in the units of the budget."""
        key = (id(self.budget), *levels)
        if key not in self._prices:
            self._prices[key] = self.budget.price(levels, self.stays(levels))
        return self._prices[key]

    def stays(self, levels: Sequence[int]) -> Mask:
        """Return classes that stay."""
        return self._mask.at(levels)

    def kept(self, levels: Sequence[int]) -> Iterator[tuple[int, Labels]]:
        """Yield spaces that shrink, and their elements that are kept."""
        for candidate, level in zip(self.candidates, levels, strict=True):
            if level + 1 < len(candidate.levels):
                yield from zip(candidate.spaces, candidate.kept[level], strict=True)

    def allocation(self, target: float, curves: Sequence[Curve] | None = None) -> Allocation:
        """Return levels for a budget.

        Raises:
            SymmetryError: it is out of reach.
        """
        fine = curves or self.curves
        places = [c.measured.tolist() for c in self.candidates]
        found = allocate(
            [curve[at] for curve, at in zip(fine, places, strict=True)],
            lambda levels: self.price([at[k] for at, k in zip(places, levels, strict=True)]),
            target,
        )
        if found is None:
            least = self.price([0] * len(self.candidates)) / self.budget.original
            why = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise SymmetryError(
                f"compress cannot come down to {target / self.budget.original:.3g} of the {self.budget.what}: with all "
                f"spaces that it may touch at their minimum, {least:.3g} remain{why}; allow more, or lower min_keep, "
                "round_to or exclude."
            )
        levels = [at[k] for at, k in zip(places, found.levels, strict=True)]
        return fill(fine, self.price, target, levels)

    def at(self, target: float, ctx: Context) -> Made:
        """Return the compensated program for a budget, at full shapes.

        Measured again around the choice while that helps.
        """
        ctx.progress("allocate", 0.5)
        levels, cost, notes = self.budget.settle(self, target, None)
        best: tuple[float, Compensated] | None = None
        for number in range(self.settings.rounds if self.again else 0):
            if self.limits.spent(_LAST_ROUND):
                break
            low, high = (0.5 + 0.2 * (number + k) / self.settings.rounds for k in (0, 1))
            if best is None:
                best = self._tried(levels, share(ctx, low, (low + high) / 2))
            again = self.probe.around(
                best[1], self.candidates, levels, self.curves, self.stays, share(ctx, (low + high) / 2, high)
            )
            others = self.budget.settle(self, target, again)
            if others[0] == levels:
                break
            trial = self._tried(others[0], share(ctx, high, high))
            if trial[0] >= best[0]:
                break
            best, (levels, cost, notes) = trial, others
        self.compensation.progress = share(ctx, 0.7, 0.95)
        compensated = self.compensation.run(self.program, self.stays(levels))
        divergence = self.held.whole(compensated.program)
        if best is not None and self.limits.over:  # the last fit was cut short
            early = self.held.whole(best[1].program)
            if early < divergence:
                compensated, divergence = best[1], early
        return Made(compensated, levels, cost, divergence, [*notes, *compensated.notes])

    def _tried(self, levels: Levels, progress: Progress) -> tuple[float, Compensated]:
        """Return the divergence of levels, and the program.

        Compensated on a part of the samples, enough to compare levels.
        """
        limit = max(_TRIED, self.settings.samples // _PART)
        rows = self.compensation.rows // _PART
        few = replace(
            self.compensation, limit=min(limit, self.settings.samples), rows=rows, joint=False, progress=progress
        )
        made = few.run(self.program, self.stays(levels))
        return self.held.whole(made.program), made


@dataclass
class Made:
    """A compensated program at full shapes, the levels, their cost, and the divergence of its outputs, measured."""

    compensated: Compensated
    levels: Levels
    cost: float
    divergence: float
    notes: list[str]


def make_plan(
    program: Program,
    candidates: list[Candidate],
    pairs: Mapping[int, Pair],
    notes: list[str],
    settings: Settings,
    kind: str,
    ctx: Context,
    limits: Limits,
    footprint: Footprint,
) -> Plan:
    """Look at the data, choose units for each level, measure how sensitive the outputs are.

    Raises:
        InputError: data that does not fit; as `LatencyTable.measure` for a budget of seconds.
    """
    assert ctx.data is not None
    samples, damping = settings.samples, settings.damping
    size = footprint.batch(limits.memory)
    count = count_samples(program.model, ctx.data, size, samples)
    samples = limits.samples(footprint, count)
    if samples < count:
        notes = [*notes, f"{samples} of {count} samples were looked at, for the time: allow more with time="]
    data, left_out = split(ctx.data, program.model, samples)
    count = count_samples(program.model, data, size, samples)
    firsts = [c.first for c in candidates]
    effort = limits.effort(footprint, firsts, min(settings.probes, count), settings.steps)
    candidates = [c.with_steps(effort.steps) for c in candidates]
    limits.fit_rows([(x.linear.size, x.linear.width) for x in layers_of(program)], 2 + settings.rounds, ROWS)
    ctx.progress(f"{estimate(limits, footprint, effort, count, size)}", 0.0)
    grams = gather(
        program, candidates, data, size=size, limit=samples, count=count, seed=ctx.seed, limits=limits,
        progress=share(ctx, 0.0, 0.1),
    )  # fmt: skip
    choose_units(program, candidates, grams, damping, share(ctx, 0.1, 0.15))
    asked = settings.divergence
    probe = Probe.of(program, data, size=size, limit=effort.probes, damping=damping, asked=asked, limits=limits)
    held = probe
    if left_out is not None:
        held = Probe.of(program, left_out, size=size, limit=samples, damping=damping, asked=asked, limits=limits)
    coarse = probe.curves(candidates, grams, share(ctx, 0.15, 0.45))
    fine = [c.finer() for c in candidates]
    curves = [between(f.levels, c.levels, curve) for f, c, curve in zip(fine, candidates, coarse, strict=True)]
    candidates = fine
    costs = CostModel(program, ctx.sizes_of(program))
    budget = make_budget(kind, program, candidates, costs, ctx, settings.threads, share(ctx, 0.45, 0.5))
    mute = partial(outputs_to_zero, program, pairs)
    compensation = Compensation(
        data,
        size,
        samples,
        limits=limits,
        damping=damping,
        seed=ctx.seed,
        logits=probe.divergence.logits,
        mute=mute,
        joint=settings.joint,
    )
    warnings = [*notes, *_alike(batches(probe.data, program.model, size), count), *_still(grams.values())]
    warnings += _few(grams.values(), count)
    if probe.estimated:
        warnings.append(f"the time was over before the sensitivity of {probe.estimated} candidates was measured")
    return Plan(
        program, candidates, probe, curves, costs, budget, compensation, settings, warnings, limits, held, effort.again
    )


def estimate(limits: Limits, footprint: Footprint, effort: Effort, count: int, size: int) -> str:
    """Return in words what the work will take, about."""
    seconds = 2 * effort.seconds + 8 * count * footprint.seconds + limits.fitting
    memory = size * footprint.whole + 3 * min(limits.cached, count * footprint.alive) + 8 * limits.entries
    bound = "" if limits.seconds is None else f" of {limits.seconds:.0f} s allowed"
    return f"estimate: {seconds:.0f} s{bound}, at most {min(memory, limits.memory) / 1e9:.1f} GB of memory"


def between(levels: Labels, measured: Labels, curve: Curve) -> Curve:
    """Divergences at levels between those measured.

    They grow by factors, and about with the square of what is removed.
    """
    safe = np.log(np.maximum(curve[:-1], max(float(curve[0]) * _TINY, 1e-300)))
    made = np.exp(np.interp(levels, measured[:-1], safe))
    last, all_of = int(measured[-2]), int(measured[-1])
    made = np.where(levels > last, curve[-2] * np.square((all_of - levels) / (all_of - last)), made)
    return np.asarray(
        np.minimum.accumulate(np.where(np.isin(levels, measured), np.interp(levels, measured, curve), made))
    )


def share(ctx: Context, low: float, high: float) -> Progress:
    """Progress of a part of the work."""

    def show(what: str, fraction: float | None) -> None:
        ctx.progress(what, low + (high - low) * (fraction or 0.0))

    return show


def _alike(data: Iterable[Feeds], count: int) -> list[str]:
    """Return a warning where every sample is the same: whatever units do elsewhere, on it a few of them are enough."""
    first: Feeds = {}
    seen = 0
    for feeds in data:
        first = first or {name: a[:1] if a.ndim else a for name, a in feeds.items()}
        if any(a.shape[1:] != first[name].shape[1:] or (a != first[name]).any() for name, a in feeds.items()):
            return []
        seen += samples(feeds)
    if seen < min(count, 2):
        return []
    what = "there is only one sample" if seen == 1 else f"all {seen} samples that were compared are equal"
    return [f"warning: {what}, so units that other inputs need look useless; give typical, different inputs"]


def _still(grams: Iterable[tuple[Layer, NormalEquations]]) -> list[str]:
    """Return a warning that names readers most of whose inputs never change.

    Which therefore look as if they could go.
    """
    found, worst = [], 0.0
    for layer, sums in grams:
        variance = np.diagonal(sums.gram(centred=True))
        moment = variance + np.square(sums.x / max(sums.rows, 1))
        taps = layer.linear.rows_of(np.arange(layer.linear.shape[layer.linear.axis])[:, None])
        # the tap that the padding reaches least: in the others a constant looks as if it changed at the border
        chosen = np.take_along_axis(taps, moment[taps].argmax(axis=1)[:, None], axis=1)[:, 0]
        share = float((variance[chosen] <= _STILL * moment[chosen]).mean())
        if share > 0.5:
            found.append(layer.reader.weight)
            worst = max(worst, share)
    if not found:
        return []
    more = f" and {len(found) - _NAMED} others" if len(found) > _NAMED else ""
    return [
        f"warning: up to {worst:.0%} of the inputs of {', '.join(found[:_NAMED])}{more} have no variance over the "
        "data, so they look useless; give typical, different inputs"
    ]


def _few(grams: Iterable[tuple[Layer, NormalEquations]], count: int) -> list[str]:
    """Return a warning where there are fewer rows than unknowns."""
    worst = max(grams, key=lambda pair: pair[0].linear.size / max(pair[1].rows, 1), default=None)
    if worst is None or worst[1].rows >= 2 * worst[0].linear.size:
        return []
    layer, sums = worst
    return [
        f"warning: {count} sample{'s give' if count > 1 else ' gives'} {sums.rows} "
        f"row{'s' * (sums.rows > 1)} for the {layer.linear.size} inputs of {layer.reader.weight} "
        f"(rank at most {min(sums.rows, layer.linear.size)}): refitting leans on damping; give more data"
    ]
