"""Prune and compensate: half the cost from a trained model and some inputs, without training and without labels."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from threadpoolctl import threadpool_limits

from cipm_ir.errors import CipmError, OptionError, SymmetryError, VerificationError
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import check_counted, pins
from cipm_ir.passes.framework.registry import register
from cipm_ir.passes.pruning.budget.latency import BLOCK
from cipm_ir.passes.pruning.compress.candidates import find_candidates, kept_elements, wanted_spaces
from cipm_ir.passes.pruning.compress.cost import BUDGETS
from cipm_ir.passes.pruning.compress.held_out import split
from cipm_ir.passes.pruning.compress.plan import Made, Plan, Settings, make_plan
from cipm_ir.passes.pruning.compress.report import figures_of, latency_in_words, latency_of, metrics_of
from cipm_ir.passes.pruning.compress.rivals import Rival, best_rival
from cipm_ir.passes.pruning.compress.search import Evaluate, smallest_within
from cipm_ir.passes.pruning.compress.sensitivity import Probe
from cipm_ir.passes.pruning.limits import Footprint, Limits
from cipm_ir.passes.pruning.refit.bilinear import diagonalize_bases
from cipm_ir.runtime.verification.verify import verify_models
from cipm_ir.symmetry.program import Program

_USEFUL = 0.5
"""Pruning that diverges by more than this is not taken where `compress` alone refuses."""
_SAME = 1e-3
"""The model in which units only lost their readers, and the one without them, differ by rounding: at most this much."""


@register("compress")
@dataclass(frozen=True)
class Compress(Pass):
    """Remove the units, heads and channels that change the outputs least, and refit the weights that consumed them.

    1. Candidates are spaces whose units are consumed by weights alone. Linked spaces keep equal numbers of units.
    2. For several sizes of each candidate, the units to keep are chosen by backward elimination with the optimal brain
       surgeon's cost on the consumers' Gram matrices, and improved by swaps.
    3. Each candidate alone is brought to each size and its consumers are refitted. The rest of the model runs, and the
       divergence of the outputs is measured.
    4. The sizes that minimize the sum of the divergences within the budget are chosen (Lagrange multipliers).
    5. Every product behind the first change is refitted by least squares, in graph order: inputs from the model as
       refitted so far, targets from the original. Targets correct the drift of shortcuts. Two products with only a Relu
       between them are fitted together first, if that helps on held-out samples.
    6. Units that no weight consumes any more are removed. This must not change the outputs; the model is run to check.
    7. Plain pruning by several criteria, and by the best one with compensation, is measured too. The result is the
       model that diverges least on held-out samples (one of eight, if there are 32 or more).

    Left alone, and named in the summary: units under a normalization, softmax or sum over them, and units that are
    consumed by anything else than a Conv, ConvTranspose, Gemm, MatMul or recurrent layer whose weight is used once.
    Sources: He et al. 2017; Hassibi & Stork 1993.

    Raises:
        OptionError: there is no data, or options contradict each other.
        InputError: the data does not fit the model.
        SymmetryError: the budget is out of reach.
    """

    kind: ClassVar[Kind] = Kind.APPROXIMATE

    macs: float | None = option(None, "fraction of the original multiply-accumulates that may remain", above=0, high=1)
    params: float | None = option(None, "fraction of the original parameters that may remain", above=0, high=1)
    bytes: float | None = option(None, "fraction of the original bytes of weights that may remain", above=0, high=1)
    latency: float | None = option(
        None, "fraction of the seconds of a run in onnxruntime, on this machine, that may remain", above=0, high=1
    )
    max_drop: float | None = option(
        None, "instead of a budget: the smallest model whose divergence (or drop of evaluate) is at most this", above=0
    )
    evaluate: Evaluate | None = option(None, "function of run(feeds) -> outputs that gives a score, for max_drop")  # noqa: RUF009 — a field
    divergence: Literal["auto", "kl", "error"] = option(
        "auto", "how outputs are compared: KL divergence of logits, or relative squared error"
    )
    samples: int = option(4096, "calibration samples used at most", low=1)
    probes: int = option(512, "samples on which sensitivity is measured", low=1)
    rounds: int = option(1, "how often sensitivity is measured again around the chosen sizes", low=0)
    steps: int = option(8, "sizes measured per candidate", low=1)
    joint: bool = option(True, "fit producer and consumer of a space together, where only a Relu lies between")
    damping: float = option(1e-4, "how strongly refitted weights are pulled towards their old values", above=0)
    threads: int = option(1, "threads for latency", low=1)
    round_to: int | None = option(
        None,
        "widths of shrunken spaces are multiples of this; none: of what kernels are fast at on this machine",
        low=1,
    )
    include: tuple[str, ...] = option(
        (), "only spaces whose names match; a pattern that matches none stands for tensors that move with them"
    )
    exclude: tuple[str, ...] = option((), "no spaces whose names match; patterns as for include")
    blocks: bool = option(True, "also drop whole heads and groups")
    min_keep: float = option(0.1, "the least that every space keeps: a fraction below 1, or a number of units", low=0)
    plain: bool = option(True, "also try plain pruning by several criteria, and keep its result if that is better")
    memory: float | None = option(
        None, "gigabytes for activations and sums; none: a quarter of the machine's memory", above=0
    )
    time: float | None = option(
        None, "seconds of wall time, after which the rest is pruned without measuring and refitting", above=0
    )
    on_interrupt: Literal["stop", "best"] = option(
        "stop", "best: on SIGINT (Ctrl-C) or SIGTERM, return the best model so far"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in (*BUDGETS, "max_drop") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "got none"
            raise OptionError(f"Pass 'compress' takes exactly one of {', '.join((*BUDGETS, 'max_drop'))}; {what}.")
        if self.evaluate is not None and self.max_drop is None:
            raise OptionError("Pass 'compress': evaluate is asked for a drop; give max_drop too.")

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Look at the data, measure, allocate, compensate, restrict."""
        if ctx.data is None:
            raise OptionError("Pass 'compress' looks at activations; give it calibration inputs (data=, --data).")
        limits = Limits.of(self.memory, self.time)
        # the threads of BLAS would wait for work on the cores that onnxruntime computes on: three times as slow
        with threadpool_limits(1, user_api="blas"), limits.ended_by_signals(self.on_interrupt == "best"):
            return self._timed(program, self._compressed(program, ctx, limits), ctx, limits)

    def _timed(self, program: Program, made: PassResult, ctx: Context, limits: Limits) -> PassResult:
        """Add what was saved in time."""
        if not made.changed or limits.over or ctx.data is None:
            return made
        latency = latency_of(program, made.program, ctx.data)
        before, after = made.metrics["macs"]
        said = latency_in_words(latency, after / max(before, 1))
        return replace(made, summary="; ".join([made.summary, *said]), metrics={**made.metrics, "latency": latency})

    def _compressed(self, program: Program, ctx: Context, limits: Limits) -> PassResult:
        try:
            plan = self._plan(program, ctx, limits)
            if self.max_drop is not None:
                made = smallest_within(plan, self.max_drop, self.evaluate, ctx)
            else:
                made = plan.at(float(getattr(self, self._kind())) * plan.budget.original, ctx)
        except SymmetryError as refusal:
            rival = self._pruned(program, ctx, limits, None)
            if rival is None or not rival.divergence <= _USEFUL:
                raise
            return _plain(rival, f"{str(refusal).rstrip('.')}")
        rival = self._pruned(program, ctx, limits, plan)
        if rival is not None and rival.beats(plan.held.each(made.compensated.program)):
            better = f"better than what the measured sensitivities give, {made.divergence:.3g}"
            return _plain(rival, "; ".join([better, *(note for note in plan.notes if note.startswith("warning"))]))
        return self._result(program, ctx, plan, made)

    def _result(self, program: Program, ctx: Context, plan: Plan, made: Made) -> PassResult:
        keep = kept_elements(program, plan.kept(made.levels))
        if not keep:
            return PassResult(
                program, False, "; ".join(["nothing to remove: the model is within the budget", *plan.notes])
            )
        ctx.progress("restrict", 0.95)
        full = made.compensated.program
        after = full.restrict({full.space(s.name): kept for s, kept in keep.items()})
        _check(full, after, ctx)
        metrics = metrics_of(program, plan, made)
        units = metrics["units"]
        summary = (
            f"{units[0] - units[1]} of {units[0]} units in {len(keep)} space{'s' * (len(keep) > 1)} removed; "
            f"{metrics['macs'][1] / max(metrics['macs'][0], 1):.1%} of the multiply-accumulates and "
            f"{metrics['params'][1] / max(metrics['params'][0], 1):.1%} of the parameters remain"
        )
        witness = {"kept": {space.name: kept for space, kept in keep.items()}}
        figures = figures_of(program, plan, made)
        return PassResult(
            after, True, "; ".join([summary, *plan.notes, *made.notes]), witness, metrics, figures=figures
        )

    def _pruned(self, program: Program, ctx: Context, limits: Limits, plan: Plan | None) -> Rival | None:
        """Return the best that plain pruning makes of the same budget; None where it takes no such budget."""
        if not self.plain or self._kind() not in ("macs", "params") or self.max_drop is not None:
            return None
        assert ctx.data is not None
        shared = ("include", "exclude", "blocks", "min_keep")
        options = {name: getattr(self, name) for name in (self._kind(), *shared)} | {"round_to": self._multiple()}
        if plan is not None:
            return best_rival(program, options, plan.held, plan.compensation.data, limits, ctx)
        try:
            calibration, held = split(ctx.data, program.model, self.samples)
            size = Footprint.measure(program.model, ctx.data).batch(limits.memory)
            probe = Probe.of(
                program, held or ctx.data, size=size, limit=self.probes, damping=self.damping, asked=self.divergence,
                limits=limits,
            )  # fmt: skip
        except CipmError:  # the refusal says more than that the model cannot be run either
            return None
        return best_rival(program, options, probe, calibration, limits, ctx)

    def _plan(self, program: Program, ctx: Context, limits: Limits) -> Plan:
        """Return what is measured before the budget matters: taken from an earlier run of a sweep, where there is one.

        ``ctx.options["plans"]``: a dictionary that the runs share.
        """
        if self.macs is not None:
            check_counted("compress", program.count(ctx.sizes_of(program)), "params=, bytes= or latency=")
        plans = ctx.options.get("plans", {})
        other = (f.name for f in fields(self) if f.name not in (*BUDGETS, "max_drop", "evaluate", "on_interrupt"))
        objects = (id(program), id(ctx.original), id(ctx.data))
        key = (objects, ctx.seed, self._kind(), *(getattr(self, name) for name in other))
        if key not in plans:
            assert ctx.data is not None
            wanted = wanted_spaces(program, "compress", self.include, self.exclude, self.blocks)
            footprint = Footprint.measure(program.model, ctx.data)
            size = footprint.batch(limits.memory)
            program, pairs = diagonalize_bases(program, wanted, ctx.data, size=size, limit=self.samples, seed=ctx.seed)
            candidates, notes = find_candidates(program, wanted, self.min_keep, self._multiple(), self.steps, pairs)
            if not candidates:
                why = [*(notes or [self._no_choice(wanted)]), *pins(program)]
                raise SymmetryError(f"compress finds no units that it may drop: {'; '.join(why)}.")
            settings = Settings(
                self.samples, self.probes, self.rounds, self.steps, self.damping, self.divergence, self.threads,
                self.joint,
            )  # fmt: skip
            plans[key] = make_plan(program, candidates, pairs, notes, settings, self._kind(), ctx, limits, footprint)
        plan: Plan = plans[key]
        plan.limits.start = limits.start
        return plan

    def _no_choice(self, wanted: set[int]) -> str:
        if wanted:
            return "min_keep and round_to leave no choice"
        if self.include or self.exclude or not self.blocks:
            return "include, exclude and blocks leave no free space"
        return "no free spaces"

    def _multiple(self) -> int | None:
        return self.round_to or (BLOCK if self.latency is not None else None)

    def _kind(self) -> str:
        return next((name for name in BUDGETS if getattr(self, name) is not None), "macs")


def _plain(rival: Rival, why: str) -> PassResult:
    """Return what plain pruning made, with the reason."""
    made = rival.result
    told = f"by plain pruning, criterion {rival.name}: divergence {rival.divergence:.3g}, {why}"
    metrics = {**made.metrics, "divergence": {"measured": rival.divergence}, "pruned_by": rival.name}
    return replace(made, summary="; ".join([made.summary, told]), metrics=metrics)


def _check(before: Program, after: Program, ctx: Context) -> None:
    """What nothing reads may go: the outputs say so, or something is wrong with this program."""
    if not ctx.verify:
        return
    found = verify_models(
        before.source_model, after.source_model, data=ctx.data, seed=ctx.seed, rtol=_SAME, atol=1e-6, cases=1
    )
    if found.verified and not found:
        raise VerificationError(
            f"Removing units that nothing reads changed the outputs: {found.reason.rstrip('.')}. This is a defect of "
            "compress; leave out the space with exclude, and please report it."
        )
