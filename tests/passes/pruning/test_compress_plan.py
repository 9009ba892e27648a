"""What `compress` measures once: finer levels, continued curves, seconds from a table, plans that are shared."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import Feeds, images, mlp, program, residual, rows, values

import cipm_ir
from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.budget.latency import LatencyTable
from cipm_ir.passes.pruning.compress import compress as compress_module
from cipm_ir.passes.pruning.compress import plan as compress_plan
from cipm_ir.passes.pruning.compress import sensitivity
from cipm_ir.passes.pruning.compress.candidates import Candidate, find_candidates, wanted_spaces
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.passes.pruning.compress.cost import Seconds
from cipm_ir.passes.pruning.compress.plan import Plan, Settings, between, make_plan
from cipm_ir.passes.pruning.compress.sensitivity import _continued
from cipm_ir.passes.pruning.limits import Footprint, Limits
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
FAST: dict[str, Any] = {"steps": 3, "min_keep": 1, "rounds": 0}


def plan_of(made: Program, data: Feeds, *, steps: int = 4, rounds: int = 0) -> Plan:
    """The plan for multiply-accumulates."""
    wanted = wanted_spaces(made, "compress", (), (), True)
    candidates, notes = find_candidates(made, wanted, 1, 1, steps)
    settings = Settings(4096, 256, rounds, steps, 1e-4, "auto", 1)
    ctx = Context(data=data, original=made)
    footprint = Footprint.measure(made.model, data)
    return make_plan(made, candidates, {}, notes, settings, "macs", ctx, Limits(), footprint)


# ---------------------------------------------------------------- finer levels
def coarse(seed: int, size: int, levels: list[int], spaces: int = 1) -> Candidate:
    """Chosen units that are nested only in part, as swaps leave them, and an order that differs from them."""
    rng = np.random.default_rng(seed)
    made = Candidate(list(range(spaces)), [[]] * spaces, np.array(levels), np.arange(levels[0], size + 1))
    made.order = [rng.permutation(size) for _ in range(spaces)]
    made.kept = [[np.sort(rng.choice(size, n, replace=False)) for _ in range(spaces)] for n in levels[:-1]]
    made.kept.append([np.arange(size)] * spaces)
    return made


@pytest.mark.parametrize("spaces", [1, 3])
@pytest.mark.parametrize("size", [7, 20, 200])
def test_finer_levels_lie_between_what_was_chosen(size: int, spaces: int) -> None:
    for seed in range(5):
        made = coarse(seed, size, [2, size // 2, size], spaces)
        fine = made.finer()
        assert fine.levels.tolist() == sorted(set(fine.levels.tolist())) and len(fine.levels) >= min(size - 1, 33)
        assert set(made.levels.tolist()) <= set(fine.levels.tolist()) <= set(made.numbers.tolist())
        assert fine.levels[fine.measured].tolist() == made.levels.tolist()
        assert len(fine.kept) == len(fine.levels)
        for number, kept in zip(fine.levels.tolist(), fine.kept, strict=True):
            for elements in kept:
                assert len(elements) == number and (np.diff(elements) > 0).all() and elements[-1] < size
        for at, kept in zip(fine.measured, made.kept, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(fine.kept[int(at)], kept, strict=True))


def test_between_two_levels_units_go_in_order() -> None:
    """By hand: 2 of 6 stay, then 3, 4, 5: those that the order lets go last come back first."""
    made = Candidate([0], [[]], np.array([2, 6]), np.arange(2, 7))
    made.order, made.kept = [np.array([4, 0, 5, 2, 1, 3])], [[np.array([1, 3])], [np.arange(6)]]
    fine = made.finer()
    assert [kept[0].tolist() for kept in fine.kept] == [
        [1, 3], [1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]
    ]  # fmt: skip
    assert fine.measured.tolist() == [0, 4]


def test_nested_choices_stay_nested() -> None:
    made = coarse(0, 30, [5, 15, 30])
    made.kept = [[np.sort(made.order[0][-n:])] for n in (5, 15, 30)]
    fine = made.finer()
    for small, large in pairwise(fine.kept):
        assert np.isin(small[0], large[0]).all()
    swapped = coarse(0, 30, [5, 15, 30]).finer()  # the control: chosen at random they are not
    assert not all(np.isin(a[0], b[0]).all() for a, b in pairwise(swapped.kept))


def test_finer_levels_are_multiples() -> None:
    made = coarse(1, 64, [8, 32, 64])
    made.numbers = np.arange(8, 65, 8)
    assert made.finer().levels.tolist() == list(range(8, 65, 8))


def test_curves_between_levels() -> None:
    """What was measured stays; between, divergences grow by factors, near the end with the square of what goes."""
    measured, curve = np.array([2, 6, 10, 12]), np.array([1.6, 0.4, 0.1, 0.0])
    levels = np.arange(2, 13)
    found = between(levels, measured, curve)
    np.testing.assert_allclose(found[levels == 4], 0.8)
    np.testing.assert_allclose(found[levels == 11], 0.025)
    np.testing.assert_allclose(found[np.isin(levels, measured)], curve)
    assert (np.diff(found) < 0).all()
    for flat in (np.zeros(4), np.array([0.5, 0.5, 0.0, 0.0])):
        made = between(levels, measured, flat)
        assert np.isfinite(made).all() and (np.diff(made) <= 0).all() and made[-1] == 0
        np.testing.assert_allclose(made[np.isin(levels, measured)], flat)


# ---------------------------------------------------------------- curves measured again
def candidate_at(levels: list[int], measured: list[int] | None = None) -> Candidate:
    made = Candidate([0], [[]], np.array(levels), np.array(levels))
    if measured is not None:
        made.measured = np.array(measured)
    return made


def test_continued_by_hand() -> None:
    """Through what was seen, beyond by the differences of the old curve, and zero at the last level."""
    made = candidate_at([2, 4, 6, 8, 10])
    old = np.array([9.0, 5.0, 2.0, 1.0, 0.0])
    np.testing.assert_allclose(_continued(made, {1: 7.0, 3: 3.0}, old), [9, 5, 3, 1, 0])
    np.testing.assert_allclose(_continued(made, {2: 2.0}, old), old)  # seen as it was
    np.testing.assert_allclose(_continued(made, {2: 50.0}, old), old)  # what all others cost is left out
    np.testing.assert_allclose(_continued(made, {0: 8.0, 4: 0.0}, old), [8, 6, 4, 2, 0])  # nothing of the old is left


def test_noise_is_no_gain() -> None:
    """More units never cost more, whatever was measured; without noise (control) the numbers are kept."""
    made, old = candidate_at([1, 2, 3, 4]), np.array([3.0, 2.0, 1.0, 0.0])
    noisy = _continued(made, {0: 4.0, 1: 2.0, 2: 2.5, 3: 1.0}, old)
    assert (np.diff(noisy) <= 0).all() and noisy[-1] == 0 and noisy.tolist() == [3.0, 1.0, 1.0, 0.0]
    assert _continued(made, {0: 4.0, 1: 3.0, 2: 2.5, 3: 1.0}, old).tolist() == [3.0, 2.0, 1.5, 0.0]


def test_around_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the choice the curve is the divergence of the refitted program; at the choice it is what `whole` gives."""
    made, data = program(mlp()), rows(400)
    plan = plan_of(made, data, steps=4)
    seen: list[dict[int, float]] = []
    plain = sensitivity._continued

    def watched(candidate: Candidate, found: dict[int, float], old: Array) -> Array:
        seen.append(dict(found))
        return plain(candidate, found, old)

    monkeypatch.setattr(sensitivity, "_continued", watched)
    best = plan.at(0.6 * plan.budget.original, Context(data=data, original=made))
    curves = plan.probe.around(best.compensated, plan.candidates, best.levels, plan.curves, plan.stays)
    assert len(curves) == len(seen) == 2
    start = plan.probe.whole(best.compensated.program)
    for k, (candidate, curve, found) in enumerate(zip(plan.candidates, curves, seen, strict=True)):
        assert found[best.levels[k]] == pytest.approx(start, rel=1e-4)
        assert set(found) - {best.levels[k]} <= set(candidate.measured.tolist())
        assert 2 <= len(found) <= 6
        assert (np.diff(curve) <= 0).all() and curve[-1] == 0 and len(curve) == len(candidate.levels)
        lower = [level for level in found if level < best.levels[k]]
        assert all(found[level] >= found[best.levels[k]] for level in lower)


def test_around_refits_from_what_was_chosen() -> None:
    """One level less, as `around` sees it, is near what a whole compensation at these levels gives."""
    made, data = program(mlp()), rows(600)
    plan = plan_of(made, data, steps=11)
    ctx = Context(data=data, original=made)
    best = plan.at(0.6 * plan.budget.original, ctx)
    curves = plan.probe.around(best.compensated, plan.candidates, best.levels, plan.curves, plan.stays)
    start = plan.probe.whole(best.compensated.program)
    for k in range(2):
        down = [level - (j == k) for j, level in enumerate(best.levels)]
        real = plan.probe.whole(plan.compensation.run(made, plan.stays(down)).program) - start
        said = float(curves[k][down[k]] - curves[k][best.levels[k]])
        assert 0.3 * real <= said <= 3 * real or abs(real - said) < 0.02 * start
        assert said > 0


def test_rounds_never_make_it_worse() -> None:
    made, data = program(residual()), images(120)
    divergences = []
    for rounds in (0, 2):
        plan = plan_of(made, data, rounds=rounds)
        best = plan.at(0.5 * plan.budget.original, Context(data=data, original=made))
        assert best.cost <= 0.5 * plan.budget.original
        divergences.append(best.divergence)
    assert divergences[1] <= divergences[0]


# ---------------------------------------------------------------- seconds
@dataclass
class FakeTable:
    """Seconds that grow with the units kept; what is measured is ``off`` times the estimate."""

    widths: list[Array]
    off: float = 1.0
    full: float = 1.0
    how: str = "a fake"
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def seconds(self, levels: Any) -> float:
        kept = sum(int(w[k]) for w, k in zip(self.widths, levels, strict=True))
        return 0.2 + 0.8 * kept / sum(int(w[-1]) for w in self.widths)

    def measured(self, levels: Any) -> float:
        self.asked.append(tuple(levels))
        return min(self.off * self.seconds(levels), 1.0)


def timed(off: float = 1.0) -> tuple[Plan, FakeTable]:
    made, data = program(mlp()), rows(400)
    plan = plan_of(made, data)
    table = FakeTable([c.levels for c in plan.candidates], off)
    plan.budget = Seconds("seconds", table.full, cast(LatencyTable, table))
    return plan, table


@pytest.mark.parametrize("off", [1.0, 1.2, 0.8])
def test_seconds_are_settled_by_measuring(off: float) -> None:
    """Where the estimate is wrong, levels are chosen again until the measured seconds are within the target."""
    plan, table = timed(off)
    levels, seconds, notes = plan.budget.settle(plan, 0.7, None)
    assert table.measured(levels) == pytest.approx(seconds) and seconds <= 0.7
    assert seconds > 0.62
    assert off == 1.0 or len(set(table.asked)) > 1
    assert plan.price(levels) == pytest.approx(table.seconds(levels))
    assert notes == [f"measured {seconds:.1%} of the seconds (a fake)"]


def test_control_estimates_alone_would_miss() -> None:
    plan, table = timed(1.2)
    assert table.measured(plan.allocation(0.7).levels) > 0.7


def test_seconds_out_of_reach() -> None:
    plan, _ = timed()
    with pytest.raises(SymmetryError, match=r"cannot come down to 0\.1 of the seconds: .* minimum, 0\.\d+ remain"):
        plan.budget.settle(plan, 0.1, None)
    plan, _ = timed(3.0)
    with pytest.raises(SymmetryError, match=r"cannot (be brought|come) down"):
        plan.budget.settle(plan, 0.5, None)


def test_curves_of_the_moment_decide() -> None:
    """Given other curves, the allocation is theirs: the candidate that has become free shrinks first."""
    plan, _ = timed()
    for k in range(2):
        curves = [c * (1e-6 if j == k else 1e3) for j, c in enumerate(plan.curves)]
        levels, _, _ = plan.budget.settle(plan, 0.8, curves)
        share = [int(c.levels[a]) / int(c.levels[-1]) for c, a in zip(plan.candidates, levels, strict=True)]
        assert share[k] < share[1 - k]


def test_latency_goes_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pass with a table that is not measured: its choices are the candidates, its seconds the budget."""
    made, data = program(residual(hidden=32)), images(60)
    tables: list[FakeTable] = []

    def measure(_program: Program, choices: Any, feeds: Feeds, **options: Any) -> FakeTable:
        assert options["threads"] == 2 and set(feeds) == {"x"}
        tables.append(FakeTable([np.asarray(c.levels) for c in choices]))
        return tables[-1]

    monkeypatch.setattr(LatencyTable, "measure", measure)
    result = Compress(latency=0.7, threads=2, steps=3, rounds=0).run(made, Context(data=data, original=made))
    assert len(tables) == 1 and "of the seconds (a fake)" in result.summary
    assert all(after % 8 == 0 or after == before for before, after in result.metrics["widths"].values())
    levels = tables[0].asked[-1]
    assert tables[0].seconds(levels) <= 0.7


# ---------------------------------------------------------------- plans that runs share
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    made: list[Program] = []
    plain = compress_plan.make_plan

    def make(given: Program, *rest: Any) -> Plan:
        made.append(given)
        return plain(given, *rest)

    monkeypatch.setattr(compress_module, "make_plan", make)
    return made


def compressed(made: Program, data: Any, plans: dict[Any, Any] | None, **options: Any) -> Any:
    given = {} if plans is None else {"plans": plans}
    return Compress(**{**FAST, **options}).run(made, Context(data=data, original=made, options=given))


def test_budgets_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once; each budget gives what it gives alone, in any order."""
    built = counted(monkeypatch)
    made, data, plans = program(residual()), images(80), dict[Any, Any]()
    shared = {budget: compressed(made, data, plans, macs=budget) for budget in (0.6, 0.9, 0.75)}
    assert len(built) == len(plans) == 1
    for budget, result in shared.items():
        alone = compressed(made, data, None, macs=budget)
        assert result.witness["kept"].keys() == alone.witness["kept"].keys()
        assert all(np.array_equal(result.witness["kept"][k], kept) for k, kept in alone.witness["kept"].items())
        np.testing.assert_array_equal(values(result.program, data)[0], values(alone.program, data)[0])
    assert len(built) == 4  # the control: without a dictionary each run measures


def test_a_drop_reuses_the_plan_of_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    built = counted(monkeypatch)
    made, data, plans = program(mlp()), rows(200), dict[Any, Any]()
    compressed(made, data, plans, macs=0.8)
    compressed(made, data, plans, max_drop=0.5)
    assert len(built) == 1


@pytest.mark.parametrize("other", ["program", "data", "seed", "budget", "option"])
def test_what_changes_the_measurement_is_measured_again(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = counted(monkeypatch)
    made, data, plans = program(mlp()), rows(200), dict[Any, Any]()
    compressed(made, data, plans, macs=0.8)
    if other == "program":
        compressed(program(mlp()), data, plans, macs=0.8)
    elif other == "data":
        compressed(made, rows(200, seed=1), plans, macs=0.8)
    elif other == "budget":
        compressed(made, data, plans, params=0.8)
    elif other == "option":
        compressed(made, data, plans, macs=0.8, damping=1e-2)
    else:
        Compress(macs=0.8, **FAST).run(made, Context(data=data, original=made, seed=1, options={"plans": plans}))
    assert len(built) == len(plans) == 2


def test_notes_of_one_budget_are_not_those_of_the_next() -> None:
    made, data, plans = program(mlp(widths=(24, 20))), rows(5), dict[Any, Any]()
    first, second = (compressed(made, data, plans, params=p).summary for p in (0.7, 0.8))
    assert (
        first.count("warning:")
        == second.count("warning:")
        == compressed(made, data, None, params=0.8).summary.count("warning:")
    )


def test_through_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    built = counted(monkeypatch)
    made, data, plans = program(mlp()), rows(200), dict[Any, Any]()
    for budget in (0.8, 0.7):
        cipm_ir.optimize(made, [Compress(macs=budget, **FAST)], data=data, options={"plans": plans})
    assert len(built) == 1
