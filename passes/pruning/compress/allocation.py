"""How much each candidate shrinks: the least divergence within a budget, as a knapsack by Lagrange multipliers.

Divergences of candidates are added; the cost of a choice is exact, products of two shrunken sides included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Levels = list[int]
Price = Callable[[Levels], float]
_SWEEPS = 8
_HALVINGS = 32
_AHEAD = 8
"""So many levels at once may be taken where one alone gains nothing."""


@dataclass(frozen=True)
class Allocation:
    """A level for each candidate, what that costs, and the sum of the divergences."""

    levels: Levels
    cost: float
    divergence: float


def allocate(curves: Sequence[npt.NDArray[np.float64]], price: Price, budget: float) -> Allocation | None:
    """Return levels with the least sum of divergences whose cost is within the budget; None where there are none.

    ``curves[k][level]``: divergence of candidate k, not increasing, 0 at the last level. ``price``: cost of levels.
    """
    lowest = [0] * len(curves)
    if price(lowest) > budget:
        return None
    full = [len(c) - 1 for c in curves]
    whole = price(full)
    if whole <= budget:
        return Allocation(full, whole, 0.0)
    low, high = 0.0, 1e-12
    best = lowest
    start = full
    while True:  # a multiplier large enough to meet the budget
        start = _descend(curves, price, high / whole, start)
        if price(start) <= budget or high > 1e12:
            break
        low, high = high, high * 10
    if price(start) <= budget:
        best = start
    for _ in range(_HALVINGS):
        if high - low <= 1e-3 * high:
            break
        middle = np.sqrt(max(low, high * 1e-2) * high)
        levels = _descend(curves, price, middle / whole, best)
        if price(levels) <= budget:
            high, best = middle, levels if _worth(curves, levels) <= _worth(curves, best) else best
        else:
            low = middle
    return fill(curves, price, budget, best)


def _worth(curves: Sequence[npt.NDArray[np.float64]], levels: Levels) -> float:
    return float(sum(c[k] for c, k in zip(curves, levels, strict=True)))


def _descend(curves: Sequence[npt.NDArray[np.float64]], price: Price, rate: float, start: Levels) -> Levels:
    """Change one level after the other while ``divergence + rate * cost`` falls."""
    levels = list(start)
    for _ in range(_SWEEPS):
        before = list(levels)
        for k, curve in enumerate(curves):
            trials = [price([*levels[:k], level, *levels[k + 1 :]]) for level in range(len(curve))]
            levels[k] = int(np.argmin(curve + rate * np.asarray(trials)))
        if levels == before:
            break
    return levels


def fill(curves: Sequence[npt.NDArray[np.float64]], price: Price, budget: float, levels: Levels) -> Allocation:
    """Raise levels step by step while the budget allows, the one that gains most for what it costs first."""
    levels = list(levels)
    while True:
        cost = price(levels)
        best: tuple[float, Levels] | None = None
        for k, curve in enumerate(curves):
            for up in range(levels[k] + 1, min(levels[k] + 1 + _AHEAD, len(curve))):
                trial = [*levels[:k], up, *levels[k + 1 :]]
                more = price(trial) - cost
                if cost + more <= budget:
                    gain = float(curve[levels[k]] - curve[up]) / max(more, 1e-12)
                    if best is None or gain > best[0]:
                        best = gain, trial
        if best is None:
            return Allocation(levels, cost, _worth(curves, levels))
        levels = best[1]
