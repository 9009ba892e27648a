"""The knapsack over spaces: against every combination of levels."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray

from cipm_ir.passes.pruning.compress.allocation import Levels, Price, allocate

Curves = list[NDArray[np.float64]]
LEVELS = 4


def case(seed: int) -> tuple[Curves, Price]:
    """A chain of layers: a layer costs the product of the widths on both sides."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5))
    curves = [np.append(np.sort(rng.random(LEVELS - 1) ** 3)[::-1], 0.0) for _ in range(count)]
    size = rng.uniform(0.5, 5.5, count + 1)

    def price(levels: Levels) -> float:
        width = np.concatenate([[1.0], (np.asarray(levels) + 1) / LEVELS, [1.0]])
        return float((size * width[:-1] * width[1:]).sum())

    return curves, price


def best(curves: Curves, price: Price, budget: float) -> float | None:
    """The least sum over all combinations, None where none is within the budget."""
    every = product(range(LEVELS), repeat=len(curves))
    sums = [sum(float(c[k]) for c, k in zip(curves, one, strict=True)) for one in every if price(list(one)) <= budget]
    return min(sums, default=None)


def test_against_every_combination() -> None:
    found, optimal = [], []
    for seed in range(60):
        curves, price = case(seed)
        full = price([LEVELS - 1] * len(curves))
        for fraction in (0.2, 0.5, 0.7, 0.9):
            made, wanted = allocate(curves, price, fraction * full), best(curves, price, fraction * full)
            assert (made is None) == (wanted is None)
            if made is None or wanted is None:
                continue
            assert made.cost == price(made.levels) <= fraction * full
            assert made.divergence == pytest.approx(sum(c[k] for c, k in zip(curves, made.levels, strict=True)))
            assert made.divergence >= wanted - 1e-12
            found.append(made.divergence)
            optimal.append(wanted)
    gaps = np.asarray(found) - optimal
    assert len(gaps) > 150 and (gaps < 1e-9).mean() > 0.8 and sum(found) < 1.05 * sum(optimal)


def test_control_uniform_levels_are_far_from_the_best() -> None:
    uniform, optimal = [], []
    for seed in range(60):
        curves, price = case(seed)
        budget = 0.5 * price([LEVELS - 1] * len(curves))
        within = [k for k in range(LEVELS) if price([k] * len(curves)) <= budget]
        wanted = best(curves, price, budget)
        if within and wanted is not None:
            uniform.append(sum(float(c[within[-1]]) for c in curves))
            optimal.append(wanted)
    assert sum(uniform) > 1.5 * sum(optimal)


def test_nothing_to_do_and_out_of_reach() -> None:
    curves, price = case(0)
    full, least = [LEVELS - 1] * len(curves), [0] * len(curves)
    made = allocate(curves, price, price(full))
    assert made is not None and made.levels == full and made.divergence == 0.0
    lowest = allocate(curves, price, price(least))
    assert lowest is not None and lowest.levels == least
    assert allocate(curves, price, 0.999 * price(least)) is None


def test_free_reductions_are_taken_before_dear_ones() -> None:
    """A flat curve (units that are not needed) pays first, whatever its place."""
    curves = [np.asarray([1.0, 0.5, 0.2, 0.0]), np.zeros(4), np.asarray([2.0, 1.0, 0.5, 0.0])]
    made = allocate(curves, lambda levels: float(sum(levels) + 3), 9.0)
    assert made is not None and made.levels == [3, 0, 3] and made.divergence == 0.0


def test_equal_curves_and_a_cliff() -> None:
    """No multiplier tells equal candidates apart, and none reaches a level that is not on the convex hull."""
    cliff = [np.asarray([1.0, 0.99, 0.0])] * 3
    made = allocate(cliff, lambda levels: float(sum(levels)), 4.0)
    assert made is not None and made.cost <= 4.0 and made.divergence <= 1.0 + 1e-9


def test_no_candidates() -> None:
    made = allocate([], lambda _: 1.0, 2.0)
    assert made is not None and made.levels == []
    assert allocate([], lambda _: 3.0, 2.0) is None


def test_more_budget_is_never_worse() -> None:
    for seed in range(10):
        curves, price = case(seed)
        full = price([LEVELS - 1] * len(curves))
        made = [allocate(curves, price, f * full) for f in np.linspace(0.3, 1.0, 8)]
        worth = [m.divergence for m in made if m is not None]
        assert worth and worth[-1] == 0.0 and worth[0] >= worth[-1]
        assert sum(b > a + 0.2 for a, b in pairwise(worth)) == 0
