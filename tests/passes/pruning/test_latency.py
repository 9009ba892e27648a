"""Latency: interleaved timings, and the table that estimates the seconds of any choice of widths.

Real seconds are noisy, so numbers are checked with a clock that is made up; real runs only show that it all works.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests import zoo

from cipm_ir.errors import InputError, OptionError, SymmetryError, UnsupportedError
from cipm_ir.passes.pruning.budget import latency_bench
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.latency import BLOCK, LatencyTable, fit_to_budget, measurement_grid
from cipm_ir.passes.pruning.budget.latency_bench import kept
from cipm_ir.passes.pruning.budget.search import Choice, allowed_levels, link_spaces, make_choice
from cipm_ir.runtime.timing import TimedRunner, Timings, compare_latency, measure_latency, timing_feeds
from cipm_ir.symmetry.program import Program


def program_of(name: str) -> Program:
    return Program.of(ir.from_proto(zoo.build(name)))


def choices_of(program: Program) -> list[Choice]:
    rng = np.random.default_rng(0)
    made = []
    for group in link_spaces(program.analysis).groups:
        spaces = [program.spaces[k] for k in group]
        if spaces[0].kind == "cells" or min(s.size for s in spaces) < 2:
            continue
        levels = allowed_levels(min(s.size for s in spaces), max(s.size for s in spaces), 1, 1)
        made.append(make_choice(program.analysis, group, [rng.random(s.size) for s in spaces], levels, local=False))
    return made


class Clock:
    """Stands for onnxruntime: seconds as a function of the model, in place of `compare_latency`."""

    def __init__(self, seconds: Any, *, drift: float = 1.0) -> None:
        self.seconds, self.drift, self.calls, self.sizes = seconds, drift, 0, [0]

    def __call__(self, models: Sequence[ir.Model], feeds: Mapping[str, Any], **_: Any) -> Timings:
        self.calls += 1
        self.sizes.append(len(models))
        factor = self.drift**self.calls
        took = tuple(factor * float(self.seconds(Program.of(model))) for model in models)
        return Timings(took, (0.0,) * len(took), 1, 1, 1, "made up")


def macs(program: Program) -> float:
    return 1e-3 + 1e-6 * program.macs


def measured(
    monkeypatch: pytest.MonkeyPatch, program: Program, choices: list[Choice], clock: Clock, points: int = 4
) -> LatencyTable:
    monkeypatch.setattr(latency_bench, "compare_latency", clock)
    return LatencyTable.measure(program, choices, {}, points=points)


def some_levels(choices: Sequence[Choice], number: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [[int(rng.integers(len(c.levels))) for c in choices] for _ in range(number)]


# --- the table, with a made-up clock --------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_flatten_gemm", "residual_blocks", "attention_separate", "grouped_conv"])
def test_time_that_follows_the_macs_is_found_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(name)
    choices = choices_of(program)
    assert len(choices) > 1
    monkeypatch.setattr("cipm_ir.passes.pruning.budget.latency.BLOCK", 1)
    table = measured(monkeypatch, program, choices, Clock(macs))
    assert table.error < 0.02 and table.full == pytest.approx(macs(program))
    for levels in some_levels(choices):
        real = macs(program.restrict(kept(program, choices, levels)))
        assert table.seconds(levels) == pytest.approx(real, rel=0.05), levels


def test_adding_up_what_is_saved_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above: without the common part the estimate is far off."""
    program = program_of("residual_blocks")
    choices = choices_of(program)
    monkeypatch.setattr("cipm_ir.passes.pruning.budget.latency.BLOCK", 1)
    table = measured(monkeypatch, program, choices, Clock(macs))
    lowest = [0] * len(choices)
    added = table.full - sum(float(curve[0]) for curve in table.curves.saved)
    real = macs(program.restrict(kept(program, choices, lowest)))
    assert abs(table.seconds(lowest) / real - 1) < 0.05 < 0.2 < abs(added / real - 1)


def test_one_choice_alone_is_as_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("conv_flatten_gemm")
    choices = choices_of(program)
    table = measured(monkeypatch, program, choices, Clock(lambda p: 1e-3 + 1e-6 * p.macs**0.9), points=100)
    whole = [len(c.levels) - 1 for c in choices]
    assert table.seconds(whole) == table.full and table.fraction(whole) == 1.0
    for k, choice in enumerate(choices):
        for level in range(len(choice.levels)):
            levels = [level if i == k else last for i, last in enumerate(whole)]
            real = program.restrict(kept(program, choices, levels))
            assert table.seconds(levels) == pytest.approx(1e-3 + 1e-6 * real.macs**0.9, rel=1e-6)


def test_a_clock_that_drifts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("residual_blocks")
    choices = choices_of(program)
    steady = measured(monkeypatch, program, choices, Clock(macs))
    clock = Clock(macs, drift=1.1)
    drifting = measured(monkeypatch, program, choices, clock)
    assert clock.calls > 2, "several groups, so that there is a drift between them"
    for levels in some_levels(choices):
        assert drifting.fraction(levels) == pytest.approx(steady.fraction(levels), rel=1e-9)


def test_odd_widths_have_a_price_that_neighbours_share(monkeypatch: pytest.MonkeyPatch) -> None:
    program = wide()
    choices = choices_of(program)

    def odd(made: Program) -> float:
        sizes = [s.size for s in made.spaces if s.kind == "units"]
        return macs(made) * (1.5 if any(size % BLOCK for size in sizes) else 1.0)

    table = measured(monkeypatch, program, choices, Clock(odd))
    whole = [len(c.levels) - 1 for c in choices]
    below = [int(np.searchsorted(c.levels, 31)) for c in choices]
    half = [int(np.searchsorted(c.levels, 16)) for c in choices]
    for k in range(len(choices)):
        alone = [below[i] if i == k else level for i, level in enumerate(whole)]
        assert table.fraction(alone) > 1.2, "a smaller model that is slower is no saving"
    for levels in (half, below):
        real = odd(program.restrict(kept(program, choices, levels)))
        assert table.seconds(levels) == pytest.approx(real, rel=0.1), "the price is not paid once per space"
    assert table.overlap < 0.2


def wide() -> Program:
    """Three hidden layers of 32 units."""
    from tests.zoo.net import Net

    net = Net("wide")
    h = net.input("x", ["N", 16])
    for before in (16, 32, 32):
        h = net.relu(net.gemm(h, before, 32))
    net.output(net.gemm(h, 32, 4), ["N", 4])
    return Program.of(ir.from_proto(net.model()))


def test_noise_does_not_make_fewer_units_slower_on_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    program = wide()
    choices = choices_of(program)
    rng = np.random.default_rng(0)
    table = measured(monkeypatch, program, choices, Clock(lambda p: macs(p) * rng.uniform(0.97, 1.03)), points=8)
    for choice, saved, gained in zip(choices, table.curves.saved, table.curves.gained, strict=True):
        numbers = np.asarray(choice.levels)
        for on_blocks in (True, False):
            chosen = (numbers % BLOCK == 0) == on_blocks
            chosen[-1] = False
            assert (np.diff(saved[chosen]) <= 1e-15).all()
        assert (gained >= saved - 1e-15).all() and (gained >= 0).all() and saved[-1] == 0


def test_a_level_that_is_refused_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("conv_flatten_gemm")
    choices = choices_of(program)
    restrict = Program.restrict

    def refusing(self: Program, keep: Any) -> Program:
        if any(len(kept) == 1 for kept in keep.values()):
            raise SymmetryError("Rows would become uneven.")
        return restrict(self, keep)

    monkeypatch.setattr(Program, "restrict", refusing)
    table = measured(monkeypatch, program, choices, Clock(macs))
    assert set(table.refused.values()) == {"Rows would become uneven."} and table.seconds([0] * len(choices)) > 0


def test_the_chosen_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("residual_blocks")
    choices = choices_of(program)
    table = measured(monkeypatch, program, choices, Clock(macs, drift=1.3))
    for levels in some_levels(choices, 4):
        real = macs(program.restrict(kept(program, choices, levels))) / macs(program)
        assert table.measured(levels) / table.full == pytest.approx(real)


def chooser(table: LatencyTable) -> Any:
    """All choices shrink alike, to the widest whose estimate is within the budget."""

    def choose(budget: float) -> list[int]:
        for share in np.linspace(1, 0, 200):
            levels = [round(share * (len(c.levels) - 1)) for c in table.choices]
            if table.seconds(levels) <= budget:
                return levels
        raise SymmetryError("Out of reach.")

    return choose


@pytest.mark.parametrize("wrong", [0.8, 1.0, 1.3])
def test_a_budget_is_met_though_estimates_are_off(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    program = wide()
    choices = choices_of(program)

    def seconds(p: Program) -> float:
        return 1e-6 * p.macs

    table = measured(monkeypatch, program, choices, Clock(seconds))
    # Whatever is chosen for the user turns out slower or faster than the table says.
    slower = Clock(lambda p: seconds(p) * (wrong if p.macs < program.macs else 1.0))
    monkeypatch.setattr(latency_bench, "compare_latency", slower)
    budget = 0.5 * table.full
    levels, took = fit_to_budget(table, chooser(table), budget)
    assert 0.85 * budget <= took <= budget and took == pytest.approx(table.measured(levels))
    estimate = table.seconds(chooser(table)(budget))
    assert wrong == 1.0 or not 0.85 * budget <= estimate * wrong <= budget, "the control: at once it would miss"


def test_a_latency_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    program = wide()
    table = measured(monkeypatch, program, choices_of(program), Clock(macs))
    with pytest.raises(SymmetryError, match="Out of reach"):
        fit_to_budget(table, chooser(table), 1e-9)
    monkeypatch.setattr(latency_bench, "compare_latency", Clock(lambda p: 1.0))
    with pytest.raises(SymmetryError, match=r"cannot be brought down to 60.0%: the fastest .* has 100.0%"):
        fit_to_budget(table, lambda _: [0] * len(table.choices), 0.6 * table.full)


def test_groups_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("residual_blocks")
    clock = Clock(macs)
    measured(monkeypatch, program, choices_of(program), clock)
    assert max(clock.sizes) <= 9
    monkeypatch.setattr(latency_bench, "_GROUP_BYTES", 1)
    tight = Clock(macs)
    measured(monkeypatch, program, choices_of(program), tight)
    assert max(tight.sizes) == 2, "a large model is compared with one other at a time"


def test_no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("mlp_relu")
    table = measured(monkeypatch, program, [], Clock(macs))
    assert table.seconds([]) == table.full and table.models == 1


@pytest.mark.parametrize(
    ("numbers", "points", "places"),
    [
        ([], 3, []),
        ([1, 2, 3, 4], 1, [0]),
        ([1, 2, 3, 4, 5], 3, [0, 2, 4]),
        ([1, 2], 9, [0, 1]),
        ([8, 16, 64], 2, [0, 2]),
    ],
)
def test_knots(numbers: list[int], points: int, places: list[int]) -> None:
    assert measurement_grid(numbers, points) == places


# --- real runs ------------------------------------------------------------------------------------


def test_a_table_from_onnxruntime() -> None:
    program = program_of("conv_flatten_gemm")
    choices = choices_of(program)
    seen: list[float] = []
    table = LatencyTable.measure(
        program,
        choices,
        timing_feeds(program.model),
        points=2,
        runs=2,
        progress=lambda _, done: seen.append(done or 0.0),
    )
    assert table.full > 0 and all(table.seconds(levels) > 0 for levels in some_levels(choices))
    assert seen[-1] == pytest.approx(1.0) and all(a <= b for a, b in pairwise(seen))
    text = str(table)
    assert "onnxruntime 1." in text and "1 thread" in text and "batch 1" in text
    shown = table.to_dict()
    assert shown["seconds"] == table.full and len(shown["saved"]) == len(choices)


def test_more_work_takes_longer() -> None:
    small, large = work(32), work(2048)  # a thousand times the products, so that a busy machine does not matter
    feeds = {"x": np.ones((1, 64), np.float32)}
    timings = compare_latency([small, large, small], feeds, runs=10)
    assert timings.seconds[1] > max(timings.seconds[0], timings.seconds[2])
    assert len(timings.noise) == 3 and timings.runs == 10 and timings.samples == 1
    assert measure_latency(large, feeds, runs=3, threads=2) > 0


def work(width: int) -> ir.Model:
    from tests.zoo.net import Net

    net = Net("work")
    h = net.relu(net.gemm(net.input("x", ["N", 64]), 64, width))
    net.output(net.gemm(net.relu(net.gemm(h, width, width)), width, 4), ["N", 4])
    return ir.from_proto(net.model())


def test_models_take_turns_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def turn(self: TimedRunner, feeds: Any, least: float = 0.0) -> list[float]:
        turns.append(id(self))
        return [1.0]

    monkeypatch.setattr(TimedRunner, "turn", turn)
    model = work(8)
    compare_latency([model, model, model], {"x": np.ones((1, 64), np.float32)}, runs=6)
    rounds = [turns[start : start + 3] for start in range(3, len(turns), 3)]
    assert len(rounds) == 6 and all(len(set(one)) == 3 for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_the_time_limit_holds_but_not_before_the_fourth_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    model, feeds = work(8), {"x": np.ones((1, 64), np.float32)}
    assert compare_latency([model], feeds, runs=50, seconds=0.0).runs == 4
    assert compare_latency([model], feeds, runs=50, seconds=None).runs == 50


def test_runs_go_on_until_the_numbers_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = work(8), {"x": np.ones((1, 64), np.float32)}
    times = iter([9.0, 2.0, 3.0, 2.0, 2.5, 2.0, 2.01])
    monkeypatch.setattr(TimedRunner, "turn", lambda self, feeds, least=0.0: [next(times)])
    timings = compare_latency([model], feeds, runs=2, noise=0.01)
    assert timings.runs == 6 and timings.noise[0] == pytest.approx(0.005)
    odd = count()
    monkeypatch.setattr(TimedRunner, "turn", lambda self, feeds, least=0.0: [1.0 + next(odd) % 2])
    assert compare_latency([model], feeds, runs=2, noise=0.01).runs == 40, "but not for ever"


def test_noise_is_the_distance_of_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[9.0], [2.0], [3.0], [4.0], [2.5]])
    monkeypatch.setattr(TimedRunner, "turn", lambda self, feeds, least=0.0: next(times))
    timings = compare_latency([work(8)], {"x": np.ones((1, 64), np.float32)}, runs=4)
    assert timings.seconds == (2.0,) and timings.noise == (0.25,), "the warm-up does not count"


def test_feeds() -> None:
    model = work(8)
    assert timing_feeds(model, batch=3)["x"].shape == (3, 64)
    given = np.arange(640, dtype=np.float32).reshape(10, 64)
    assert np.array_equal(timing_feeds(model, {"x": given}, batch=2)["x"], given[:2])
    assert np.array_equal(timing_feeds(model, seed=4)["x"], timing_feeds(model, seed=4)["x"])
    for name in ("attention_separate", "conv_pool", "lstm"):
        program = program_of(name)
        assert measure_latency(program.model, timing_feeds(program.model), runs=2) > 0


def test_what_cannot_be_measured() -> None:
    model, feeds = work(8), {"x": np.ones((1, 64), np.float32)}
    with pytest.raises(OptionError, match="threads of at least 1, not 0"):
        measure_latency(model, feeds, threads=0)
    with pytest.raises(OptionError, match="runs of at least 1, not 0"):
        measure_latency(model, feeds, runs=0)
    with pytest.raises(OptionError, match="batch of at least 1, not 0"):
        timing_feeds(model, batch=0)
    with pytest.raises(InputError, match="failed to run"):
        measure_latency(model, {"x": np.ones((1, 63), np.float32)})
    with pytest.raises(InputError, match="no samples to measure"):
        timing_feeds(model, {"x": np.ones((0, 64), np.float32)})
    with pytest.raises(InputError, match="no array for input 'x'"):
        timing_feeds(model, {"y": np.ones((1, 64), np.float32), "z": np.ones(1)})
    with pytest.raises(UnsupportedError, match="cannot run the model, so it cannot be timed"):
        measure_latency(program_of("custom_op").model, feeds)
    program = program_of("mlp_relu")
    with pytest.raises(OptionError, match="at least 1 level per choice, not 0"):
        LatencyTable.measure(program, choices_of(program), {}, points=0)


def test_macs_are_those_of_the_cost_model() -> None:
    """`kept` and the masks of the search mean the same model."""
    program = program_of("residual_blocks")
    choices = choices_of(program)
    for levels in some_levels(choices, 4):
        keep = kept(program, choices, levels)
        assert program.restrict(keep).macs == CostModel(program).macs(program.kept_classes(keep))
