"""The smallest model that is still good enough: a search over budgets, each one compensated and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.passes.framework.base import Context
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program

if TYPE_CHECKING:
    from cipm_ir.passes.pruning.compress.plan import Made, Plan

Array = npt.NDArray[Any]
Run: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a model once: arrays by input name in, arrays by output name out."""
Evaluate: TypeAlias = Callable[[Run], float]
"""A user's score of a model, the larger the better, from what it gives out."""
_STEPS = 6
"""Halvings of the range of budgets: the size is found to within about 1.5% of the original."""


def smallest_within(plan: Plan, max_drop: float, evaluate: Evaluate | None, ctx: Context) -> Made:
    """Return the smallest model whose divergence from the original, or whose drop of a score, is at most ``max_drop``.

    The divergence is measured after compensation, on the samples on which sensitivity is. Gives what `Plan.at` gives.

    Raises:
        OptionError: the score is no finite number.
        SymmetryError: even the least step drops more.
    """
    score = None if evaluate is None else _scored(plan.program, evaluate)
    what = "divergence" if score is None else "drop of the score"
    low, high = plan.price([0] * len(plan.candidates)), plan.budget.original
    best: Made | None = None
    for step in range(_STEPS):
        target = low if step == 0 else (low + high) / 2
        made = plan.at(target, ctx)
        if evaluate is None or score is None:
            seen = made.divergence
        else:
            seen = score - _scored(made.compensated.program, evaluate)
        if seen <= max_drop:
            made.notes.append(f"{what} {seen:.4g}, at most {max_drop:.4g} asked")
            high, best = target, made
            if step == 0:
                break
        else:
            low = target
    if best is None:
        raise SymmetryError(
            f"compress finds no smaller model within max_drop {max_drop:.4g}: already with "
            f"{low / plan.budget.original:.1%} of the {plan.budget.what} the {what} is {seen:.4g}; "
            "allow more, or give more data."
        )
    return best


def _scored(program: Program, evaluate: Evaluate) -> float:
    with Runner(program.model, fast=True) as runner:
        score = evaluate(lambda feeds: runner.run(feeds))
    number = _number(score)
    if not np.isfinite(number):
        raise OptionError(f"Pass 'compress': evaluate must give a finite number, and gave {score!r}.")
    return number


def _number(score: object) -> float:
    """Return what a number, or an array or tensor of one, holds; NaN for anything else."""
    if not hasattr(score, "__float__") or math.prod(getattr(score, "shape", ())) != 1:
        return float("nan")
    return float(score.item() if hasattr(score, "item") else score)
