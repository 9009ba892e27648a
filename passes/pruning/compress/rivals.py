"""Plain pruning beside `compress`: what costs nearly nothing must not be better than what was measured and refitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cipm_ir.errors import CipmError
from cipm_ir.passes.framework.base import Context, PassResult, ignore_progress
from cipm_ir.passes.pruning.compress.sensitivity import Probe
from cipm_ir.passes.pruning.limits import Limits
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.symmetry.program import Program

_CRITERIA = ("magnitude", "activation-variance", "wanda", "obs")
_TIME = 0.95
"""Part of the time after which no more of them is tried."""


@dataclass(frozen=True)
class Rival:
    """A pruned program, what made it, and the divergence of its outputs on samples left out."""

    name: str
    result: PassResult
    divergence: float


def best_rival(
    program: Program, options: dict[str, Any], held: Probe, calibration: Data, limits: Limits, ctx: Context
) -> Rival | None:
    """Return the best of pruning by each criterion, and of the best criterion with compensation.

    Args:
        program: before anything is removed.
        options: of `Prune`, budget included.
        held: what divergence is measured on.
        calibration: samples that criteria and compensation may look at.
        limits: of time; once it is nearly over, no more is tried.
        ctx: of the pass.
    """
    quiet = replace(ctx, data=calibration, progress=ignore_progress)
    plain = list(_pruned(program, [options | {"importance": c} for c in _CRITERIA], held, limits, quiet))
    first = min(plain, key=lambda one: one.divergence, default=None)
    if first is None:
        return None
    again = [options | {"importance": first.name, "compensate": True}]
    return min([first, *_pruned(program, again, held, limits, quiet)], key=lambda one: one.divergence)


def _pruned(
    program: Program, choices: Sequence[dict[str, Any]], held: Probe, limits: Limits, ctx: Context
) -> Iterator[Rival]:
    for options in choices:
        if limits.late(_TIME):
            return
        try:
            result = Prune(**options).run(program, ctx)
            if result.changed:
                name = options["importance"] + (" with compensation" if options.get("compensate") else "")
                yield Rival(name, result, held.whole(result.program))
        except CipmError:  # this criterion or this budget does not suit the model: others may
            continue
