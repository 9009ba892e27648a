"""Which units stay: against every subset, against closed forms, and where matrices are singular."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from cipm_ir.passes.pruning.compress import selection
from cipm_ir.passes.pruning.compress.selection import Problem, Swaps, eliminate, solve

Array = NDArray[np.float64]


def problem(seed: int, count: int, each: int = 1, outputs: int = 3, damping: float = 1e-8) -> Problem:
    """Correlated rectified inputs."""
    rng = np.random.default_rng(seed)
    size = count * each
    x = np.maximum(rng.standard_normal((300, size)) @ rng.standard_normal((size, size)), 0.0)
    return made(x, rng.standard_normal((size, outputs)), each, damping)


def made(x: Array, weight: Array, each: int = 1, damping: float = 1e-8) -> Problem:
    gram = x.T @ x / len(x)
    energy = float(np.einsum("ko,kl,lo->", weight, gram, weight))
    return Problem(gram, weight, np.arange(len(weight)).reshape(-1, each), energy, damping)


def cost(problems: list[Problem], keep: object) -> float:
    kept = np.sort(np.asarray(keep, dtype=np.int64))
    return sum(p.error(p.refit(kept)) for p in problems)


# ---------------------------------------------------------------- one problem
def test_refit_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((200, 9)), rng.standard_normal((9, 4))
    one, keep = made(x, weight, each=3, damping=1e-12), np.asarray([0, 2])
    stays = np.asarray([0, 1, 2, 6, 7, 8])
    wanted, left, *_ = np.linalg.lstsq(x[:, stays], x @ weight, rcond=None)
    found = one.refit(keep)
    np.testing.assert_allclose(found[stays], wanted, atol=1e-8)
    assert not found[[3, 4, 5]].any()
    assert one.error(found) == pytest.approx(left.sum() / np.square(x @ weight).sum(), rel=1e-6)


def test_rows_that_no_element_owns_always_stay() -> None:
    one = problem(0, 6)
    part = Problem(one.gram, one.weight, np.asarray([[1], [4]]), one.energy, one.damping)
    assert part.stays(np.asarray([1])).tolist() == [0, 2, 3, 4, 5]
    assert not part.refit(np.asarray([1]))[1].any() and part.refit(np.asarray([1]))[0].any()


def test_solve_takes_singular_matrices() -> None:
    singular = np.ones((3, 3))
    found = solve(singular, np.ones((3, 1)))
    np.testing.assert_allclose(singular @ found, 1.0)
    assert solve(np.zeros((0, 0)), np.zeros((0, 2))).shape == (0, 2)


# ---------------------------------------------------------------- against every subset
@pytest.mark.parametrize("each", [1, 2])
def test_first_to_go_is_the_cheapest(each: int) -> None:
    for seed in range(10):
        problems = [problem(10 * seed + k, 7, each) for k in range(2)]
        every = np.arange(7)
        costs = [cost(problems, np.delete(every, k)) for k in range(7)]
        assert eliminate(problems, 7)[0] == int(np.argmin(costs))


def exhaustive_ratios(seeds: range, choose: object) -> Array:
    ratios = []
    for seed in seeds:
        problems = [problem(10 * seed + k, 8, 1 + seed % 2) for k in range(1 + seed % 3)]
        order = eliminate(problems, 8)
        for number in (2, 4, 6):
            best = min(cost(problems, c) for c in combinations(range(8), number))
            ratios.append(cost(problems, choose(problems, order, number)) / best)  # type: ignore[operator]
    return np.asarray(ratios)


def test_nearly_the_best_of_all_subsets() -> None:
    """Elimination finds the best of all subsets in most cases, swaps in nearly all."""
    plain = exhaustive_ratios(range(20), lambda _p, order, n: order[-n:])
    swapped = exhaustive_ratios(range(20), lambda p, order, n: Swaps(p, 8).improve(order[-n:]))
    assert (plain > 1 - 1e-6).all() and (swapped <= plain + 1e-9).all()
    assert (plain < 1.0001).mean() > 0.8 and plain.max() < 1.4
    assert (swapped < 1.0001).mean() > 0.93 and swapped.max() < 1.3


def test_control_magnitude_is_far_from_the_best() -> None:
    """The oracle tells good from bad: keeping the largest weights is seldom best."""

    def largest(problems: list[Problem], _order: object, number: int) -> NDArray[np.int64]:
        size = sum(np.square(p.weight[p.rows]).sum(axis=(1, 2)) for p in problems)
        return np.argsort(size)[-number:]

    ratios = exhaustive_ratios(range(20), largest)
    assert (ratios < 1.0001).mean() < 0.5 and ratios.mean() > 1.1


def test_swaps_repair_a_bad_choice() -> None:
    for seed in range(5):
        problems = [problem(seed, 8)]
        bad = max(combinations(range(8), 4), key=lambda c: cost(problems, c))
        best = min(cost(problems, c) for c in combinations(range(8), 4))
        kept = Swaps(problems, 8).improve(np.asarray(bad))
        assert len(kept) == 4 and (np.diff(kept) > 0).all()
        assert cost(problems, kept) < 1.35 * best < cost(problems, bad)


@pytest.mark.parametrize("each", [1, 3])
def test_gains_and_drops_are_exact(each: int) -> None:
    one = problem(3, 6, each, damping=1e-10)
    kept, gone = np.asarray([0, 2, 3]), np.asarray([1, 4, 5])
    base = cost([one], kept)
    gains = [base - cost([one], [*kept, g]) for g in gone]
    drops = [cost([one], np.delete(kept, k)) - base for k in range(3)]
    swept = selection._Swept.of(one)
    swept.move(kept)
    np.testing.assert_allclose(swept.gains(gone), gains, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(swept.drops(kept), drops, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- many units
def test_rounds_of_several_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [problem(k, 60) for k in range(2)]
    one_by_one = eliminate(problems, 60, 10)
    monkeypatch.setattr(selection, "_STEPS", 4)
    monkeypatch.setattr(selection, "_POOL", 2)
    rounds = eliminate(problems, 60, 10)
    assert sorted(rounds.tolist()) == sorted(one_by_one.tolist()) == list(range(60))
    for number in (20, 30, 45):
        assert cost(problems, rounds[-number:]) < 1.1 * cost(problems, one_by_one[-number:])
        assert cost(problems, rounds[-number:]) < 0.8 * cost(problems, one_by_one[:number])


def test_floor_leaves_the_rest_alone() -> None:
    order = eliminate([problem(0, 8)], 8, 5)
    assert sorted(order.tolist()) == list(range(8)) and order[-5:].tolist() == sorted(order[-5:].tolist())
    assert eliminate([problem(0, 8)], 8, 9).tolist() == list(range(8))


# ---------------------------------------------------------------- singular data
def test_linear_combinations_go_for_nothing() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((400, 5))
    x = np.concatenate([base, base @ rng.standard_normal((5, 4))], axis=1)
    one = made(x, rng.standard_normal((9, 3)), damping=1e-10)
    order = eliminate([one], 9)
    assert cost([one], Swaps([one], 9).improve(order[-5:])) < 1e-6
    assert cost([one], Swaps([one], 9).improve(order[-4:])) > 1e-3


def test_inputs_that_never_move() -> None:
    """All zero: nothing matters, nothing fails."""
    one = Problem(np.zeros((6, 6)), np.ones((6, 2)), np.arange(6)[:, None], float("inf"))
    order = eliminate([one], 6)
    assert sorted(order.tolist()) == list(range(6))
    assert Swaps([one], 6).improve(order[-3:]).shape == (3,)
    assert np.isfinite(one.refit(order[-3:])).all()


def test_an_output_that_does_not_vary_has_no_say() -> None:
    """With infinite energy it changes no choice; with a tiny one, the control, it would make them all."""
    real, dead = problem(1, 8), problem(2, 8)
    silent = Problem(dead.gram, dead.weight, dead.rows, float("inf"), dead.damping)
    loud = Problem(dead.gram, dead.weight, dead.rows, 1e-30, dead.damping)
    alone = eliminate([real], 8).tolist()
    assert eliminate([real, silent], 8).tolist() == alone
    assert eliminate([real, loud], 8).tolist() != alone
