"""Run a model over data and see its inner values, batch by batch: one batch at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
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
    with Runner(extract_subgraph(model, None, names), fast=True) as runner:
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
    """A copy of the nodes between some values; ``inputs`` None starts at the inputs of the model.

    Of ``inputs`` only those that are read are kept; their arrays tell the types. ``loose``: initializers that become
    inputs too.

    Raises:
        InputError: there is no value of this name.
    """
    copy = model.clone()
    known = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    missing = [name for name in outputs if name not in known]
    if missing:
        raise InputError(f"The graph has no value {missing[0]!r} to look at.")
    copy.graph.outputs.clear()  # a slice deletion would leave the values marked as outputs
    starts = list(copy.graph.inputs)
    if inputs is not None:
        starts = [v for v in starts if v.is_initializer()]
        for name, array in inputs.items():
            old = known[name]
            dims = [None if old.shape is None else old.shape[k] for k in range(array.ndim)]
            fresh = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
            old.name = f"{name}.before"
            old.replace_all_uses_with(fresh)
            starts.append(fresh)
    for name in loose:
        value = copy.graph.initializers.pop(name)
        assert value.const_value is not None
        value.shape, value.dtype, value.const_value = (
            ir.Shape(value.const_value.shape.numpy()),
            value.const_value.dtype,
            None,
        )
        starts = [*(v for v in starts if v is not value), value]
    copy.graph.outputs.extend(known[name] for name in outputs)
    _prune(copy.graph)
    copy.graph.inputs.clear()
    copy.graph.inputs.extend(v for v in starts if v.uses() or v.is_graph_output())
    return copy


def _prune(graph: ir.Graph) -> None:
    """Drop nodes and initializers that no output needs."""
    for node in reversed(list(graph)):
        if all(not v.uses() and not v.is_graph_output() for v in node.outputs):
            _let_go(node)
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _let_go(node: ir.Node) -> None:
    """Make the subgraphs of a node read nothing: removing it would leave the values around marked as read there."""
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                for k in range(len(inner.inputs)):
                    inner.replace_input_with(k, None)


def check_values(model: ir.Model, values: dict[str, Array], start: int, feeds: Feeds | None = None) -> None:
    """Refuse NaN and infinity; a mask may hold minus infinity, which a softmax turns into nothing.

    Raises:
        InputError: naming the value, the node that made it, and the samples; and the input, where that is the cause.
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
    """Whether a value is zero where it is not minus infinity: what is added to scores before a softmax."""
    shown = array == 0
    return bool(shown.any() and (shown | np.isneginf(array)).all())


def _bad_feed(feeds: Feeds, start: int) -> str:
    """Which input is no number already; asked only where a value is none, as a mask may well hold infinities."""
    for name, array in feeds.items():
        if array.dtype.kind == "f" and array.ndim and not np.isfinite(array).all():
            first = start + int(np.argmax(~np.isfinite(array).reshape(len(array), -1).all(axis=1)))
            return f"input {name!r} is so already, first on sample {first}: repair it, or leave it out"
    return ""


def samples(feeds: Feeds) -> int:
    """How many samples a batch holds."""
    return max((len(a) for a in feeds.values() if a.ndim), default=1)
