"""What `compress` takes of the machine: memory, time, interruptions; and what it never is worse than."""

from __future__ import annotations

import os
import signal
import tracemalloc
from typing import Any

import numpy as np
import pytest
from tests.models.compress_nets import gap, images, mlp, program, residual, rows, two_convs, values
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.pruning.compress import compress as compress_module
from cipm_ir.passes.pruning.compress.candidates import kept_numbers
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.passes.pruning.compress.held_out import split
from cipm_ir.passes.pruning.compress.report import latency_in_words
from cipm_ir.passes.pruning.limits import BATCH, Footprint, Limits
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.runtime.inputs.data import Named
from cipm_ir.runtime.inputs.generate import batches
from cipm_ir.runtime.kernels import BLOCKS, channel_block
from cipm_ir.symmetry.program import Program

FAST: dict[str, Any] = {"steps": 3, "min_keep": 1, "rounds": 0}


def compress(made: Program, data: Any, progress: Any = None, **options: Any) -> PassResult:
    ctx = Context(data=data, original=made)
    if progress is not None:
        ctx.progress = progress
    return Compress(**{**FAST, **options}).run(made, ctx)


# ---------------------------------------------------------------- memory
def test_the_footprint_counts_what_one_sample_holds() -> None:
    net = Net("chain")
    x = net.input("x", ["N", 6])
    h = net.op("Relu", net.gemm(x, 6, 100))
    net.output(net.gemm(h, 100, 3), ["N", 3])
    made = Footprint.measure(program(net).model, rows(8))
    assert made.whole == 4 * (6 + 100 + 100 + 3)
    assert made.alive == 4 * (100 + 100)  # the product and its Relu meet
    assert made.tail(0) > made.tail(1) > made.tail(2) and made.seconds > 0


@pytest.mark.parametrize(("memory", "batch"), [(1 << 40, BATCH), (16 * 836 * 5, 5), (1, 1)])
def test_batches_follow_the_memory(memory: int, batch: int) -> None:
    footprint = Footprint(0, 836, 0.0, np.zeros(1, np.int64))
    assert footprint.batch(memory) == batch


def test_less_memory_gives_as_good_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In small batches, with activations in files."""
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    large = compress(made, data, macs=0.6, plain=False)
    monkeypatch.setattr(Limits, "cached", property(lambda _self: 1000))
    monkeypatch.setattr(Footprint, "batch", lambda _self, _memory: 7)
    small = compress(made, data, macs=0.6, plain=False)
    assert small.metrics["widths"] == large.metrics["widths"]
    dense = values(made, data)[0]
    assert gap(dense, values(small.program, data)[0]) < 1.2 * gap(dense, values(large.program, data)[0])


def test_sums_beyond_the_memory_lie_in_files() -> None:
    limits = Limits(memory=1 << 24)
    tracemalloc.start()
    held = [limits.zeros((1000, 1000)) for _ in range(8)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000 < sum(a.nbytes for a in held)  # one in memory would be half of that, all of them 64 MB
    held[-1] += 1.0
    assert held[-1].sum() == 1_000_000 and not held[-2].any()


# ---------------------------------------------------------------- time
def test_work_shrinks_with_the_time() -> None:
    footprint = Footprint(0, 0, 0.01, np.arange(11))
    firsts = list(range(10))
    plenty, little, none = (Limits(seconds=s).effort(footprint, firsts, 512, 8) for s in (10_000.0, 60.0, 0.01))
    assert (plenty.probes, plenty.steps, plenty.again) == (512, 8, True)
    assert little.probes < 512 and little.seconds <= 0.25 * 60
    assert (none.probes, none.steps, none.again) == (16, 3, False)


def test_samples_shrink_with_the_time() -> None:
    footprint = Footprint(0, 0, 0.5, np.zeros(1, np.int64))
    counts = [Limits(seconds=s).samples(footprint, 400) for s in (1e6, 300.0, 1.0)]
    assert counts[0] == 400 and 16 < counts[1] < 400 and counts[2] == 16
    assert Limits(seconds=1.0).samples(footprint, 10) == 10
    assert Limits(memory=1000).samples(Footprint(10, 0, 0.0, np.zeros(1, np.int64)), 400) == 50


def test_rows_shrink_with_the_time() -> None:
    plenty, little = Limits(seconds=1e6), Limits(seconds=1.0)
    for limits in (plenty, little):
        limits.fit_rows([(2000, 100)] * 20, 3, 40_000)
    assert plenty.rows(2000, 40_000) == 80_000 and 4 * 2000 <= little.rows(2000, 40_000) < 20_000


def test_no_time_still_gives_a_valid_model_within_the_budget() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    result = compress(made, data, macs=0.6, time=1e-6, plain=False)
    assert result.program.macs <= 0.6 * made.macs and np.isfinite(values(result.program, data)[0]).all()
    assert "the time was over before the sensitivity of" in result.summary
    assert "products that lose units were refitted" in result.summary
    whole = compress(made, data, macs=0.6, time=1e6, plain=False)
    assert "time was over" not in whole.summary
    dense = values(made, data)[0]
    assert gap(dense, values(whole.program, data)[0]) < gap(dense, values(result.program, data)[0])


def test_the_estimate_comes_first() -> None:
    said: list[str] = []
    compress(program(mlp()), rows(60), lambda what, _fraction: said.append(what), macs=0.6, time=300.0)
    assert said[0].startswith("estimate: ") and "of 300 s allowed" in said[0] and "GB of memory" in said[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_gives_the_best_so_far_where_asked(number: signal.Signals) -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    before = signal.getsignal(number)

    def stop(what: str, _fraction: float | None) -> None:
        if what == "compensate" and not sent:
            sent.append(what)
            os.kill(os.getpid(), number)

    sent: list[str] = []
    result = compress(made, data, stop, macs=0.6, on_interrupt="best")
    assert sent and "products that lose units were refitted" in result.summary
    assert result.program.macs <= 0.6 * made.macs
    assert signal.getsignal(number) is before


def test_an_interruption_stops_by_default() -> None:
    def stop(what: str, _fraction: float | None) -> None:
        if what == "compensate":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compress(program(two_convs()), images(60), stop, macs=0.6)


# ---------------------------------------------------------------- samples left out
@pytest.mark.parametrize(("count", "held"), [(31, 0), (32, 4), (100, 12), (4096, 256)])
def test_one_sample_of_eight_is_left_out(count: int, held: int) -> None:
    made, data = program(mlp()), rows(count)
    calibration, left_out = split(data, made.model, 4096)
    if not held:
        assert calibration is data and left_out is None
        return
    assert left_out is not None
    parts = [np.concatenate([f["x"] for f in batches(part, made.model, 10)]) for part in (calibration, left_out)]
    assert [len(part) for part in parts] == [count - held, held]
    both = np.concatenate(parts)
    np.testing.assert_array_equal(both[np.lexsort(both.T)], data["x"][np.lexsort(data["x"].T)])


def test_of_fixed_batches_whole_ones_are_left_out() -> None:
    made, data = program(mlp(batch=4)), rows(64)
    calibration, left_out = split(data, made.model, 4096)
    assert left_out is not None
    assert sum(len(f["x"]) for f in batches(calibration, made.model)) == 56
    np.testing.assert_array_equal(next(iter(batches(left_out, made.model)))["x"], data["x"][28:32])


# ---------------------------------------------------------------- never worse than pruning
def unread(width: int = 16) -> Program:
    """A Softmax over units of which the next product reads a half: to `compress` none of them may go."""
    net = Net("unread")
    h = net.op("Softmax", net.gemm(net.input("x", ["N", 6]), 6, width), axis=-1)
    h = net.op("Relu", net.gemm(h, width, 12))
    last = net.normal((4, 12), 0.5)
    last[:, 6:] = 0.0
    net.output(net.op("Gemm", h, net.const(last), transB=1), ["N", 4])
    return program(net)


def test_where_pruning_costs_nothing_the_result_does_not_either() -> None:
    made, data = unread(), rows(80)
    budget = made.restrict({next(s for s in made.spaces if s.size == 12): np.arange(6)}).macs / made.macs
    result = compress(made, data, macs=budget, round_to=1)
    dense = values(made, data)[0]
    assert gap(dense, values(result.program, data)[0]) < 1e-9
    pruned = Prune(macs=budget, min_keep=1, importance="magnitude").run(made, Context(original=made))
    assert gap(dense, values(pruned.program, data)[0]) >= gap(dense, values(result.program, data)[0])


def test_what_is_refused_alone_may_still_be_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be refitted, pruning is the result if it does little harm, and the reason is kept."""
    net = Net("soft")
    h = net.op("Softmax", net.gemm(net.input("x", ["N", 6]), 6, 10), axis=-1)
    net.output(net.gemm(h, 10, 3), ["N", 3])
    made = program(net)
    with pytest.raises(SymmetryError, match="finds no units that it may drop"):
        compress(made, rows(40), macs=0.9, plain=False)
    result = compress(made, rows(40), macs=0.9)
    assert result.program.macs <= 0.9 * made.macs
    assert "by plain pruning, criterion" in result.summary and "a normalization, softmax or sum" in result.summary
    monkeypatch.setattr(compress_module, "_USEFUL", 1e-9)
    with pytest.raises(SymmetryError, match="finds no units that it may drop"):
        compress(made, rows(40), macs=0.9)  # now it does too much harm


# ---------------------------------------------------------------- widths
@pytest.mark.parametrize(("size", "multiple"), [(1024, 0), (64, 0), (24, 4), (12, 1)])
def test_widths_follow_the_kernels(size: int, multiple: int) -> None:
    net = Net("wide")
    net.output(net.gemm(net.op("Relu", net.gemm(net.input("x", ["N", 4]), 4, size)), size, 2), ["N", 2])
    (space,) = program(net).spaces
    expected = multiple or channel_block()
    assert channel_block() in BLOCKS
    assert (kept_numbers([space], 0.1, None) % expected == 0).all()
    assert len(kept_numbers([space], 0.1, 1)) > len(kept_numbers([space], 0.1, None)) or expected == 1


# ---------------------------------------------------------------- time of the result
def test_the_time_of_the_result_is_measured() -> None:
    made = compress(program(mlp()), rows(60), macs=0.6)
    assert {"1 thread"} <= set(made.metrics["latency"]) and "of the time" in made.summary
    assert all(seconds > 0 for pair in made.metrics["latency"].values() for seconds in pair)


@pytest.mark.parametrize(
    ("seconds", "warned"),
    [([0.01, 0.007], False), ([0.01, 0.0099], True), ([0.01, 0.013], True), ([1e-5, 2e-5], False)],
)
def test_work_that_does_not_turn_into_time_is_said(seconds: list[float], warned: bool) -> None:
    words = latency_in_words({"1 thread": seconds, "2 threads": seconds}, 0.7)
    assert words[0].startswith("a run takes ") and any("warning" in one for one in words) == warned
    assert not latency_in_words({}, 0.7)


def test_a_sample_with_small_outputs_does_not_decide() -> None:
    """What samples add sums up to the divergence of all, also where one of them has outputs near zero."""
    made = program(mlp())
    data = rows(64)
    plan = Compress(macs=0.6, **FAST)._plan(made, Context(data=data, original=made), Limits())
    result = compress(made, data, macs=0.6, plain=False).program
    assert plan.held.each(result).mean() == pytest.approx(plan.held.whole(result), rel=1e-6)
    for out in plan.held.dense:
        for array in out.values():
            array[0] *= 1e-6  # the original gives nearly nothing there
    assert plan.held.each(result).mean() == pytest.approx(plan.held.whole(result), rel=1e-6)
    assert plan.held.each(result)[0] < 100


def test_a_list_of_complete_inputs_is_not_divided() -> None:
    """What a sample is may depend on the others of its input; single samples are left out as of an array."""
    made = program(mlp())
    several = [rows(5, seed=k) for k in range(40)]
    assert split(several, made.model, 4096) == (several, None)
    assert split(Named(several, ("x",)), made.model, 4096)[1] is None  # as the pipeline hands it on
    one = [rows(1, seed=k) for k in range(40)]
    left_out = split(one, made.model, 4096)[1]
    assert left_out is not None
    np.testing.assert_array_equal(next(iter(batches(left_out, made.model)))["x"], one[7]["x"])
