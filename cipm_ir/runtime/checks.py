"""Checks of a whole model that cost more than a look at its structure: shapes that fit, weights without NaN."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.nested import graphs_within
from cipm_ir.ir.parameters import named
from cipm_ir.ir.shapes import forget_impossible_sizes
from cipm_ir.runtime.graphs import all_graphs, describe_node

_Shape: TypeAlias = list[int | None]
_CHUNK = 1 << 22
_STANDARD = {"", "ai.onnx", "ai.onnx.ml"}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def check_shapes(model: ir.Model, keep_bytes: int = 4096) -> None:
    """Run ONNX shape inference in strict mode without the weights, and check the channels that it leaves unchecked.

    Initializers over `keep_bytes` keep only their type and shape; small ones stay, for shapes computed from constants.
    Recorded shapes of inner values are only notes, which exporters get wrong: where they contradict, they are left out.

    Raises:
        InputError: the message names the node whose input shapes cannot go together.
    """
    proto = _without_weights(model, keep_bytes)
    inferred, message = _infer(proto)
    if inferred is None:
        _drop_value_infos(proto.graph)
        inferred, message = _infer(proto)
    _raise_contradictions(inferred, message)


def correct_shapes(model: ir.Model, keep_bytes: int = 4096) -> None:
    """Check a model as `check_shapes` does, and take recorded shapes that contradict its inputs out of it, in place.

    What a file records of inner values and outputs is a note to onnxruntime, which computes what it computes. Wrong
    notes of inner values are removed; those of outputs are replaced by what was inferred.

    Raises:
        InputError: the message names the node whose input shapes cannot go together.
    """
    proto = _without_weights(model, keep_bytes)
    inferred, message = _infer(proto)
    if inferred is None:
        notes = [*map(copy.deepcopy, (*proto.graph.value_info, *proto.graph.output))]
        _drop_value_infos(proto.graph)
        _drop_output_shapes(proto.graph)
        inferred, message = _infer(proto)
        if inferred is not None:
            _forget(model, notes, inferred.graph)
    _raise_contradictions(inferred, message)


def _raise_contradictions(inferred: onnx.ModelProto | None, message: str) -> None:
    if inferred is not None:
        message = next(_channel_errors(inferred.graph), "")
    if message:
        raise InputError(f"The shapes inside the model contradict each other: {message}")


def _forget(model: ir.Model, notes: Sequence[onnx.ValueInfoProto], inferred: onnx.GraphProto) -> None:
    """Remove the notes that differ from what was inferred; where none does, those of all subgraphs."""
    known = {info.name: info for info in (*inferred.value_info, *inferred.output)}
    wrong = {note.name for note in notes if note.name in known and _differ(note, known[note.name])}
    outputs = {value.name for value in model.graph.outputs}
    for value in [value for node in model.graph for value in node.outputs if value.name in wrong]:
        info = known[value.name]
        value.shape = ir.Shape(_dims(info)) if value.name in outputs and _has_shape(info) else None
        value.dtype = ir.DataType(info.type.tensor_type.elem_type)
    for graph in () if wrong else graphs_within(model.graph)[1:]:
        for value in (*graph.outputs, *(value for node in graph for value in node.outputs)):
            value.shape = None if value.producer() is not None else value.shape


def _has_shape(info: onnx.ValueInfoProto) -> bool:
    return bool(info.type.tensor_type.HasField("shape"))


def _dims(info: onnx.ValueInfoProto) -> _Shape:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim]


def _differ(a: onnx.ValueInfoProto, b: onnx.ValueInfoProto) -> bool:
    """Return whether the notes on a value contradict each other, in type, rank or size."""
    if a.type.tensor_type.elem_type != b.type.tensor_type.elem_type:
        return True
    if not (_has_shape(a) and _has_shape(b)):
        return False
    first, second = _dims(a), _dims(b)
    return len(first) != len(second) or any(None not in (m, n) and m != n for m, n in zip(first, second, strict=True))


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0].rstrip(".")


def _without_weights(model: ir.Model, keep_bytes: int) -> onnx.ModelProto:
    try:
        return _stripped(model, keep_bytes)
    except ir.serde.SerdeError as error:
        raise InputError(f"The model is damaged: {_root(error)}.") from error


def _stripped(model: ir.Model, keep_bytes: int) -> onnx.ModelProto:
    stripped = model.clone()
    forget_impossible_sizes(stripped.graph)
    for graph in all_graphs(stripped):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            name, shape = value.name or "", ir.Shape(tensor.shape.numpy())
            if tensor.nbytes > keep_bytes:
                # Inference reads the type and dims of a tensor and never opens the file that it names.
                value.const_value = ir.ExternalTensor("left_out", 0, None, tensor.dtype, shape=shape, name=name)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=shape, name=name)
            else:
                value.const_value = named(tensor, name)
    for graph in all_graphs(stripped):
        for node in graph:
            _spell_out_defaults(node, stripped.opset_imports)
    return ir.to_proto(stripped)


def _spell_out_defaults(node: ir.Node, opsets: Mapping[str, int]) -> None:
    """Give a node that ONNX infers by its function body the attributes that it leaves out: the body needs them."""
    version = node.version or opsets.get(node.domain, 0)
    if node.domain not in _STANDARD or not version or not onnx.defs.has(node.op_type, version, node.domain):
        return
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    if schema.has_type_and_shape_inference_function or not schema.function_body.node:
        return
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.type:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)


def _drop_value_infos(graph: onnx.GraphProto) -> None:
    """Forget recorded shapes, but for outputs of operators that inference does not know."""
    opaque = {name for node in graph.node if node.domain not in _STANDARD for name in node.output}
    kept = [info for info in graph.value_info if info.name in opaque]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for inner in _inner_graphs(graph):
        _drop_value_infos(inner)


def _drop_output_shapes(graph: onnx.GraphProto) -> None:
    for info in graph.output:
        info.type.tensor_type.ClearField("shape")
    for inner in _inner_graphs(graph):
        _drop_output_shapes(inner)


def _inner_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _infer(proto: onnx.ModelProto) -> tuple[onnx.ModelProto | None, str]:
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=False), ""
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        return None, _readable(str(error))


def _readable(message: str) -> str:
    """Return the first finding of ONNX's inference, in the form `node 'x' (Op): what is wrong.`"""
    found = re.search(r"\(op_type:([^,)]*)(?:, node name: ([^)]*))?\):\s*(.*)", message)
    text = found.group(3) if found else message.strip().splitlines()[0]
    text = re.sub(r"\[\w+Error\]\s*", "", text).strip().rstrip(".")
    if found is None:
        return f"{text}."
    name = f"node {found.group(2)!r} ({found.group(1)})" if found.group(2) else f"a {found.group(1)} node"
    return f"{name}: {text}."


def _channel_errors(graph: onnx.GraphProto) -> Iterator[str]:
    """Mismatches of channels and parameter lengths, which ONNX's inference leaves to the runtime."""
    shapes: dict[str, _Shape] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.value_info, *graph.input, *graph.output):
        if _has_shape(info):
            shapes.setdefault(info.name, _dims(info))
    for node in graph.node:
        given = [shapes.get(name) for name in node.input]
        if node.domain not in _STANDARD or len(given) < 2 or given[0] is None or given[1] is None:
            continue
        for axis, found, needed in _channel_pairs(node, given):
            if found is not None and needed is not None and found != needed:
                yield f"{describe_node(node)}: {axis} has size {found} where {needed} is needed."


def _channel_pairs(node: onnx.NodeProto, given: list[_Shape | None]) -> Iterator[tuple[str, int | None, int | None]]:
    """(what, its size, the size that it must have) for the parameters of a node."""
    data, weight = given[0], given[1]
    assert data is not None and weight is not None
    integers = {attribute.name: attribute.i for attribute in node.attribute}
    group = integers.get("group", 1)
    bias = given[2] if len(given) > 2 else None
    if node.op_type in ("Conv", "ConvTranspose") and len(weight) == len(data) > 2:
        transposed = node.op_type == "ConvTranspose"
        inside = weight[0] if transposed else _times(weight[1], group)
        outside = _times(weight[1], group) if transposed else weight[0]
        yield f"axis 1 of {node.input[0]!r}", data[1], inside
        if bias is not None and len(bias) == 1:
            yield f"axis 0 of {node.input[2]!r}", bias[0], outside
    elif node.op_type == "Gemm" and len(data) == len(weight) == 2:
        inner = 1 if integers.get("transB", 0) else 0
        yield f"axis {inner} of {node.input[1]!r}", weight[inner], data[0 if integers.get("transA", 0) else 1]
        if bias and bias[-1] != 1:
            yield f"axis {len(bias) - 1} of {node.input[2]!r}", bias[-1], weight[1 - inner]
    elif node.op_type in _GATES and len(weight) == 3 and len(data) == 3:
        yield from _recurrent_pairs(node, given, _GATES[node.op_type])
    elif node.op_type == "LayerNormalization" and len(weight) == 1 and weight[0] != 1 and data:
        yield f"axis 0 of {node.input[1]!r}", weight[0], data[-1]
        if bias is not None and len(bias) == 1 and bias[0] != 1:
            yield f"axis 0 of {node.input[2]!r}", bias[0], data[-1]
    elif node.op_type in ("BatchNormalization", "InstanceNormalization") and len(data) > 1:
        for name, shape in zip(node.input[1:], given[1:], strict=True):
            if shape is not None and len(shape) == 1:
                yield f"axis 0 of {name!r}", shape[0], data[1]


def _recurrent_pairs(
    node: onnx.NodeProto, given: list[_Shape | None], gates: int
) -> Iterator[tuple[str, int | None, int | None]]:
    """Yield the same for RNN, GRU and LSTM, whose weights are (directions, gates x hidden, inputs)."""
    data, weight, again, bias = (*given, None, None)[:4]
    assert data is not None and weight is not None
    yield f"axis 2 of {node.input[1]!r}", weight[2], data[2]
    if again is not None and len(again) == 3:
        yield f"axis 1 of {node.input[2]!r}", again[1], weight[1]
        yield f"axis 1 of {node.input[2]!r}", again[1], _times(again[2], gates)
    if bias is not None and len(bias) == 2:
        yield f"axis 1 of {node.input[3]!r}", bias[1], _times(weight[1], 2)


def _times(size: int | None, factor: int) -> int | None:
    return None if size is None else size * factor


def check_finite(model: ir.Model) -> None:
    """Refuse NaN in the initializers, one at a time and in pieces; infinities are legitimate (masks).

    Raises:
        InputError: the message names the first such tensor and how to find the entry.
    """
    values = [value for graph in all_graphs(model) for value in graph.initializers.values()]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for value, index in zip(values, pool.map(_nan_in, values), strict=True):
            if index is not None:
                raise InputError(f"Initializer {value.name!r} holds NaN, first at {list(index)}; the model is damaged.")


def _nan_in(value: ir.Value) -> tuple[int, ...] | None:
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
        return None
    index = _first_nan(tensor.numpy())
    drop = getattr(tensor, "drop_pages", None)
    if drop is not None:
        drop()
    return index


def _first_nan(array: np.ndarray[Any, np.dtype[Any]]) -> tuple[int, ...] | None:
    flat = array.reshape(-1)
    native = array.dtype.kind == "f"
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        # The minimum passes NaN on and needs no temporary array, so the common case is one fast pass.
        if native and not np.isnan(np.min(piece)):
            continue
        bad = np.flatnonzero(np.isnan(piece))
        if bad.size:
            return tuple(int(i) for i in np.unravel_index(start + int(bad[0]), array.shape))
    return None
