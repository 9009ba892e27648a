"""Copies of a model with one difference each: in every tensor, every attribute, and in its structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, helper, numpy_helper

Array = NDArray[Any]
KINDS = ("entry", "order", "swap")


def graphs(graph: Any) -> Iterator[Any]:
    """A graph (or function) and all graphs inside."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from graphs(inner)


def tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every initializer, and every tensor that is an attribute, in a fixed order."""
    found: list[onnx.TensorProto] = []
    for top in (model.graph, *model.functions):
        for graph in graphs(top):
            found.extend(getattr(graph, "initializer", ()))
            for node in graph.node:
                found.extend(a.t for a in node.attribute if a.type == AttributeProto.TENSOR)
    return found


def attributes(model: onnx.ModelProto) -> list[AttributeProto]:
    """Every attribute that is a number, a string or a list of such, in a fixed order."""
    plain = (
        AttributeProto.FLOAT,
        AttributeProto.INT,
        AttributeProto.STRING,
        AttributeProto.FLOATS,
        AttributeProto.INTS,
    )
    nodes = (node for top in (model.graph, *model.functions) for graph in graphs(top) for node in graph.node)
    return [a for node in nodes for a in node.attribute if a.type in plain and not a.ref_attr_name]


def changed(array: Array, kind: str) -> Array | None:
    """An array with one entry changed, two rows of an axis exchanged, or an axis in another order; None if equal."""
    if array.dtype.kind in "OSU" or not array.size:
        return None
    out = array.copy()
    if kind == "entry":
        place = int(np.argmax(np.abs(array.astype(np.float64)))) if array.dtype.kind != "b" else 0
        old = out.flat[place]
        out.flat[place] = ~old if array.dtype.kind == "b" else old ^ 1 if array.dtype.kind in "iu" else old * 1.5 + 0.25
    else:
        long = [a for a, n in enumerate(array.shape) if n > 1]
        if not long:
            return None
        axis = max(long, key=lambda a: array.shape[a])
        order = np.arange(array.shape[axis])
        order = np.roll(order, 1) if kind == "order" else np.r_[order[-1], order[1:-1], order[0]]
        out = array.take(order, axis=axis)
    return None if np.array_equal(out, array) else out


def planted(model: onnx.ModelProto, kinds: Sequence[str] = ()) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Copies with one tensor changed: in every way of ``kinds``, by default in one way each, which alternates."""
    for index, tensor in enumerate(tensors(model)):
        try:
            array = numpy_helper.to_array(tensor)
        except (TypeError, ValueError):  # types that numpy lacks
            continue
        ways = kinds or [kind for kind in np.roll(KINDS, -index).tolist() if changed(array, kind) is not None][:1]
        for kind in ways:
            new = changed(array, kind)
            if new is None:
                continue
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            tensors(copy)[index].CopyFrom(numpy_helper.from_array(new.astype(array.dtype), tensor.name))
            yield f"{tensor.name or f'tensor {index}'}: {kind}", copy


def with_attributes(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Copies with one attribute changed."""
    for index, old in enumerate(attributes(model)):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        new = attributes(copy)[index]
        if old.type == AttributeProto.FLOAT:
            new.f = old.f * 1.25 + 0.125
        elif old.type == AttributeProto.INT:
            new.i = old.i + 1
        elif old.type == AttributeProto.STRING:
            new.s = old.s + b"_"
        elif old.type == AttributeProto.FLOATS and old.floats:
            new.floats[0] = old.floats[0] + 1.0
        elif old.type == AttributeProto.INTS and old.ints:
            new.ints[0] = old.ints[0] + 1
        else:
            continue
        yield f"{old.name} of attribute {index}", copy


def with_structure(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Copies with outputs or inputs in another order, one output less, another input type, another opset."""

    def copied() -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy

    for field in ("output", "input"):
        values = list(getattr(model.graph, field))
        if len(values) > 1:
            copy = copied()
            del getattr(copy.graph, field)[:]
            getattr(copy.graph, field).extend(values[1:] + values[:1])
            yield f"order of the {field}s", copy
    if len(model.graph.output) > 1:
        copy = copied()
        del copy.graph.output[-1]
        yield "an output less", copy
    copy = copied()
    for entry in copy.opset_import:
        entry.version += 1
    yield "another opset", copy
    given = {t.name for t in model.graph.initializer}
    free = [k for k, v in enumerate(model.graph.input) if v.name not in given]
    if free:
        copy = copied()
        kind = copy.graph.input[free[0]].type.tensor_type
        kind.elem_type = (
            onnx.TensorProto.DOUBLE if kind.elem_type != onnx.TensorProto.DOUBLE else onnx.TensorProto.FLOAT
        )
        yield "another input type", copy
    single = [t for t in model.graph.initializer if t.name not in {v.name for v in model.graph.input}]
    if single and model.ir_version >= 4:
        copy = copied()
        copy.graph.input.append(helper.make_tensor_value_info(single[0].name, single[0].data_type, single[0].dims))
        yield "an initializer that can be overridden", copy
