"""Builds restricted programs and times them, in groups that take turns with the whole program."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Progress
from cipm_ir.passes.pruning.budget.search import Choice
from cipm_ir.runtime.session import Array
from cipm_ir.runtime.timing import Timings, compare_latency
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

_GROUP = 8
"""Models in memory at once, beside the whole one: few enough that all of them run within a moment."""
_GROUP_BYTES = 512 << 20
_NOISE = 0.015
"""Runs go on until the numbers are this steady, or the time is up: on a busy machine minima need many runs."""


@dataclass(frozen=True)
class Measured:
    """One model that ran: the level of each choice, and its seconds, scaled to the whole model's best time."""

    levels: tuple[int, ...]
    seconds: float


class Bench:
    """Times a program with choices at some levels; see `cipm_ir.passes.pruning.budget.latency.LatencyTable.measure`.

    Attributes:
        full: the whole program's best time over all groups, once `run` is done.
        noise: the median relative noise of a measurement.
        how: in words, what was measured.
        refused: spaces that could not be restricted together, with the reason.
    """

    def __init__(
        self,
        program: Program,
        choices: Sequence[Choice],
        feeds: Mapping[str, Array],
        threads: int,
        runs: int,
        seconds: float | None,
        progress: Progress,
    ) -> None:
        self.program, self.choices, self.feeds = program, choices, feeds
        self.threads, self.runs, self.limit, self.progress = threads, runs, seconds, progress
        self.full, self.noise, self.how = np.inf, 0.0, ""
        self.refused: dict[str, str] = {}

    def run(self, wanted: Sequence[tuple[int, ...]]) -> list[Measured]:
        """Return every model that can be built.

        Its seconds come from its ratio to the whole program in the same group.
        """
        whole = self.program.emit()
        size = max(1, min(_GROUP, _GROUP_BYTES // max(_bytes(whole), 1)))
        groups = [wanted[start : start + size] for start in range(0, len(wanted), size)] or [[]]
        ratios: list[tuple[tuple[int, ...], float]] = []
        noise: list[float] = []
        runs = sys.maxsize
        for number, group in enumerate(groups):
            built = [(levels, model) for levels in group if (model := self._built(levels)) is not None]
            timings = self._timed([whole, *(model for _, model in built)], number, len(groups))
            self.full = min(self.full, timings.seconds[0])
            noise += timings.noise
            runs = min(runs, timings.runs)
            self.how = str(replace(timings, runs=runs))
            whole_took, *took = timings.seconds
            ratios += [(levels, t / whole_took) for (levels, _), t in zip(built, took, strict=True)]
        self.noise = float(np.median(noise))
        return [Measured(levels, ratio * self.full) for levels, ratio in ratios]

    def one(self, levels: tuple[int, ...], full: float) -> float:
        """Return seconds of one model, scaled to the whole program's ``full``.

        Raises:
            SymmetryError: the program cannot be restricted so.
        """
        model = self.program.restrict(kept(self.program, self.choices, levels)).emit()
        timings = compare_latency(
            [self.program.emit(), model],
            self.feeds,
            threads=self.threads,
            runs=3 * self.runs,
            noise=_NOISE,
            seconds=self.limit,
        )
        return timings.seconds[1] / timings.seconds[0] * full

    def _timed(self, models: Sequence[ir.Model], number: int, groups: int) -> Timings:
        return compare_latency(
            models,
            self.feeds,
            threads=self.threads,
            runs=self.runs,
            noise=_NOISE,
            seconds=None if self.limit is None else self.limit / groups,
            progress=lambda done: self.progress("measure the latency", (number + done) / groups),
        )

    def _built(self, levels: tuple[int, ...]) -> ir.Model | None:
        keep = kept(self.program, self.choices, levels)
        try:
            return self.program.restrict(keep).emit()
        except SymmetryError as refusal:
            self.refused[", ".join(f"@{space.name}" for space in list(keep)[:3])] = str(refusal)
            return None


def kept(program: Program, choices: Sequence[Choice], levels: Sequence[int]) -> dict[Space, npt.NDArray[np.int64]]:
    """Return the elements that stay in every space that shrinks."""
    found: dict[Space, npt.NDArray[np.int64]] = {}
    for choice, level in zip(choices, levels, strict=True):
        for k, elements in zip(choice.spaces, choice.kept(int(choice.levels[level])), strict=True):
            if len(elements) < program.spaces[k].size:
                found[program.spaces[k]] = elements
    return found


def _bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
