"""A model run over data in steps: the values that the rest of the graph needs are kept, so nothing is run twice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from threading import Lock

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.labels import Labels
from cipm_ir.ir.nested import captured_values
from cipm_ir.runtime.activations.observe import check_values, extract_subgraph, samples
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches
from cipm_ir.runtime.session import Array, Runner, cores

_IN_MEMORY = 1 << 30
"""Bytes of kept values above which they go to a temporary file."""
_LEAST_STEP = 16
"""Nodes between two positions behind which the rest of a graph is shared, at least."""


class ActivationCache:
    """Values of a model over data, up to a position in its graph.

    ``position``: the nodes before it have been run, in the order of the walk (`cipm_ir.ir.bodies.nodes_in_order`).
    ``values[k]``: for batch k, all values that nodes from there on, or the outputs, read. What depends on no input is
    never kept: it is computed again where it is needed, from the weights of the model that runs then. Use it as a
    context manager, or call `close`. ``memory``: bytes of kept values above which they go to a temporary file.
    """

    def __init__(
        self, model: ir.Model, data: Data, *, size: int = 64, limit: int | None = None, memory: int | None = None
    ) -> None:
        self.position = 0
        self.values: list[Feeds] = []
        self.samples: list[int] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0
        self._memory = memory
        self._lifetimes = Lifetimes.of(model)
        names = {v.name for v in model.graph.inputs}
        for feeds in batches(data, model, size, limit=limit):
            self.samples.append(samples(feeds))
            self.values.append({k: v for k, v in feeds.items() if k in names})
        if not self.values:
            raise InputError("The data holds no samples.")

    def advance(self, model: ir.Model, to: int, keep: Sequence[str] = ()) -> None:
        """Run the nodes from `position` to ``to`` (excluded); ``keep``: values that stay even if nothing reads them.

        Raises:
            InputError: a value is NaN or infinite.
        """
        live = list(dict.fromkeys([*self._lifetimes.across(to), *keep]))
        have = set(self.values[0])
        fresh = [name for name in live if name not in have]
        if fresh:
            with self._runner(model, fresh) as runner:
                self.values = self._each(lambda k: self._stepped(model, runner, k, fresh, live))
        else:
            self.values = [{k: v for k, v in known.items() if k in live} for known in self.values]
        self.position = max(to, self.position)
        self._spill()

    def _stepped(self, model: ir.Model, runner: Runner, k: int, fresh: Sequence[str], live: Sequence[str]) -> Feeds:
        known = self.values[k]
        out = runner.run({name: v for name, v in known.items() if name in runner.inputs}, fresh)
        check_values(model, out, sum(self.samples[:k]))
        return {**{name: v for name, v in known.items() if name in live}, **out}

    def tail(self, model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Yield values of these names for each batch, from here on with the weights of ``model``."""
        with SuffixRunner(self, model, names) as rest:
            yield from rest.run()

    def _each(self, job: Callable[[int], Feeds]) -> list[Feeds]:
        """Return what a job gives for each batch; several run at once."""
        if len(self.values) == 1:
            return [job(0)]
        with ThreadPoolExecutor(max(1, min(cores(), len(self.values)))) as pool:
            return list(pool.map(job, range(len(self.values))))

    def fork(self) -> ActivationCache:
        """Return another one at the same place, which shares what is kept."""
        twin = object.__new__(ActivationCache)
        twin.position, twin.values, twin.samples = self.position, list(self.values), self.samples
        twin._folder, twin._written, twin._lifetimes, twin._memory = None, 0, self._lifetimes, self._memory
        return twin

    def _runner(self, model: ir.Model, names: Sequence[str], loose: Sequence[str] = ()) -> Runner:
        return self._opened(extract_subgraph(model, self.values[0], names, loose))

    def _opened(self, part: ir.Model) -> Runner:
        # a batch per core leaves less waiting than a product spread over the cores
        threads = 1 if len(self.values) >= cores() else None
        return Runner(part, fast=True, threads=threads, own=True)

    def _spill(self) -> None:
        """Move arrays to files once there is too much of them; files that nothing here needs any more go."""
        held = [(known, name) for known in self.values for name, a in known.items() if not isinstance(a, np.memmap)]
        most = _IN_MEMORY if self._memory is None else self._memory
        if sum(known[name].nbytes for known, name in held) > most:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="cipm-ir-")
            for known, name in held:
                if known[name].nbytes > 1 << 16:
                    path = Path(self._folder.name, f"{self._written}.npy")
                    np.save(path, known[name])
                    known[name] = np.load(path, mmap_mode="r")
                    self._written += 1
        if self._folder is not None:
            used = {
                Path(str(a.filename)).name for known in self.values for a in known.values() if isinstance(a, np.memmap)
            }
            for path in Path(self._folder.name).iterdir():
                if path.name not in used:
                    with suppress(PermissionError):  # on Windows, where a fork still reads it
                        path.unlink()

    def close(self) -> None:
        """Forget everything, temporary files included."""
        self.values = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SuffixRunner:
    """The rest of a graph, ready to run from where a cache is; some weights may differ from run to run.

    ``loose``: names of these weights. ``ends``: where given, only the nodes up to a position behind all loose weights
    are opened, and what follows is shared with others. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        frontier: ActivationCache,
        model: ir.Model,
        names: Sequence[str],
        loose: Sequence[str] = (),
        ends: SharedEnds | None = None,
    ) -> None:
        self._frontier, self._names = frontier, list(names)
        self._own = {name: _array(model, name) for name in loose}
        self._ends = ends
        self._cut = None if ends is None else ends.behind(frontier, loose)
        wanted = self._names if self._cut is None else frontier._lifetimes.across(self._cut)
        self._missing = [name for name in wanted if name not in frontier.values[0]]
        self._runner = frontier._runner(model, self._missing, loose) if self._missing else None

    def run(self, weights: Mapping[str, Array] | None = None) -> list[dict[str, Array]]:
        """Return the values for each batch.

        ``weights``: of the loose ones those that differ from the model's, any float.
        """
        given = {k: np.asarray((weights or {}).get(k, own)).astype(own.dtype) for k, own in self._own.items()}
        return self._frontier._each(lambda k: self._run(k, given))

    def _run(self, k: int, given: Feeds) -> Feeds:
        known, runner = self._frontier.values[k], self._runner
        out = known
        if runner is not None:
            fed = {n: v for n, v in {**known, **given}.items() if n in runner.inputs}
            out = {**known, **runner.run(fed, self._missing)}
        if self._ends is not None and self._cut is not None:
            out = {**out, **self._ends.run(self._cut, out, self._frontier)}
        return {name: out[name] for name in self._names}

    def close(self) -> None:
        """Free the session."""
        if self._runner is not None:
            self._runner.close()

    def __enter__(self) -> SuffixRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedEnds:
    """The ends of a graph behind some positions, each opened once, for many runs that differ in front of them.

    Without them, a run of the rest of the graph for each of n layers opens sessions of about n * n / 2 layers in all.

    Args:
        model: its weights must not change meanwhile.
        names: the values that the ends compute.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        self.model, self.names = model, list(names)
        self._runners: dict[int, tuple[Runner, list[str]]] = {}
        self._lock = Lock()

    def behind(self, cache: ActivationCache, loose: Sequence[str]) -> int | None:
        """Return the first shared position behind a cache and all uses of some weights; None where little is left."""
        lifetimes = cache._lifetimes
        step = max(_LEAST_STEP, 2 * isqrt(lifetimes.count))
        last = max([cache.position, *(lifetimes.reach.get(name, lifetimes.count) for name in loose)])
        cut = (last // step + 1) * step
        return cut if cut + step <= lifetimes.count else None

    def run(self, cut: int, values: Feeds, cache: ActivationCache) -> dict[str, Array]:
        """Run the end behind a position, on the values of one batch that are live there."""
        with self._lock:
            if cut not in self._runners:
                live = {name: values[name] for name in cache._lifetimes.across(cut)}
                missing = [name for name in self.names if name not in live]
                self._runners[cut] = cache._opened(extract_subgraph(self.model, live, missing)), missing
        runner, missing = self._runners[cut]
        return runner.run({name: v for name, v in values.items() if name in runner.inputs}, missing)

    def close(self) -> None:
        """Free the sessions."""
        for runner, _ in self._runners.values():
            runner.close()
        self._runners.clear()

    def __enter__(self) -> SharedEnds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _array(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def moving(model: ir.Model) -> set[str]:
    """Return names of the values that depend on an input of the graph."""
    found = {v.name or "" for v in model.graph.inputs if v.name not in model.graph.initializers}
    for node in model.graph:
        inner = any(not v.is_initializer() for v in captured_values(node))
        if inner or any(v is not None and v.name in found for v in node.inputs):
            found.update(v.name for v in node.outputs if v.name)
    return found


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """Where the values of a graph that depend on its inputs are computed, and where they are used last.

    Attributes:
        names: of the values, in the order of the graph.
        made: position of the producer of each; -1 for inputs of the graph.
        last: the last position that uses each; outputs of the graph are used behind all nodes.
        reach: by name of what depends on no input, the last position that uses it, or what is computed from it alone.
        count: of all nodes.
    """

    names: list[str]
    made: Labels
    last: Labels
    reach: dict[str, int]
    count: int

    @classmethod
    def of(cls, model: ir.Model) -> Lifetimes:
        """Look at the main graph: values inside bodies are never kept."""
        known, graph = moving(model), model.graph
        made: dict[str, int] = {v.name or "": -1 for v in graph.inputs if v.name in known}
        last: dict[str, int] = {}
        nodes = nodes_in_order(graph)
        for k, node in enumerate(nodes):
            if node.graph is graph:
                last.update((v.name or "", k) for v in (*node.inputs, *captured_values(node)) if v is not None)
                made.update((v.name or "", k) for v in node.outputs if v.name in known)
        last.update((v.name or "", len(nodes)) for v in graph.outputs)
        reach: dict[str, int] = {}
        for k, node in reversed(list(enumerate(nodes))):
            if node.graph is graph:
                moves = any(v.name in known for v in node.outputs)
                end = k if moves else max((reach.get(v.name or "", k) for v in node.outputs), default=k)
                for v in (*node.inputs, *captured_values(node)):
                    if v is not None and v.name not in known:
                        reach[v.name or ""] = max(reach.get(v.name or "", end), end)
        names = list(made)
        first, final = (np.asarray([found.get(x, -1) for x in names]) for found in (made, last))
        return cls(names, first, final, reach, len(nodes))

    def across(self, position: int) -> list[str]:
        """Return the values computed before a position, and used from there on or given out, in graph order."""
        return [self.names[k] for k in np.flatnonzero((self.made < position) & (self.last >= position))]
