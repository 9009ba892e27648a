"""What `compress` may take of the machine, and how its work is cut to fit: samples at once, rows, probes, levels."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import CipmError, UnsupportedError
from cipm_ir.ir.labels import Labels
from cipm_ir.runtime.activations.cache import Lifetimes
from cipm_ir.runtime.activations.observe import extract_subgraph, samples
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches
from cipm_ir.runtime.session import Runner, cores

BATCH = 64
"""Samples that are run at once, at most."""
USUAL_SECONDS = 180.0
"""Where no time limit is given, work is cut to about so many seconds on a machine like this one."""
_UNKNOWN_MACHINE = 8 << 30
_LEAST_MEMORY = 256 << 20
_SENSITIVITY = 0.25
"""Part of the time that the first measurement of sensitivity may take."""
_FITTING = 0.5
"""Part of the time that the products of rows may take."""
_RUNNING = 0.35
"""Part of the time that runs of the whole model may take."""
_RUNS = 8
"""So often each sample is run."""
_LEAST_SAMPLES = 16
_FLOPS = 2.5e10
"""Floating-point operations per second of a product of matrices on one core."""
_PLACES = 40
"""Rows for each unknown of a product that are enough."""
_FEWEST_PLACES = 4
_OPENING = 0.03
"""Seconds that opening a session takes."""
_PLAIN = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT64, ir.DataType.INT32)
_LADDER = ((1.0, 8), (0.5, 8), (0.25, 8), (0.25, 4), (0.125, 4), (0.0625, 4), (0.03125, 4), (0.03125, 3))
"""Fractions of the probes, and levels, from the most work to the least."""
_LEAST_PROBES = 16


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that it is; 8 GiB where that is not known."""
    found = _UNKNOWN_MACHINE
    with suppress(AttributeError, OSError, ValueError):
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


@dataclass
class Limits:
    """Bytes and seconds that may be taken; from both follow the sizes of everything that is held or computed.

    Attributes:
        memory: bytes of activations, rows and sums at one time.
        seconds: for all work; None: no limit, but work is cut to `USUAL_SECONDS` where it can be without harm.
        places: rows for each unknown of a product.
        start: when the work began.
        fitting: seconds that the products of rows will take, about.
    """

    memory: int = field(default_factory=lambda: machine_memory() // 4)
    seconds: float | None = None
    places: float = _PLACES
    start: float = field(default_factory=time.perf_counter)
    fitting: float = 0.0
    _held: int = 0

    @classmethod
    def of(cls, gigabytes: float | None, seconds: float | None) -> Limits:
        """Return limits from what a user gives; a quarter of the machine's memory where nothing is given."""
        memory = machine_memory() // 4 if gigabytes is None else int(gigabytes * 1e9)
        return cls(max(memory, _LEAST_MEMORY), seconds)

    # ------------------------------------------------------------ time
    @property
    def over(self) -> bool:
        """Whether the time is over; from then on, work that can be left out is."""
        return self.seconds is not None and time.perf_counter() - self.start > self.seconds

    def spent(self, part: float) -> bool:
        """Whether this part of the time is over."""
        return self.seconds is not None and time.perf_counter() - self.start > part * self.seconds

    def late(self, part: float) -> bool:
        """Whether this part of the time is over, or of what is usual where there is no limit."""
        return time.perf_counter() - self.start > part * (USUAL_SECONDS if self.seconds is None else self.seconds)

    @property
    def _allowed(self) -> float:
        """Seconds that are left of the limit; what is usual without one."""
        return USUAL_SECONDS if self.seconds is None else self.seconds - (time.perf_counter() - self.start)

    @contextmanager
    def ended_by_signals(self, wanted: bool) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the time instead of the program; a second one ends the program.

        Args:
            wanted: False, or a thread that is not the main one, leaves signals as they are.
        """
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def end(number: int, _frame: object) -> None:
            self.seconds = 0.0
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------ memory
    @property
    def cached(self) -> int:
        """Bytes of kept values above which one cache moves them to a file."""
        return self.memory // 16

    @property
    def entries(self) -> int:
        """Rows times places of one product that are held at a time, in float32."""
        return self.memory // 32

    @property
    def largest(self) -> int:
        """Summed places of the largest product that is refitted: about ten matrices of that size are held."""
        return math.isqrt(self.memory // 80)

    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Return zeros; those that would go beyond a quarter of the memory lie in a temporary file."""
        size = 8 * math.prod(shape)
        self._held += size
        if self._held <= self.memory // 4 or size < 1 << 20:
            return np.zeros(shape)
        try:
            with tempfile.TemporaryFile(prefix="cipm-ir-") as file:
                return np.asarray(np.memmap(file, np.float64, "w+", shape=shape))
        except OSError:  # no room there: memory may have more
            return np.zeros(shape)

    # ------------------------------------------------------------ the work
    def rows(self, size: int, least: int) -> int:
        """Return how many rows of a product of ``size`` summed places are enough, within the memory."""
        most = max(self.entries // max(size, 1), 2 * size)
        return min(max(int(least * self.places / _PLACES), int(self.places * size)), most)

    def fit_rows(self, products: Sequence[tuple[int, int]], times: float, least: int) -> None:
        """Take fewer rows for each unknown where the products would take more than their part of the time.

        Args:
            products: summed places and outputs of each.
            times: how often each is computed.
            least: rows of a small product.
        """
        flops = sum(2.0 * self.rows(size, least) * size * (size + 2 * width) for size, width in products)
        self.fitting = times * flops / _FLOPS
        share = _FITTING * self._allowed / max(self.fitting, 1e-9)
        if share < 1.0:
            self.places, self.fitting = max(_FEWEST_PLACES, _PLACES * share), self.fitting * share

    def samples(self, footprint: Footprint, count: int) -> int:
        """Return how many of the samples are looked at.

        All, or fewer where so many runs would take too long, or their values too much room in memory and files.
        """
        runs = _RUNNING * self._allowed * cores() / max(_RUNS * footprint.seconds, 1e-9)
        room = self.memory / max(2 * footprint.alive, 1)
        return count if min(runs, room) >= count else max(min(count, _LEAST_SAMPLES), int(min(runs, room)))

    def effort(self, footprint: Footprint, firsts: Sequence[int], probes: int, steps: int) -> Effort:
        """Return on how many samples and at how many levels sensitivity is measured.

        Args:
            footprint: of the model.
            firsts: the position of each candidate's first reader.
            probes: samples, where time is no matter.
            steps: levels, likewise.
        """
        tails = sum(footprint.tail(first) for first in firsts)
        budget = _SENSITIVITY * self._allowed
        for share, most in _LADDER:
            number, levels = max(min(probes, _LEAST_PROBES), int(probes * share)), min(steps, most)
            seconds = tails * levels * number * footprint.seconds / cores() + _OPENING * len(firsts)
            if seconds <= budget:
                break
        return Effort(number, levels, seconds, seconds <= 2 * budget)


@dataclass(frozen=True)
class Effort:
    """How sensitivity is measured.

    Attributes:
        probes: samples.
        steps: levels of each candidate.
        seconds: that the first measurement will take, about.
        again: whether there is time to measure again around a choice.
    """

    probes: int
    steps: int
    seconds: float
    again: bool


@dataclass(frozen=True)
class Footprint:
    """What one sample takes of a model.

    Attributes:
        alive: bytes of the values that are needed at one position of the graph, at most.
        whole: bytes of all values together.
        seconds: of a run on one core.
        made: bytes of the values that are computed before each position.
    """

    alive: int
    whole: int
    seconds: float
    made: Labels

    @classmethod
    def measure(cls, model: ir.Model, data: Data) -> Footprint:
        """Run one sample, and look at the sizes of all values that depend on the inputs.

        Of a model that cannot be run nothing is known; what needs its values refuses it with more to say.
        """
        try:
            return cls._measured(model, data)
        except UnsupportedError:
            return cls(0, 0, 0.0, np.zeros(1, np.int64))

    @classmethod
    def _measured(cls, model: ir.Model, data: Data) -> Footprint:
        lives = Lifetimes.of(model)
        tensors = {v.name: v for n in model.graph for v in n.outputs} | {v.name: v for v in model.graph.inputs}
        names = [name for name in lives.names if tensors[name].dtype in (*_PLAIN, None)]
        feeds = next(iter(batches(data, model, 1, limit=1)), None)
        if feeds is None or not names:
            return cls(0, 0, 0.0, np.zeros(lives.count + 1, np.int64))
        number = max(samples(feeds), 1)
        outputs = [v.name or "" for v in model.graph.outputs]
        seconds = min(_seconds(model, feeds, outputs) for _ in range(2)) / number
        inner = [name for name in names if name not in feeds]
        try:
            values = _values(model, feeds, inner)
        except CipmError:  # of unknown type, and no plain array
            values = _values(model, feeds, [name for name in inner if tensors[name].dtype is not None])
        size = {name: a.nbytes // number for name, a in {**feeds, **values}.items()}
        change = np.zeros(lives.count + 2, np.int64)
        made = np.zeros(lives.count + 1, np.int64)
        for name, first, last in zip(lives.names, lives.made.tolist(), lives.last.tolist(), strict=True):
            change[max(first, 0)] += size.get(name, 0)
            change[max(last, first, 0) + 1] -= size.get(name, 0)
            made[first + 1] += size.get(name, 0)
        return cls(int(np.cumsum(change).max()), sum(size.values()), seconds, np.cumsum(made))

    def tail(self, position: int) -> float:
        """Return which part of a run lies behind a position, 0 to 1, by the bytes that are written."""
        return 1.0 - float(self.made[min(position, len(self.made) - 1)]) / max(float(self.made[-1]), 1.0)

    def batch(self, memory: int) -> int:
        """Return how many samples may be run at once, where all values of them are held."""
        return max(1, min(BATCH, memory // 16 // max(self.whole, 1)))


def _values(model: ir.Model, feeds: Feeds, names: Sequence[str]) -> Feeds:
    with Runner(extract_subgraph(model, None, names), fast=True, own=True, threads=1) as runner:
        return runner.run({k: v for k, v in feeds.items() if k in runner.inputs}, names)


def _seconds(model: ir.Model, feeds: Feeds, names: Sequence[str]) -> float:
    with Runner(extract_subgraph(model, None, names), fast=True, own=True, threads=1) as runner:
        given = {k: v for k, v in feeds.items() if k in runner.inputs}
        runner.run(given, names)
        begin = time.perf_counter()
        runner.run(given, names)
        return time.perf_counter() - begin
