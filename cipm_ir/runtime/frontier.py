"""A model run over data in steps: the values that the rest of the graph needs are kept, so nothing is run twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs import Data, Feeds, batches
from cipm_ir.runtime.observe import check_values, part, samples
from cipm_ir.runtime.session import Array, Runner

_IN_MEMORY = 1 << 30
"""Bytes of kept values above which they go to a temporary file."""


class Frontier:
    """Values of a model over data, up to a position in its graph.

    ``position``: the nodes before it have been run. ``values[k]``: for batch k, all values that nodes from there on, or
    the outputs, read. What depends on no input is never kept: it is computed again where it is needed, from the weights
    of the model that runs then. Use it as a context manager, or call `close`.
    """

    def __init__(self, model: ir.Model, data: Data, *, size: int = 64, limit: int | None = None) -> None:
        self.position = 0
        self.values: list[Feeds] = []
        self.samples: list[int] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0
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
        live = list(dict.fromkeys([*_live(model, to), *keep]))
        have = set(self.values[0])
        fresh = [name for name in live if name not in have]
        if fresh:
            made: list[Feeds] = []
            start = 0
            with self._runner(model, fresh) as runner:
                for known, count in zip(self.values, self.samples, strict=True):
                    out = runner.run({k: v for k, v in known.items() if k in runner.inputs}, fresh)
                    check_values(model, out, start)
                    start += count
                    made.append({**{k: v for k, v in known.items() if k in live}, **out})
            self.values = made
        else:
            self.values = [{k: v for k, v in known.items() if k in live} for known in self.values]
        self.position = max(to, self.position)
        self._spill()

    def tail(self, model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Values of these names for each batch, from here on with the weights of ``model``."""
        have = self.values[0]
        missing = [name for name in names if name not in have]
        if not missing:
            yield from ({name: known[name] for name in names} for known in self.values)
            return
        with self._runner(model, missing) as runner:
            for known in self.values:
                out = runner.run({k: v for k, v in known.items() if k in runner.inputs}, missing)
                yield {name: out[name] if name in out else known[name] for name in names}

    def fork(self) -> Frontier:
        """Another one at the same place, which shares what is kept."""
        twin = object.__new__(Frontier)
        twin.position, twin.values, twin.samples = self.position, list(self.values), self.samples
        twin._folder, twin._written = None, 0
        return twin

    def _runner(self, model: ir.Model, names: Sequence[str]) -> Runner:
        return Runner(part(model, self.values[0], names), fast=True)

    def _spill(self) -> None:
        """Move arrays to a file once there is too much of them."""
        total = sum(a.nbytes for known in self.values for a in known.values() if not isinstance(a, np.memmap))
        if total <= _IN_MEMORY:
            return
        old, self._folder = self._folder, tempfile.TemporaryDirectory(prefix="cipm-ir-")
        for known in self.values:
            for name, array in known.items():
                if array.nbytes > 1 << 16:
                    path = Path(self._folder.name, f"{self._written}.npy")
                    np.save(path, array)
                    known[name] = np.load(path, mmap_mode="r")
                    self._written += 1
        if old is not None:
            old.cleanup()

    def close(self) -> None:
        """Forget everything, temporary files included."""
        self.values = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Frontier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def moving(model: ir.Model) -> set[str]:
    """Names of the values that depend on an input of the graph."""
    found = {v.name or "" for v in model.graph.inputs if v.name not in model.graph.initializers}
    for node in model.graph:
        inner = any(not v.is_initializer() for v in _captured(node))
        if inner or any(v is not None and v.name in found for v in node.inputs):
            found.update(v.name for v in node.outputs if v.name)
    return found


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values of the graph around that the subgraphs of a node read."""
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)


def _live(model: ir.Model, position: int) -> list[str]:
    """Values made before a position, and read from there on or given out; in the order of the graph."""
    known = moving(model)
    before = {v.name for v in model.graph.inputs}
    needed: set[str] = {v.name or "" for v in model.graph.outputs}
    for k, node in enumerate(model.graph):
        if k < position:
            before.update(v.name for v in node.outputs)
        else:
            needed.update(v.name or "" for v in (*node.inputs, *_captured(node)) if v is not None)
    return [name for name in known if name in before and name in needed]
