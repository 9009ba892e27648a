"""How long a model takes in onnxruntime on this machine: minima of interleaved runs.

Other work on the machine only ever adds time, so the smallest of many runs is the steadiest number. Models that are to
be compared take turns, in a new order each round: a clock that drifts, or a neighbour that wakes up, then hits all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from cipm_ir.errors import InputError, OptionError, UnsupportedError
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, random_inputs, true_inputs
from cipm_ir.runtime.session import Array, Runner

_MODES = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_FREE_SIZES = (8, 32, 64, 224, 1)
"""What unknown sizes other than the batch may be, in the order in which they are tried."""
_ROUND = 2e-3
"""Seconds that a turn of one model lasts at least: short runs are repeated, so that its caches are warm again."""


@dataclass(frozen=True)
class Timings:
    """Seconds per run of some models that took turns.

    Attributes:
        seconds: the smallest time of one run, per model.
        noise: how far the minima of the even and of the odd rounds lie apart, as a fraction, per model: differences
            between models below this say nothing.
        runs: timed runs of each model.
        threads: of onnxruntime within an operator.
        samples: in the batch that was run.
        version: of onnxruntime.
    """

    seconds: tuple[float, ...]
    noise: tuple[float, ...]
    runs: int
    threads: int
    samples: int
    version: str

    def __str__(self) -> str:
        count = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"minimum of {self.runs} interleaved runs, batch {self.samples}, {count}, "
            f"onnxruntime {self.version} on the CPU with all optimizations"
        )


class TimedRunner(Runner):
    """A model in onnxruntime with all its optimizations and a fixed number of threads.

    Raises:
        UnsupportedError: onnxruntime lacks a kernel.
        InputError: a model that is not valid.
    """

    def __init__(self, model: ir.Model, *, threads: int = 1, optimize: str = "all") -> None:
        self._threads = threads
        self._mode = _MODES[optimize]
        super().__init__(model, backend="onnxruntime", fast=True)

    def _onnxruntime(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = self._mode
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Threads that go on spinning after a run would take the cores from the model whose turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return ort.InferenceSession(self._hand_over(options), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UnsupportedError(f"onnxruntime cannot run the model, so it cannot be timed: {first}.") from error

    def turn(self, feeds: Mapping[str, Array], least: float = 0.0) -> list[float]:
        """Return seconds of each run of one turn, which lasts at least ``least`` seconds."""
        run, names, given = self._session.run, list(self.outputs), dict(feeds)
        took: list[float] = []
        while not took or (sum(took) < least and len(took) < 1000):
            start = time.perf_counter()
            run(names, given)
            took.append(time.perf_counter() - start)
        return took


def measure_latency(
    model: ir.Model, feeds: Mapping[str, Array], *, threads: int = 1, runs: int = 30, seconds: float | None = None
) -> float:
    """Return seconds of one run of a model; see `compare_latency`."""
    return compare_latency([model], feeds, threads=threads, runs=runs, seconds=seconds).seconds[0]


def compare_latency(
    models: Sequence[ir.Model],
    feeds: Mapping[str, Array],
    *,
    threads: int = 1,
    runs: int = 30,
    noise: float | None = None,
    seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Timings:
    """Time models that take the same inputs, by turns; all are in memory at once.

    Args:
        models: not changed.
        feeds: one batch, for all of them.
        threads: of onnxruntime within an operator.
        runs: rounds; in each, every model has one turn of at least 2 ms (several runs, where one is shorter).
        noise: go on, at most twenty times as long, until `Timings.noise` is at most this for every model; None: do not.
        seconds: stop after this time, but not before the fourth round; None: no limit.
        progress: called with the fraction done.

    Raises:
        InputError: a model does not run on the feeds.
        UnsupportedError: onnxruntime lacks a kernel.
        OptionError: numbers below one.
    """
    _check(threads, runs)
    opened: list[TimedRunner] = []
    try:
        for model in models:
            opened.append(TimedRunner(model, threads=threads))
        for runner in opened:  # the first runs allocate and page in: not timed
            runner.run(feeds)
            runner.turn(feeds, _ROUND)
        halves, rounds = _rounds(opened, feeds, runs, noise, seconds, progress)
    finally:
        for runner in opened:
            runner.close()
    least = halves.min(axis=0)
    samples = max((len(array) for array in feeds.values() if array.ndim), default=1)
    apart = tuple(_noise(halves).tolist())
    return Timings(tuple(least.tolist()), apart, rounds, threads, samples, str(ort.__version__))


def _rounds(
    opened: Sequence[TimedRunner],
    feeds: Mapping[str, Array],
    runs: int,
    noise: float | None,
    seconds: float | None,
    progress: Callable[[float], None] | None,
) -> tuple[Array, int]:
    """Smallest times in even and odd rounds (2, models), and how many rounds there were."""
    halves = np.full((2, len(opened)), np.inf)
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    most = max(runs, 2) if noise is None else 20 * max(runs, 2)
    for done in range(1, most + 1):
        half = halves[done % 2]
        for k in rng.permutation(len(opened)):
            half[k] = min(half[k], *opened[k].turn(feeds, _ROUND))
        spent = time.perf_counter() - begin
        if progress is not None:
            progress(min(max(done / most, 0.0 if seconds is None else spent / max(seconds, 1e-9)), 1.0))
        late = seconds is not None and spent > seconds and done >= 4
        if late or (noise is not None and done >= max(runs, 2) and _noise(halves).max() <= noise):
            break
    if progress is not None:
        progress(1.0)
    return halves, done


def _noise(halves: Array) -> Array:
    return np.asarray(np.abs(halves[0] - halves[1]) / halves.min(axis=0))


def _check(threads: int, runs: int) -> None:
    for name, value in (("threads", threads), ("runs", runs)):
        if value < 1:
            raise OptionError(f"Measuring latency takes {name} of at least 1, not {value}.")


def timing_feeds(model: ir.Model, data: Data | None = None, *, batch: int = 1, seed: int = 0) -> Feeds:
    """Return one batch to time a model on: the first of the data, or random inputs that the model runs with.

    Args:
        model: the model.
        data: samples as for `cipm_ir.runtime.inputs.generate.batches`; None draws random ones.
        batch: samples in it, where the model does not fix this.
        seed: of the random ones.

    Raises:
        InputError: data that does not fit or holds no samples, and where no random inputs are accepted.
    """
    if batch < 1:
        raise OptionError(f"Measuring latency takes a batch of at least 1, not {batch}.")
    if data is not None:
        first = next(iter(batches(data, model, batch)), None)
        if first is None:
            raise InputError("The data holds no samples to measure the latency on.")
        return first
    first_error: InputError | None = None
    with Runner(model) as runner:
        for free_size in _FREE_SIZES if true_inputs(model) else _FREE_SIZES[:1]:
            drawn = random_inputs(model, np.random.default_rng(seed), batch, free_size=free_size)
            try:
                runner.run(drawn)
                return drawn
            except InputError as error:
                first_error = first_error or error
    raise InputError(f"No random inputs were found to measure the latency on; give data=. {first_error}")
