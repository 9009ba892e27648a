"""Run a model over data and see its inner values, batch by batch: one batch at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.nested import captured_values
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, sample_count
from cipm_ir.runtime.session import Array, Runner


def observe(
    model: ir.Model,
    names: Sequence[str],
    data: Data,
    *,
    size: int = 64,
    limit: int | None = None,
    start: int = 0,
    progress: Callable[[str, float | None], None] | None = None,
    what: str = "run the model",
) -> Iterator[tuple[Feeds, dict[str, Array]]]:
    """Feeds, and the values of these names (inner values or outputs of the graph), for each batch of the data.

    Args:
        model: not changed; only what the names need is run, with onnxruntime's optimizations.
        names: values of the main graph.
        data: as for `cipm_ir.runtime.inputs.generate.batches`.
        size: samples per batch, where the model does not fix it.
        limit: at most this many samples; a model that fixes its batches gets whole ones.
        start: the number of the first sample, where the data is a part of something larger; errors count from there.
        progress: called with ``what`` and the fraction done, where the number of samples is known.
        what: the word for the progress.

    Raises:
        InputError: the data does not fit the model, holds no samples, or makes a value NaN or infinite.
    """
    seen = 0
    known = None if progress is None else sample_count(data, model, limit=limit)
    total = limit if known is None else known
    with Runner(extract_subgraph(model, None, names), fast=True, own=True) as runner:
        for feeds in batches(data, model, size, limit=limit):
            values = runner.run({k: v for k, v in feeds.items() if k in runner.inputs}, names)
            check_values(model, values, start + seen, feeds)
            seen += samples(feeds)
            if progress is not None:
                progress(what, None if not total else min(seen / total, 1.0))
            yield feeds, values
    if not seen:
        raise InputError("The data holds no samples.")


def extract_subgraph(
    model: ir.Model, inputs: Mapping[str, Array] | None, outputs: Sequence[str], loose: Sequence[str] = ()
) -> ir.Model:
    """Return a copy of the nodes between some values; nothing else of the model is copied.

    Args:
        model: not changed; its weights are shared.
        inputs: values to start at, with arrays that have their types; those that are not needed are left out. None
            starts at the inputs of the model.
        outputs: names of values of the main graph.
        loose: initializers that become inputs too.

    Raises:
        InputError: there is no value of this name.
    """
    graph, arrays = model.graph, dict(inputs or {})
    found = _Extract(set(outputs), set(arrays))
    for node in reversed(graph):
        if not found.left:
            break
        found.visit(node)
    found.finish(graph)
    missing = [name for name in outputs if name not in found.values]
    if missing:
        raise InputError(f"The graph has no value {missing[0]!r} to look at.")
    needed = found.values
    starts = [v for v in graph.inputs if v.name in needed and v.name not in arrays]
    if inputs is not None:
        starts = [v for v in starts if v.is_initializer()]
    starts = [v for v in starts if v.name not in loose]
    starts += [needed[name] for name in (*arrays, *loose) if name in needed]
    held = [v for v in graph.initializers.values() if v.name in needed and v.name not in (*arrays, *loose)]
    copy = ir.GraphView(
        starts, [needed[name] for name in outputs], nodes=found.nodes[::-1], initializers=held,
        opset_imports=dict(graph.opset_imports), name=graph.name,
    ).clone()  # fmt: skip
    for value in copy.inputs:
        if value.name in arrays:
            array = arrays[value.name]
            dims = [None if value.shape is None else value.shape[k] for k in range(array.ndim)]
            value.shape, value.type = ir.Shape(dims), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.const_value = None
        elif value.name in loose:
            assert value.const_value is not None
            value.shape, value.dtype = ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
            value.const_value = None
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(copy, ir_version=model.ir_version, functions=functions)


@dataclass
class _Extract:
    """The nodes and values that some values need, collected from the end of a graph on.

    Attributes:
        left: names of values whose producer is still to come.
        cut: names of values behind which nothing is needed.
        values: what is needed, by name.
        nodes: in reverse order.
    """

    left: set[str]
    cut: set[str]
    values: dict[str, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)

    def visit(self, node: ir.Node) -> None:
        """Take a node if one of its outputs is needed."""
        made = [value for value in node.outputs if value.name in self.left]
        self.values.update((value.name or "", value) for value in made)
        self.left.difference_update(value.name or "" for value in made)
        if all(value.name in self.cut for value in made):
            return
        self.nodes.append(node)
        for value in (*node.inputs, *captured_values(node)):
            if value is None or value.name in self.values:
                continue
            if value.producer() is None or value.name in self.cut:
                self.values[value.name or ""] = value
            else:
                self.left.add(value.name or "")

    def finish(self, graph: ir.Graph) -> None:
        """Find outputs that no node computes."""
        others = (*graph.inputs, *graph.initializers.values()) if self.left else ()
        self.values.update((v.name or "", v) for v in others if v.name in self.left)


def check_values(model: ir.Model, values: dict[str, Array], start: int, feeds: Feeds | None = None) -> None:
    """Refuse NaN and infinity; a mask may hold minus infinity, which a softmax turns into nothing.

    Raises:
        InputError: the message names the value, the node that made it, and the samples; and the input, where that is
            the cause.
    """
    for name, array in values.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all() and not _is_mask(array):
            maker = next((n for n in model.graph if any(v.name == name for v in n.outputs)), None)
            made = "" if maker is None else f", made by {maker.op_type} {maker.name}"
            stop = start + (len(array) if array.ndim else 1) - 1
            raise InputError(
                f"The value {name!r}{made}, is NaN or infinite on samples {start} to {stop} of the data; "
                f"{_bad_feed(feeds or {}, start) or 'repair the model, or leave these samples out'}."
            )


def _is_mask(array: Array) -> bool:
    """Return whether a value is zero where it is not minus infinity: what is added to scores before a softmax."""
    shown = array == 0
    return bool(shown.any() and (shown | np.isneginf(array)).all())


def _bad_feed(feeds: Feeds, start: int) -> str:
    """Return which input is no number already; asked only where a value is none, as a mask may well hold infinities."""
    for name, array in feeds.items():
        if array.dtype.kind == "f" and array.ndim and not np.isfinite(array).all():
            first = start + int(np.argmax(~np.isfinite(array).reshape(len(array), -1).all(axis=1)))
            return f"input {name!r} is so already, first on sample {first}: repair it, or leave it out"
    return ""


def samples(feeds: Feeds) -> int:
    """Return how many samples a batch holds."""
    return max((len(a) for a in feeds.values() if a.ndim), default=1)


def count_samples(model: ir.Model, data: Data, size: int, limit: int | None) -> int:
    """Return how many samples there are, up to a limit; counted without reading them, but for an iterable's."""
    known = sample_count(data, model, limit=limit)
    if known is not None:
        return known
    return sum(samples(feeds) for feeds in batches(data, model, size, limit=limit))
