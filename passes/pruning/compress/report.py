"""Numbers and pictures of what `compress` chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cipm_ir.errors import CipmError
from cipm_ir.passes.framework.figures import Bars, Curves, Figure
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.runtime.session import cores
from cipm_ir.runtime.timing import compare_latency, timing_feeds
from cipm_ir.symmetry.program import Program

if TYPE_CHECKING:
    from cipm_ir.passes.pruning.compress.candidates import Candidate
    from cipm_ir.passes.pruning.compress.plan import Made, Plan

_RUNS, _SECONDS = 8, 0.5
"""Turns of each model, and the time after which no more are taken."""
_SHORT = 5e-4
"""Seconds of runs whose times say nothing of the kernels."""
_TURNED = 0.4
"""A part of the multiply-accumulates that are saved, of which time should show at least this much."""
_LINES = 12
"""So many curves in one picture are still told apart."""


def metrics_of(program: Program, plan: Plan, made: Made) -> dict[str, Any]:
    """Costs before and after, widths, predicted divergence, and the measured curves."""
    whole = np.ones(program.analysis.classes.count, bool)
    stays = plan.stays(made.levels)
    costs = plan.costs
    names = names_of(program, plan.candidates)
    metrics: dict[str, Any] = {
        kind: [getattr(costs, kind)(whole), getattr(costs, kind)(stays)]
        for kind in ("macs", "params", "bytes", "units")
    }
    metrics["divergence"] = {"measure": str(plan.probe.divergence), "measured": made.divergence}
    metrics["widths"] = {
        name: [int(c.levels[-1]), int(c.levels[level])]
        for name, c, level in zip(names, plan.candidates, made.levels, strict=True)
    }
    metrics["sensitivity"] = {
        name: {"kept": c.levels.tolist(), "divergence": curve.tolist()}
        for name, c, curve in zip(names, plan.candidates, plan.curves, strict=True)
    }
    return metrics


def latency_of(before: Program, after: Program, data: Data) -> dict[str, list[float]]:
    """Return seconds of a run before and after in onnxruntime, by the number of threads; empty where it has no kernel.

    The smallest of a few runs that take turns, on one sample where the model does not fix its batches.
    """
    made: dict[str, list[float]] = {}
    try:
        feeds = timing_feeds(before.model, data)
        for threads in sorted({1, cores()}):
            models = (before.model, after.model)
            found = compare_latency(models, feeds, threads=threads, runs=_RUNS, seconds=_SECONDS)
            made[f"{threads} thread{'s' * (threads > 1)}"] = list(found.seconds)
    except CipmError:
        return {}
    return made


def latency_in_words(latency: Mapping[str, Sequence[float]], share: float) -> list[str]:
    """Return what the measured latency says, with a warning where time does not follow multiply-accumulates.

    Args:
        latency: of `latency_of`.
        share: the part of the multiply-accumulates that remains.
    """
    if not latency:
        return []
    shares = {threads: after / before for threads, (before, after) in latency.items()}
    said = " and ".join(f"{part:.0%} of the time with {threads}" for threads, part in shares.items())
    words = [f"a run takes {said}"]
    shortest = min(before for before, _ in latency.values())
    if shortest > _SHORT and min(shares.values()) > 1 - _TURNED * (1 - share):
        words.append(
            f"warning: {share:.0%} of the multiply-accumulates take {min(shares.values()):.0%} of the time: other "
            "work decides it, or widths do not suit the kernels; latency= measures, round_to= sets the widths"
        )
    return words


def figures_of(program: Program, plan: Plan, made: Made) -> tuple[Figure, ...]:
    """Widths before and after, and how the divergence grows with what is removed."""
    names = names_of(program, plan.candidates)
    before = [int(c.levels[-1]) for c in plan.candidates]
    after = [int(c.levels[level]) for c, level in zip(plan.candidates, made.levels, strict=True)]
    steepest = sorted(range(len(names)), key=lambda k: -float(plan.curves[k][0]))[:_LINES]
    lines = {
        names[k]: (
            (1 - plan.candidates[k].levels / plan.candidates[k].levels[-1]).tolist(),
            plan.curves[k].tolist(),
        )
        for k in sorted(steepest)
    }
    note = "" if len(names) <= _LINES else f"the {_LINES} most sensitive of {len(names)}"
    return (
        Bars("Units kept per space", names, {"before": before, "after": after}, "units"),
        Curves(
            "Sensitivity: one space shrunk and compensated alone",
            "fraction of units removed",
            str(plan.probe.divergence),
            lines,
            note,
        ),
    )


def names_of(program: Program, candidates: Sequence[Candidate]) -> list[str]:
    """Return a name for each candidate: its first space, and how many others are linked to it."""
    made = []
    for candidate in candidates:
        more = len(candidate.spaces) - 1
        made.append(program.spaces[candidate.spaces[0]].name + (f" (+{more})" if more else ""))
    return made
