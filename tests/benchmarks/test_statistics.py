"""How the cost of the statistics grows: with the width of a space, exact and sketched, and with the number of samples.

Exponents are least-squares slopes in log-log scale. Memory is what the statistics allocate at their peak (tracemalloc).
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.runtime.statistics.collect import collect
from cipm_ir.symmetry.program import Program

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
SAMPLES = (100, 1000, 10_000, 100_000)
Batch = dict[str, np.ndarray[Any, Any]]


def one_layer(width: int) -> Program:
    net = Net("statistics-benchmark")
    h = net.relu(net.gemm(net.input("x", ["N", 16]), 16, width))
    net.output(net.gemm(h, width, 1), ["N", 1])
    return cipm_ir.load(net.model())


def stream(count: int, batch: int = 500) -> Iterator[Batch]:
    """As if read from elsewhere: never all in memory."""
    rng = np.random.default_rng(0)
    for start in range(0, count, batch):
        yield {"x": rng.standard_normal((min(batch, count - start), 16)).astype(np.float32)}


def cost(program: Program, count: int, **options: Any) -> tuple[float, float]:
    """(seconds, MiB at the peak)."""
    start = time.perf_counter()
    collect(program, stream(count), size=256, **options)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    collect(program, stream(min(count, 1000)), size=256, **options)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return seconds, peak


def exponent(x: Sequence[int], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@pytest.mark.parametrize(("pairs", "most_seconds", "most_memory"), [("exact", 2.2, 2.1), ("sketch", 1.3, 1.3)])
def test_width(pairs: str, most_seconds: float, most_memory: float) -> None:
    measured = [cost(one_layer(width), 1000, pairs=pairs) for width in WIDTHS]
    seconds, memory = ([m[k] for m in measured] for k in (0, 1))
    for width, (s, m) in zip(WIDTHS, measured, strict=True):
        print(f"\n{pairs}, {width} units, 1000 samples: {s:.3f} s, {m:.0f} MiB", end="")
    slopes = [exponent(WIDTHS[2:], y[2:]) for y in (seconds, memory)]  # below, fixed costs rule
    print(f"\n{pairs}: seconds ~ width^{slopes[0]:.2f}, memory ~ width^{slopes[1]:.2f} from 1024 units on")
    assert slopes[0] < most_seconds
    assert slopes[1] < most_memory


def test_strongest_pairs_of_a_wide_space() -> None:
    data = {"x": np.concatenate([batch["x"] for batch in stream(1000)])}
    for width in (2048, 4096, 8192):
        start = time.perf_counter()
        one = collect(one_layer(width), data, pairs="sketch")
        print(f"\nsketch and second run, {width} units, 1000 samples: {time.perf_counter() - start:.1f} s", end="")
        assert len(next(iter(one.values())).strongest()[0]) >= 4 * width


def test_samples() -> None:
    program = one_layer(256)
    collect(program, stream(100))
    measured = [cost(program, count) for count in SAMPLES]
    for count, (seconds, memory) in zip(SAMPLES, measured, strict=True):
        print(f"\n256 units, {count} samples: {seconds:.3f} s, {memory:.1f} MiB", end="")
    slope = exponent(SAMPLES[1:], [m[0] for m in measured[1:]])
    print(f"\nseconds ~ samples^{slope:.2f} from 1000 samples on")
    assert slope < 1.15
    tracemalloc.start()
    peaks = []
    for count in (5_000, 50_000):
        tracemalloc.reset_peak()
        collect(program, stream(count), size=256)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
    tracemalloc.stop()
    print(f"peak memory: {peaks[0]:.1f} MiB for 5000 samples, {peaks[1]:.1f} MiB for 50 000")
    assert peaks[1] < 1.2 * peaks[0] + 1
