"""The smallest model that is still good enough: a search over budgets, each one compensated and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.passes.allocation import Allocation
from cipm_ir.passes.base import Context
from cipm_ir.runtime.observe import observe
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program

if TYPE_CHECKING:
    from cipm_ir.passes.compress import Plan

Array = npt.NDArray[Any]
Run: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a model once: arrays by input name in, arrays by output name out."""
Evaluate: TypeAlias = Callable[[Run], float]
"""A user's score of a model, the larger the better, from what it gives out."""
_STEPS = 6
"""Halvings of the range of budgets: the size is found to within about 1.5% of the original."""

Made: TypeAlias = tuple[Program, Allocation, list[str]]


def smallest_within(plan: Plan, max_drop: float, evaluate: Evaluate | None, ctx: Context) -> Made:
    """The smallest model whose divergence from the original, or whose drop of a score, is at most ``max_drop``.

    The divergence is measured after compensation, on the data. Gives what `Plan.at` gives.

    Errors: `OptionError` where the score is no finite number; `SymmetryError` where even the least step drops more.
    """
    drop = _Drop(plan, evaluate, ctx)
    low, high = plan.price([0] * len(plan.candidates)), plan.budget.original
    best: Made | None = None
    for step in range(_STEPS):
        target = low if step == 0 else (low + high) / 2
        made = plan.at(target, ctx)
        seen = drop(made[0])
        if seen <= max_drop:
            high, best = target, (made[0], made[1], [f"{drop.what} {seen:.4g}, at most {max_drop:.4g} asked"])
            if step == 0:
                break
        else:
            low = target
    if best is None:
        raise SymmetryError(
            f"compress finds no smaller model within max_drop {max_drop:.4g}: already "
            f"{low / plan.budget.original:.1%} of the {plan.budget.what} drop {seen:.4g}; allow more, or give more data."
        )
    return best


class _Drop:
    """How much worse a program is than the original."""

    def __init__(self, plan: Plan, evaluate: Evaluate | None, ctx: Context) -> None:
        self.plan, self.evaluate, self.ctx = plan, evaluate, ctx
        self.what = "divergence" if evaluate is None else "drop of the score"
        self.score = 0.0 if evaluate is None else self._scored(plan.program)
        self.names = list(plan.sensitivity.divergence.measures)
        self.dense = self._outputs(plan.program) if evaluate is None else []

    def __call__(self, program: Program) -> float:
        if self.evaluate is not None:
            return self.score - self._scored(program)
        divergence = self.plan.sensitivity.divergence
        pairs = zip(self.dense, self._outputs(program), strict=True)
        return divergence.total([divergence.batch(a, b) for a, b in pairs])

    def _outputs(self, program: Program) -> list[dict[str, Array]]:
        assert self.ctx.data is not None
        limit = self.plan.compensation.limit
        return [dict(out) for _, out in observe(program.model, self.names, self.ctx.data, limit=limit)]

    def _scored(self, program: Program) -> float:
        assert self.evaluate is not None
        with Runner(program.model, fast=True) as runner:
            score = self.evaluate(lambda feeds: runner.run(feeds))
        if not isinstance(score, int | float | np.number) or not np.isfinite(score):
            raise OptionError(f"Pass 'compress': evaluate must give a finite number, and gave {score!r}.")
        return float(score)
