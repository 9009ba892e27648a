"""Predict seconds on this machine for any choice of widths: choices are measured one at a time and combined by a model.

Multiply-accumulates do not turn into time evenly: a thin layer leaves vector units idle, and a width that is no
multiple of a kernel's block costs more than the next multiple. So each choice alone is restricted to a few levels, and
these models are timed in turns with the whole one. Two choices together save less than the sum of both: a convolution
between two halved spaces still costs a quarter, and the price of an odd width is paid once for neighbours that are odd
alike. Both effects are modelled, with rates fitted to models in which all choices shrink together. The result is an
estimate (`LatencyTable.error`): measure the chosen model (`LatencyTable.measured`) before relying on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression, nnls

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.passes.framework.base import Progress, ignore_progress
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.latency_bench import Bench, Measured
from cipm_ir.passes.pruning.budget.search import Choice, Search
from cipm_ir.runtime.session import Array
from cipm_ir.symmetry.program import Program

Seconds = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

BLOCK = 8
"""Convolutions of onnxruntime work on blocks of 8 or 16 channels: a width between two multiples costs as much as the
upper one, or more, where it needs another layout. So widths on and off the multiples get a curve each; under a budget
of latency, widths are best rounded to it."""

_JOINT = (0.9, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Fractions of all spaces at which models are measured that the rates are fitted to."""
_DRAWN = 6
"""So many more have a fraction of its own for each choice."""


@dataclass(frozen=True)
class Curves:
    """What each choice saves while all else stays whole, in seconds, at each of its levels; zero at the last.

    ``saved`` is negative where the smaller model is slower; on and off the blocks of channels each it never rises with
    the level: what noise says against that is smoothed away. ``gained`` is what would be saved without the price of an
    odd width; it is never below ``saved``, nor below zero.
    """

    saved: tuple[Seconds, ...]
    gained: tuple[Seconds, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a program restricted to any levels of some choices; build it with `LatencyTable.measure`.

    Attributes:
        choices: as `cipm_ir.passes.pruning.budget.search.make_choice` gives them.
        full: seconds of one run of the whole program.
        curves: what each choice saves alone.
        rate: seconds per multiply-accumulate that choices save in common.
        overlap: which part of an odd width's price is paid beside the highest such price.
        bonus: what is saved beyond the sum, as a part of what all but the most useful choice save.
        error: the median relative error on the models in which all choices shrink together.
        noise: the median relative noise of a measurement, see `cipm_ir.runtime.timing.Timings`.
        how: in words, what was measured.
        models: how many models were run.
        refused: names of spaces that could not be restricted to some level, with the reason.
    """

    choices: tuple[Choice, ...]
    full: float
    curves: Curves
    rate: float
    overlap: float
    bonus: float
    error: float
    noise: float
    how: str
    models: int
    refused: Mapping[str, str]
    _macs: CommonMacs = field(repr=False)
    _bench: Bench = field(repr=False)

    @classmethod
    def measure(
        cls,
        program: Program,
        choices: Sequence[Choice],
        feeds: Mapping[str, Array],
        *,
        threads: int = 1,
        points: int = 3,
        runs: int = 12,
        seconds: float | None = 120.0,
        progress: Progress = ignore_progress,
    ) -> LatencyTable:
        """Restrict one choice at a time at a few levels, and all together, and run the models by turns.

        Args:
            program: the whole program.
            choices: what may shrink, see `cipm_ir.passes.pruning.budget.search`.
            feeds: one batch, see `cipm_ir.runtime.timing.timing_feeds`.
            threads: of onnxruntime within an operator.
            points: levels to measure for each choice and curve; between them the seconds are interpolated.
            runs: rounds of the interleaved measurement.
            seconds: time limit for all runs together; each model has at least four turns. None: no limit.
            progress: called with the fraction done.

        Raises:
            UnsupportedError: onnxruntime lacks a kernel.
            InputError: the feeds do not fit.
            OptionError: numbers below one.
        """
        if points < 1:
            raise OptionError(f"Measuring latency takes at least 1 level per choice, not {points}.")
        macs = CommonMacs(program, choices)
        bench = Bench(program, choices, feeds, threads, runs, seconds, progress)
        places = [_curves(program, choice) for choice in choices]
        singles = [
            replaced(macs.last, k, int(curve[i]))
            for k, choice in enumerate(choices)
            for curve in places[k]
            for i in measurement_grid(np.asarray(choice.levels)[curve], points)
        ]
        found = bench.run([*singles, *_joint(choices, macs.last)])
        single = [one for one in found if _lowered(one.levels, macs.last) == 1]
        joint = [one for one in found if _lowered(one.levels, macs.last) > 1]
        pairs = []
        for k, choice in enumerate(choices):
            at = {one.levels[k]: bench.full - one.seconds for one in single if one.levels[k] != macs.last[k]}
            pairs.append(_curves_of(choice, places[k], at, macs.blocked[k]))
        curves = Curves(tuple(saved for saved, _ in pairs), tuple(gained for _, gained in pairs))
        rates, errors = _fitted(bench.full, curves, macs, joint)
        return cls(
            tuple(choices), bench.full, curves, *rates, float(np.median(errors)) if joint else 0.0,
            bench.noise, bench.how, len(found) + 1, dict(bench.refused), macs, bench,
        )  # fmt: skip

    def seconds(self, levels: Sequence[int]) -> float:
        """Estimated seconds of one run with each choice at its level, an index into ``choice.levels``."""
        base, *parts = _parts(self.full, self.curves, self._macs, levels)
        return max(base + self.rate * parts[0] + self.overlap * parts[1] - self.bonus * parts[2], 0.0)

    def fraction(self, levels: Sequence[int]) -> float:
        """Return the same as a fraction of the whole program's."""
        return self.seconds(levels) / self.full

    def measured(self, levels: Sequence[int]) -> float:
        """Measured seconds with each choice at its level, scaled to ``full``.

        Raises:
            SymmetryError: the program cannot be restricted to these levels.
        """
        return self._bench.one(tuple(levels), self.full)

    def to_dict(self) -> dict[str, Any]:
        """Return numbers for a report."""
        shown = {
            self._macs.names[k]: {int(self.choices[k].levels[i]): float(alone[i]) for i in _few(len(alone))}
            for k, alone in enumerate(self.curves.saved)
        }
        names = ("how", "models", "noise", "error", "rate", "overlap", "bonus")
        return {
            "seconds": self.full,
            **{name: getattr(self, name) for name in names},
            "saved": shown,
            "refused": dict(self.refused),
        }

    def __str__(self) -> str:
        return (
            f"{self.full * 1e3:.3g} ms ({self.how}); estimates from {self.models} models, "
            f"noise {self.noise:.1%}, error where all spaces shrink {self.error:.1%}"
        )


def fit_to_budget(
    table: LatencyTable,
    choose: Callable[[float], Sequence[int]],
    budget: float,
    *,
    rounds: int = 5,
    close: float = 0.03,
) -> tuple[tuple[int, ...], float]:
    """Return levels whose measured seconds are within a budget, and these seconds: estimates are put right by
    measuring.

    What was chosen is measured, and where it misses, the next choice is made for a budget that is off by as much.

    Args:
        table: of the program.
        choose: gives the best levels whose estimated seconds (`LatencyTable.seconds`) are at most its argument.
        budget: seconds, on the scale of ``table.full``.
        rounds: how often to choose and measure, at most.
        close: stop where less than this fraction of the budget is left.

    Raises:
        SymmetryError: no choice came down to the budget, and what ``choose`` raises before one did.
    """
    target, best, fastest = budget, None, math.inf
    tried: set[tuple[int, ...]] = set()
    for _ in range(rounds):
        try:
            levels = tuple(int(level) for level in choose(target))
        except SymmetryError:
            if best is None:
                raise
            break
        if levels in tried:
            break
        tried.add(levels)
        took = table.measured(levels)
        fastest = min(fastest, took)
        if took <= budget and (best is None or took > best[1]):
            best = levels, took
        if budget * (1.0 - close) <= took <= budget:
            break
        # A little below, so that it is not missed again by noise.
        target *= (1.0 - close / 2.0) * budget / took
    if best is None:
        raise SymmetryError(
            f"The latency cannot be brought down to {budget / table.full:.1%}: the fastest model that was measured has "
            f"{fastest / table.full:.1%}; allow more, or for widths in multiples of {BLOCK}."
        )
    return best


# ---------------------------------------------------------------- what to measure
def measurement_grid(numbers: npt.ArrayLike, points: int) -> list[int]:
    """Return places of at most ``points`` of ascending numbers, evenly spaced, the first and the last among them."""
    given = np.asarray(numbers, np.float64)
    if not len(given):
        return []
    targets = np.linspace(given[0], given[-1], points) if points > 1 else given[:1]
    return sorted({int(np.argmin(np.abs(given - target))) for target in targets})


def replaced(levels: Sequence[int], k: int, level: int) -> tuple[int, ...]:
    """Return the levels with another one for choice ``k``."""
    return (*levels[:k], level, *levels[k + 1 :])


def _curves(program: Program, choice: Choice) -> list[Places]:
    """Return levels below the whole that lie on one curve: widths on and off the blocks of channels; all for heads."""
    below = np.arange(len(choice.levels) - 1)
    if program.spaces[choice.spaces[0]].kind != "units":
        return [below]
    aligned = np.asarray(choice.levels)[:-1] % BLOCK == 0
    return [places for places in (below[aligned], below[~aligned]) if len(places)]


def _joint(choices: Sequence[Choice], last: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return levels at which every choice keeps the same or some fraction.

    As it is and on the next block of channels.
    """
    if len(choices) < 2:
        return []
    made: set[tuple[int, ...]] = set()
    sizes = np.array([int(c.levels[-1]) for c in choices])
    drawn = np.random.default_rng(0).uniform(0.3, 1.0, (_DRAWN, len(choices)))
    for share in [*np.array(_JOINT)[:, None], *drawn]:
        wanted = (share * sizes).tolist()
        made.add(tuple(_nearest(c, number) for c, number in zip(choices, wanted, strict=True)))
        made.add(tuple(_nearest(c, -(-number // BLOCK) * BLOCK) for c, number in zip(choices, wanted, strict=True)))
    return sorted(levels for levels in made if _lowered(levels, last) > 1)


def _nearest(choice: Choice, number: float) -> int:
    return int(np.argmin(np.abs(np.asarray(choice.levels) - number)))


def _lowered(levels: Sequence[int], last: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(levels, last, strict=True))


def _few(count: int) -> list[int]:
    """Some levels for a report: the lowest, quarters, the whole."""
    return sorted({round(share * (count - 1)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)})


# ---------------------------------------------------------------- what follows from it
class CommonMacs:
    """The multiply-accumulates that choices save in common."""

    def __init__(self, program: Program, choices: Sequence[Choice]) -> None:
        self.names = [program.spaces[c.spaces[0]].name for c in choices]
        self.last = tuple(len(c.levels) - 1 for c in choices)
        self._model = CostModel(program)
        self._search = Search(program.analysis, list(choices), self._model.macs)
        self.blocked = [program.spaces[c.spaces[0]].kind == "units" for c in choices]
        self._whole = self._macs(self.last)
        self._saved: dict[tuple[int, int], int] = {}

    def __call__(self, levels: Sequence[int]) -> int:
        """Return what would be subtracted twice if each choice's savings were added up; 0 where only one is lowered."""
        lower = [k for k, (level, last) in enumerate(zip(levels, self.last, strict=True)) if level != last]
        if len(lower) < 2:
            return 0
        return self._macs(levels) - self._whole + sum(self._saved_alone(k, levels[k]) for k in lower)

    def _macs(self, levels: Sequence[int]) -> int:
        return int(self._model.macs(self._search.mask(levels)))

    def _saved_alone(self, k: int, level: int) -> int:
        known = self._saved.get((k, level))
        if known is None:
            known = self._saved[k, level] = self._whole - self._macs(replaced(self.last, k, level))
        return known


def _parts(full: float, curves: Curves, macs: CommonMacs, levels: Sequence[int]) -> tuple[float, float, float, float]:
    """Return what is known of the seconds at some levels; the common multiply-accumulates; the prices of odd widths
    that neighbours may share; and what all but the most useful choice save.

    Where only one choice is lowered, the first number is what was measured, and the others are zero.
    """
    saved = np.array([curve[level] for curve, level in zip(curves.saved, levels, strict=True)])
    gained = np.array([curve[level] for curve, level in zip(curves.gained, levels, strict=True)])
    prices = gained - saved
    worst = float(prices.max(initial=0.0))
    base = full - float(gained.sum())
    if _lowered(levels, macs.last) < 2:
        return base + worst, 0.0, 0.0, 0.0
    left = max(base, 0.0) / full  # prices shrink with the rest of the program
    others = float(gained.sum() - gained.max(initial=0.0))
    return base + left * worst, float(macs(levels)), left * (float(prices.sum()) - worst), others


def _fitted(
    full: float, curves: Curves, macs: CommonMacs, joint: Sequence[Measured]
) -> tuple[tuple[float, float, float], list[float]]:
    """Return the three rates, by least squares of relative errors with none negative, and the errors that remain."""
    if not joint:
        return (0.0, 0.0, 0.0), []
    parts = np.array([_parts(full, curves, macs, one.levels) for one in joint]) * [1.0, 1.0, 1.0, -1.0]
    seconds = np.array([one.seconds for one in joint])
    scale = np.maximum(np.abs(parts[:, 1:]).max(axis=0), 1e-12)
    fit, _ = nnls(parts[:, 1:] / scale / seconds[:, None], (seconds - parts[:, 0]) / seconds)
    rates = fit / scale
    errors = np.abs((parts[:, 0] + parts[:, 1:] @ rates) / seconds - 1.0)
    return (float(rates[0]), float(rates[1]), float(rates[2])), errors.tolist()


def _curves_of(
    choice: Choice, places: Sequence[Places], at: Mapping[int, float], blocked: bool
) -> tuple[Seconds, Seconds]:
    """At every level of one choice: the seconds saved, and what they would be on the blocks of channels."""
    numbers = np.asarray(choice.levels, np.float64)
    saved = np.zeros(len(numbers))
    gained = np.zeros(len(numbers))
    for curve in places:
        known = [int(place) for place in curve if int(place) in at]
        if not known:
            continue
        smooth = isotonic_regression([at[place] for place in known], increasing=False).x
        saved[curve] = np.interp(numbers[curve], numbers[known], smooth)
        if not blocked or choice.levels[known[0]] % BLOCK == 0:
            gained = np.interp(numbers, [*numbers[known], numbers[-1]], [*smooth, 0.0])
    return saved, np.maximum(np.maximum(gained, saved), 0.0)
