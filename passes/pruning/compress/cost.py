"""What a budget of `compress` counts: multiply-accumulates, parameters, bytes, or seconds in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError
from cipm_ir.passes.framework.base import Context, Progress
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.latency import LatencyTable, fit_to_budget
from cipm_ir.passes.pruning.budget.search import Choice, Mask
from cipm_ir.passes.pruning.compress.allocation import Allocation, Levels
from cipm_ir.passes.pruning.compress.candidates import Candidate
from cipm_ir.runtime.timing import timing_feeds
from cipm_ir.symmetry.program import Program

Curve: TypeAlias = npt.NDArray[np.float64]
Settled: TypeAlias = tuple[Levels, float, list[str]]
BUDGETS = ("macs", "params", "bytes", "latency")
_WORDS = {"macs": "multiply-accumulates", "params": "parameters", "bytes": "bytes of weights", "latency": "seconds"}


class Allocator(Protocol):
    """What a budget asks of a plan."""

    def allocation(self, target: float, curves: Sequence[Curve] | None = None) -> Allocation:
        """Return the cheapest levels for a target."""


class Budget(Protocol):
    """``original``: the cost of the first program of the pipeline; ``what``: a word for it."""

    what: str
    original: float

    def price(self, levels: Levels, stays: Mask) -> float:
        """Cost with each candidate at its level."""

    def settle(self, plan: Allocator, target: float, curves: Sequence[Curve] | None) -> Settled:
        """Return levels for a target, their cost, and notes; ``curves`` None: as they were measured first."""


@dataclass
class Counted:
    """Costs that are counted."""

    kind: str
    what: str
    original: float
    costs: CostModel

    def price(self, levels: Levels, stays: Mask) -> float:
        """Cost with each candidate at its level."""
        count = {"macs": self.costs.macs, "params": self.costs.params, "bytes": self.costs.bytes}[self.kind]
        return float(count(stays))

    def settle(self, plan: Allocator, target: float, curves: Sequence[Curve] | None) -> Settled:
        """Return the allocation for a target."""
        found = plan.allocation(target, curves)
        return found.levels, found.cost, []


@dataclass
class Seconds:
    """Seconds of one batch in onnxruntime: estimated from a table, settled by measuring."""

    what: str
    original: float
    table: LatencyTable

    def price(self, levels: Levels, stays: Mask) -> float:
        """Estimated seconds with each candidate at its level."""
        return self.table.seconds(levels)

    def settle(self, plan: Allocator, target: float, curves: Sequence[Curve] | None) -> Settled:
        """Return the allocation for a target, put right by measuring."""
        levels, seconds = fit_to_budget(self.table, lambda t: plan.allocation(t, curves).levels, target)
        return list(levels), seconds, [f"measured {seconds / self.table.full:.1%} of the seconds ({self.table.how})"]


def make_budget(
    kind: str,
    program: Program,
    candidates: Sequence[Candidate],
    costs: CostModel,
    ctx: Context,
    threads: int,
    progress: Progress,
) -> Budget:
    """Return what one of `BUDGETS` counts.

    Raises:
        CipmError: as `LatencyTable.measure` for latency.
    """
    original = ctx.original or program
    if kind == "latency":
        if ctx.data is None:
            raise InputError("Latency is measured on a batch of the data; give data=.")
        choices = [_choice(program, c) for c in candidates]
        feeds = timing_feeds(program.model, ctx.data)
        table = LatencyTable.measure(program, choices, feeds, threads=threads, progress=progress)
        return Seconds(_WORDS[kind], table.full, table)
    whole = np.ones(program.analysis.classes.count, bool)
    if original is program:
        first = costs
    else:
        first = CostModel(original, ctx.sizes_of(program))
        whole = np.ones(original.analysis.classes.count, bool)
    total = {"macs": first.macs, "params": first.params, "bytes": first.bytes}[kind](whole)
    return Counted(kind, _WORDS[kind], float(total), costs)


def _choice(program: Program, candidate: Candidate) -> Choice:
    """Return the same as a `Choice`; which units go makes no difference to the seconds."""
    order = [np.arange(program.spaces[k].size) for k in candidate.spaces]
    ranked = [program.analysis.spaces[k].table for k in candidate.spaces]
    return Choice(list(candidate.spaces), ranked, np.ones(max(map(len, order))), candidate.levels, order)
