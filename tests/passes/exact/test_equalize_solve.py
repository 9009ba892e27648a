"""The convex programme behind `equalize`: gradients, convexity, optima, and rounding against brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize

from cipm_ir.passes.exact.equalize import solve as equalize_solve
from cipm_ir.passes.exact.equalize.grid import Grid
from cipm_ir.passes.exact.equalize.solve import SHARPNESS, Objective, rounded, solve
from cipm_ir.passes.exact.equalize.terms import Term

LOG2 = float(np.log(2.0))


def term(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    rows: Any,
    columns: Any,
    *,
    peak: bool = False,
    name: str = "w",
) -> Term:
    """A weight with entries of very different size; ``rows``, ``columns``: exponents of each."""
    size = np.abs(rng.standard_normal(shape)) * np.exp(rng.standard_normal(shape))
    moment, gain = rng.uniform(0.5, 2, (shape[0], shape[2])), rng.uniform(0.5, 2, shape[:2])
    made, read = (sparse.csr_array(np.asarray(table, float)) for table in (rows, columns))
    peaks = rng.uniform(0.1, 5, (shape[0], shape[2])) if peak else None
    return Term(name, Grid.held(size), made, read, gain, moment, "x", peaks)


def network(seed: int = 0, *, peak: bool = False, units: int = 5) -> list[Term]:
    """Units that one weight makes, two weights read (one as a square besides), and a depthwise kernel takes over."""
    rng = np.random.default_rng(seed)
    eye, none = np.eye(units), np.zeros((3, units))
    return [
        term(rng, (1, units, 3), eye, none),
        term(rng, (1, 4, units), np.zeros((4, units)), -eye, peak=peak),
        term(rng, (1, 2, 2 * units), np.zeros((2, units)), np.vstack([-2 * eye, -eye]), peak=peak),
        term(rng, (units, 1, 1), eye, -eye, peak=peak),
    ]


def objective(terms: list[Term], per: Any = "tensor", alpha: float = 0.0) -> Objective:
    return Objective(terms, np.arange(terms[0].rows.shape[1]), per, alpha)


def exact_value(terms: list[Term], t: np.ndarray[Any, Any], per: str) -> float:
    """The objective with true maxima, written down once more."""
    total = 0.0
    for one in terms:
        r, c = one.levels(t)
        size = one.grid.size() * np.exp(r[:, :, None] + c[:, None, :])
        step = size.max(2)[:, :, None] if per == "channel" else size.max()
        back = np.exp(-2 * (r[:, :, None] + c[:, None, :]))
        noise = step**2 * back * one.gain[:, :, None] * one.moment[:, None, :]
        total += float(np.log(noise.sum()))
    return total


def exact_value_at(t: np.ndarray[Any, Any], terms: list[Term], per: str) -> float:
    return exact_value(terms, t, per)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_slopes_are_those_of_the_value(per: str, alpha: float) -> None:
    made = objective(network(peak=alpha > 0), per, alpha)
    rng = np.random.default_rng(1)
    t = rng.standard_normal(made.count)
    made.expand(t + 0.1 * rng.standard_normal(made.count), 4.0)
    _, slope = made(t)
    for k, direction in enumerate(np.eye(made.count)):
        ahead, behind = made(t + 1e-5 * direction)[0], made(t - 1e-5 * direction)[0]
        assert slope[k] == pytest.approx((ahead - behind) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_value_is_that_of_the_noise(per: str) -> None:
    """With a sharp norm; and it does not depend on where the norm was expanded."""
    terms = network(3)
    made = objective(terms, per)
    t = np.random.default_rng(2).standard_normal(made.count)
    for at in (t, t + 0.3):
        made.expand(at, 400.0)
        assert made(t)[0] == pytest.approx(exact_value(terms, t, per), abs=0.05)
    made.expand(t, 2.0)
    assert abs(made(t)[0] - exact_value(terms, t, per)) > 0.3  # a blunt norm is no maximum


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("seed", range(3))
def test_convex(per: str, seed: int) -> None:
    made = objective(network(seed, peak=True), per, 0.3)
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, made.count)) * 2
    made.expand(0.5 * (a + b), 8.0)
    ends, middle = made(a)[0] + made(b)[0], made(0.5 * (a + b))[0]
    assert middle <= ends / 2 + 1e-9
    assert middle < ends / 2 - 1e-3  # and not flat between two points at random


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_solve_finds_what_another_method_finds(per: str) -> None:
    terms = network(5)
    made = objective(terms, per)
    found = exact_value(terms, solve(made), per)
    tried = [
        minimize(exact_value_at, start, args=(terms, per), method="Powell", options={"maxfev": 20000}).fun
        for start in np.random.default_rng(0).standard_normal((3, made.count))
    ]
    assert found <= min(tried) + 0.05
    assert found < exact_value(terms, np.zeros(made.count), per) - 0.3


def test_moves_tell_what_a_step_does() -> None:
    made = objective(network(6)[:2])  # one place in each weight
    t = solve(made)
    now = made.shares(t)
    for step in (LOG2, -LOG2):
        told = made.moves(now, step)
        true = [made(t + step * one)[0] - now.value for one in np.eye(made.count)]
        assert np.allclose(told, true, atol=1e-6)
        assert not np.allclose(made.moves(now, -step), true, atol=0.1)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_comes_close_to_the_best_of_all(per: str, seed: int) -> None:
    terms = network(seed, units=4)
    made = objective(terms, per)
    found = exact_value(terms, rounded(made, solve(made)) * LOG2, per)
    tries = np.asarray(list(product(range(-3, 4), repeat=4)), float) * LOG2
    every = np.asarray([exact_value(terms, t, per) for t in tries])
    assert found <= every.min() + 0.3
    assert found < np.quantile(every, 0.01)


def test_dead_rows_and_weights_of_one_side_change_nothing() -> None:
    """A weight whose rows do not move is handled as a vector: the same value and slopes as with all its rows."""
    terms = network(7)
    whole = objective(terms)
    whole.expand(np.zeros(whole.count), SHARPNESS[-1])
    t = 0.2 * np.random.default_rng(1).standard_normal(whole.count)
    value, slope = whole(t)
    assert value == pytest.approx(exact_value(terms, t, "tensor"), abs=0.3)
    kept = [stack.norm.shape[1:] for stack in whole.stacks]
    assert (1, 1, 5) in kept and (1, 4, 5) not in kept
    assert slope.shape == (5,)


def test_scales_of_the_network_that_came_in_do_not_matter() -> None:
    """Rescaling the weights (with their moments) moves the solution by as much, and leaves the optimum."""
    terms = network(8)
    shift = np.random.default_rng(3).standard_normal(5)
    moved = []
    for one in terms:
        r, c = one.levels(shift)
        both = np.exp(r[:, :, None] + c[:, None, :])
        moved.append(
            Term(
                one.name,
                Grid.held(one.grid.size() * both),
                one.rows,
                one.columns,
                one.gain * np.exp(-2 * r),
                one.moment * np.exp(-2 * c),
                "x",
            )
        )
    plain, other = objective(terms), objective(moved)
    a, b = exact_value(terms, solve(plain), "tensor"), exact_value(moved, solve(other), "tensor")
    assert a == pytest.approx(b, abs=0.02)


def test_a_search_that_ends_early_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large weights each step takes a reading, so steps that gain next to nothing are not made."""
    terms = network(units=8)
    free = np.arange(terms[0].rows.shape[1])
    best = exact_value(terms, solve(objective(terms)), "tensor")
    gain = exact_value(terms, np.zeros(len(free)), "tensor") - best
    early = exact_value(terms, solve(Objective(terms, free, "tensor", 0.0, in_memory=0)), "tensor")
    assert gain > 0.1 and early - best < 0.01 * gain
    monkeypatch.setattr(equalize_solve, "_ENOUGH", 0.3)  # control: much too early
    coarse = exact_value(terms, solve(Objective(terms, free, "tensor", 0.0, in_memory=0)), "tensor")
    assert coarse - best > 0.01 * gain
