"""Statistics collected by many workers: shards of the data, added up in their order. Ray, processes, or this process.

The numbers depend on how the data is cut, not on who runs what: equal ``shard`` gives equal bits on every engine, and
another cut differs by rounding alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError, OptionError, UnsupportedError
from cipm_ir.ir.parameters import named
from cipm_ir.runtime.activations.observe import samples
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, sample_count
from cipm_ir.runtime.statistics.collect import gather, joined, readable_again
from cipm_ir.runtime.statistics.moments import Array
from cipm_ir.runtime.statistics.plan import Plan, Request, follow, make_plan, several
from cipm_ir.runtime.statistics.store import Statistics
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Progress = Callable[[str, float | None], None]

SHARD = 1024
"""Default number of samples in a shard."""
_LARGE = 1 << 16
_LISTS = frozenset({"lags", "measures"})


@runtime_checkable
class Engine(Protocol):
    """Where shards run. ``close`` frees what the engine itself has started."""

    workers: int

    def share(self, thing: Any) -> Any:
        """Hand a large object to all workers once; what is returned stands for it in `submit`."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a call; returns a handle for `result`."""

    def result(self, handle: Any) -> Any:
        """Wait for a call: what it returned, or the exception that it raised."""

    def close(self) -> None:
        """Stop the workers that belong to this engine."""


class Local:
    """Runs everything here, one call after the other."""

    workers = 1

    def share(self, thing: Any) -> Any:
        """Return the thing."""
        return thing

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result itself."""
        return function(*arguments)

    def result(self, handle: Any) -> Any:
        """Return the result."""
        return handle

    def close(self) -> None:
        """Nothing to stop."""


@dataclass(frozen=True)
class _Stored:
    """A large object in a file, which each worker process reads once."""

    path: str


@functools.lru_cache(maxsize=4)
def _read(stored: _Stored) -> Any:
    with Path(stored.path).open("rb") as file:
        return pickle.load(file)  # written by this run, in a folder that only this user can open


def _resolved(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*(_read(one) if isinstance(one, _Stored) else one for one in arguments))


class Processes:
    """Worker processes on this machine. Scripts that use it need the guard ``if __name__ == "__main__":``."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or os.cpu_count() or 1
        # spawn: a fork of a process in which onnxruntime has threads can hang
        self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        self._folder = tempfile.TemporaryDirectory(prefix="cipm-ir-")
        self._shared = 0

    def share(self, thing: Any) -> Any:
        """Return the file that holds it."""
        self._shared += 1
        path = Path(self._folder.name) / str(self._shared)
        with path.open("wb") as file:
            pickle.dump(thing, file, protocol=pickle.HIGHEST_PROTOCOL)
        return _Stored(str(path))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a future."""
        return self._pool.submit(_resolved, function, arguments)

    def result(self, handle: Any) -> Any:
        """Return the future's result."""
        return handle.result()

    def close(self) -> None:
        """Stop the workers; calls that wait are dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()


class Ray:
    """A Ray cluster: the one this process is connected to, or else a new one on this machine.

    Its workers need this package installed.

    Raises:
        UnsupportedError: ray is not installed.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UnsupportedError(
                'The engine "ray" needs Ray; install it with pip install "cipm-ir[ray]", or use engine="processes".'
            ) from error
        self._mine = not self._ray.is_initialized()
        if self._mine:
            self._ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        self.workers = workers or max(int(self._ray.cluster_resources().get("CPU", 1)), 1)
        self._remote: dict[Callable[..., Any], Any] = {}

    def share(self, thing: Any) -> Any:
        """Return a reference in the object store."""
        return self._ray.put(thing)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a reference to what will be the result."""
        if function not in self._remote:
            self._remote[function] = self._ray.remote(function)
        return self._remote[function].remote(*arguments)

    def result(self, handle: Any) -> Any:
        """Return the result; an error of this package comes back as itself."""
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, CipmError):
                raise cause from error
            raise

    def close(self) -> None:
        """Stop Ray where this engine started it."""
        if self._mine:
            self._ray.shutdown()


ENGINES: dict[str, Callable[[int | None], Engine]] = {
    "ray": Ray,
    "processes": Processes,
    "local": lambda _: Local(),
}


def collect(
    program: Program,
    data: Data,
    *,
    engine: str | Engine = "ray",
    workers: int | None = None,
    shard: int = SHARD,
    spaces: Iterable[Space | str] | None = None,
    size: int = 64,
    limit: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Statistics:
    """Return the same as `cipm_ir.runtime.statistics.collect.collect`, by several workers.

    At most two shards of the data for each worker are in flight. A path or a dict of arrays is cut into shards of
    ``shard`` samples; of an iterable (such as ``dataset.iter_batches()`` of a Ray data set), items are put together to
    shards as they come.

    Args:
        program: what to run; each worker gets it once.
        data: as for `cipm_ir.runtime.inputs.generate.batches`.
        engine: "ray", "processes", "local", or an object like `Engine`, which is not closed.
        workers: how many; None takes all CPUs.
        shard: samples in one piece of work; batches do not reach over its end.
        spaces, size, limit, progress: as there.
        options: all others that it has.

    Raises:
        UnsupportedError: Ray is not installed.
        OptionError: no such engine or option.
        InputError, SymmetryError: as there.
    """
    if isinstance(engine, str) and engine not in ENGINES:
        raise OptionError(f"There is no engine {engine!r}; there are {', '.join(ENGINES)}.")
    for name, given in (("shard", shard), ("size", size)):
        if given < 1:
            raise OptionError(f"{name} is {given}; it must be at least 1.")
    try:
        chosen: dict[str, Any] = {name: several(v) if name in _LISTS else v for name, v in options.items()}
        request = Request(**chosen)
    except TypeError as error:
        raise OptionError(f"An unknown option: {error}.") from error
    plan = make_plan(program, request, spaces)
    with contextlib.ExitStack() as stack:
        running = engine if not isinstance(engine, str) else ENGINES[engine](workers)
        if isinstance(engine, str):
            stack.callback(running.close)
        job = _Job(program.model, data, running, shard, size, limit, progress)
        found = job.run(plan, "collect statistics")
        second = follow(plan, found) if readable_again(data) else None
        return found if second is None else joined(found, job.run(second, "follow strongest pairs"))


@dataclass
class _Job:
    model: ir.Model
    data: Data
    engine: Engine
    shard: int
    size: int
    limit: int | None
    progress: Progress | None

    def run(self, plan: Plan, what: str) -> Statistics:
        """Submit shards while they last, at most two for each worker ahead, and add up what comes back, in order."""
        packed, shared = self.engine.share(pack(self.model)), self.engine.share(plan)
        waiting: deque[tuple[Any, int]] = deque()
        total: Statistics | None = None
        done = 0
        known = sample_count(self.data, self.model, limit=self.limit) if self.progress is not None else None
        known = self.limit if known is None else known
        source = _shards(self.data, self.model, self.shard, self.limit)
        more = True
        while more or waiting:
            while more and len(waiting) < 2 * self.engine.workers:
                piece = next(source, None)
                more = piece is not None
                if piece is not None:
                    start, feeds = piece
                    handle = self.engine.submit(work, packed, shared, feeds, self.size, start)
                    waiting.append((handle, samples(feeds)))
            if not waiting:
                break
            handle, count = waiting.popleft()
            part = self.engine.result(handle)
            total = part if total is None else total + part
            done += count
            if self.progress is not None:
                self.progress(what, min(done / known, 1.0) if known else None)
        if total is None:
            raise InputError("The data holds no samples.")
        return total


def work(packed: Packed, plan: Plan, feeds: Feeds, size: int, start: int) -> Statistics:
    """Return what a worker does with one shard; ``start`` is the number of its first sample."""
    return gather(unpack(packed), plan, feeds, size=size, start=start)


def _shards(data: Data, model: ir.Model, shard: int, limit: int | None) -> Iterator[tuple[int, Feeds]]:
    """(number of the first sample, feeds) of pieces of about ``shard`` samples."""
    start, waiting, held = 0, list[Feeds](), 0
    for feeds in batches(data, model, shard, limit=limit):
        waiting.append(feeds)
        held += samples(feeds)
        if held >= shard:
            yield start, _put_together(waiting)
            start, waiting, held = start + held, [], 0
    if waiting:
        yield start, _put_together(waiting)


def _put_together(pieces: list[Feeds]) -> Feeds:
    if len(pieces) == 1:
        return pieces[0]
    return {k: np.concatenate([p[k] for p in pieces]) if first.ndim else first for k, first in pieces[0].items()}


# ------------------------------------------------------------ sending a model
@dataclass(frozen=True)
class Packed:
    """A model as bytes without its large tensors, and these as arrays, so that no limit of protobuf's matters."""

    structure: bytes
    arrays: Mapping[str, Array]


def pack(model: ir.Model) -> Packed:
    """Return a model for another process."""
    copy = model.clone()
    arrays = {}
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        # A worker may stand in another folder, or on another machine: what lies in a file beside the model goes along.
        if tensor.nbytes < _LARGE and not isinstance(tensor, ir.ExternalTensor):
            value.const_value = named(tensor, name)
            continue
        arrays[name] = np.asarray(tensor.numpy())
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor("sent_apart", 0, None, tensor.dtype, shape=shape, name=name)
    for inner in copy.graph.subgraphs():
        for name, value in inner.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(np.asarray(value.const_value.numpy()), name=name)
    return Packed(ir.to_proto(copy).SerializeToString(), arrays)


def unpack(packed: Packed) -> ir.Model:
    """Return the model that was packed."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(packed.structure))
    for name, array in packed.arrays.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
    return model
