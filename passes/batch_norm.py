"""Which batch normalizations can be folded into the contraction before them, and the new weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.parameters import named, parameter_tensor
from cipm_ir.passes.replace_values import remove_if_unused, replace_value

Array = npt.NDArray[Any]
_INTO = ("Conv", "ConvTranspose", "Gemm")
_STANDARD = ("", "ai.onnx")
_SILENT = 1e-30
"""A channel whose weights are smaller than this as a whole may vanish."""


def fold_batch_norms(model: ir.Model) -> tuple[int, Counter[str]]:
    """Fold in place what can be folded, in bodies too; return how many were, and why how many were not.

    Names: the result keeps the name of the normalization's output, the weight its own; a new bias is named after it.
    New weights are computed in double precision and rounded once.
    """
    graph = model.graph
    graphs = (graph, *graph.subgraphs())
    unused = {value for one in graphs for value in one.initializers.values() if not value.uses()}
    version = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
    folded, kept, sources = 0, Counter[str](), list[ir.Node]()
    for norm in [node for node in graph.all_nodes() if _is_norm(node)]:
        reason = _obstacle(norm, version)
        if not reason:
            sources += [node for value in _parameters(norm) for node in _copies(value)]
            reason = _fold(norm, graph)
        if reason:
            kept[reason] += 1
        else:
            folded += 1
    if folded:
        _drop_unused(graphs, unused, sources)
    return folded, kept


def _is_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in _STANDARD


def _obstacle(norm: ir.Node, version: int) -> str:
    """Why a normalization is no fixed affine map right after a contraction that has room for it; "" where it is."""
    value = norm.inputs[0]
    before = value.producer() if value is not None else None
    if norm.graph is None or sum(out is norm.outputs[0] for out in norm.graph.outputs) > 1:
        return "an output twice"
    if value is None or before is None or before.op_type not in _INTO or before.domain not in _STANDARD:
        return "nothing before can take it"
    if before.graph is not norm.graph or value.is_graph_output() or len(value.uses()) != 1:
        return "its input is consumed elsewhere too"
    if attribute(norm, "training_mode", 0) or any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]):
        return "training mode"
    # Before opset 14 further outputs, and before opset 7 an attribute, say whether it trains.
    if version < 7 or (version < 14 and any(out.name for out in norm.outputs[1:])):
        return "training mode"
    # `spatial=0` of opset 7 and 8 normalizes every position with parameters of its own.
    if attribute(norm, "spatial", 1) != 1 or len(norm.inputs) != 5:
        return "parameters of every position"
    tensors = [_constant(parameter) for parameter in _parameters(norm)]
    if any(tensor is None for tensor in tensors):
        return "parameters that are computed or may be overridden"
    known = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.dtype.is_floating_point() for tensor in known):
        return "parameters that are no floats"
    bias = before.inputs[2] if len(before.inputs) > 2 else None
    if bias is not None and known[1].dtype != known[0].dtype:
        return "weight and bias of different types"
    channels = known[-1].shape.numpy()
    if len(channels) != 1 or any(tensor.shape.numpy() != channels for tensor in known[1:]):
        return "a bias or parameters of another shape than (channels,)"
    return ""


def _parameters(norm: ir.Node) -> list[ir.Value | None]:
    """The weight and bias of the contraction, if any, then the parameters of the normalization."""
    before = _inbound(norm)
    given = [value for value in before.inputs[2:] if value is not None]
    return [before.inputs[1], *given, *norm.inputs[1:]]


def _inbound(norm: ir.Node) -> ir.Node:
    value = norm.inputs[0]
    producer = value.producer() if value is not None else None
    assert producer is not None
    return producer


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value is in every run, through copies."""
    for node in _copies(value):
        if node.domain not in _STANDARD or node.op_type not in ("Identity", "Constant"):
            return None
        value = node.inputs[0] if node.op_type == "Identity" else value
    return parameter_tensor(value)


def _copies(value: ir.Value | None) -> Iterator[ir.Node]:
    """The Identity and Constant nodes that a parameter comes through, the last one first; or what else makes it."""
    node = value.producer() if value is not None else None
    while node is not None:
        yield node
        node = node.inputs[0].producer() if node.op_type == "Identity" and node.inputs[0] is not None else None


def _fold(norm: ir.Node, graph: ir.Graph) -> str:
    """Write the new weights; return why they cannot be written, "" if they could."""
    before = _inbound(norm)
    weight = _constant(before.inputs[1])
    assert weight is not None
    made = _new_weights(norm, before)
    rounded = [round_once(array, weight.dtype) for array in made]
    if not all(np.isfinite(array.astype(np.float64)).all() for array in rounded):
        return f"the new weights do not fit into {weight.dtype.name.lower()}"
    if _loses_channels(before, made, rounded, weight.dtype):
        return f"the new weights are too small for {weight.dtype.name.lower()}"
    name = before.inputs[1].name if before.inputs[1] is not None else None
    stem = (name or "weight").removesuffix(".weight").removesuffix("_weight")
    before.resize_inputs(3)
    for index, array, base in ((1, rounded[0], name or "weight"), (2, rounded[1], f"{stem}.bias")):
        _set_parameter(before, index, ir.tensor(array, dtype=weight.dtype), base, graph)
    if before.op_type == "Gemm":
        before.attributes.pop("beta", None)
    out, inner, label = norm.outputs[0], before.outputs[0], norm.outputs[0].name
    replace_value(out, inner)
    if inner.name != label:
        out.name, inner.name = inner.name, label
    remove_if_unused(norm)
    return ""


def _new_weights(norm: ir.Node, before: ir.Node) -> list[Array]:
    """Weight W·s and bias (b - mean)·s + shift, s = scale / sqrt(var + epsilon), in double precision."""
    weight, *given = [_double(value) for value in _parameters(norm)]
    scale, shift, mean, var = given[-4:]
    bias = given[0] if len(given) > 4 else np.zeros_like(mean)
    if before.op_type == "Gemm":  # the product is scaled by alpha as before
        bias = bias * attribute(before, "beta", 1.0)
    with np.errstate(all="ignore"):  # what is not finite is refused
        factor = scale / np.sqrt(var + np.float64(np.float32(attribute(norm, "epsilon", 1e-5))))
        view = _view(before, weight)
        scaled = (view * factor.reshape(len(view), 1, -1, 1)).reshape(weight.shape)
        return [scaled, (bias - mean) * factor + shift]


def _double(value: ir.Value | None) -> Array:
    tensor = _constant(value)
    assert tensor is not None
    return np.asarray(tensor.numpy()).astype(np.float64)


def _view(before: ir.Node, weight: Array) -> Array:
    """A view of a weight as (group, in, out, rest): output channels count through group and out."""
    if before.op_type == "ConvTranspose":  # (in, out / group, kernel)
        groups = int(attribute(before, "group", 1))
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if before.op_type == "Gemm" and not attribute(before, "transB", 0):
        return weight.reshape(1, *weight.shape, 1)
    return weight.reshape(1, 1, len(weight), -1)


def _channel_norms(before: ir.Node, weight: Array) -> Array:
    return np.asarray(np.sqrt((_view(before, weight) ** 2).sum(axis=(1, 3))).reshape(-1))


def _loses_channels(before: ir.Node, made: list[Array], rounded: list[Array], dtype: ir.DataType) -> bool:
    """Whether a channel lost digits because its weights are below the smallest normal number of the type."""
    size = _channel_norms(before, made[0])
    error = _channel_norms(before, rounded[0].astype(np.float64) - made[0])
    allowed = 2.0 ** -_DIGITS[dtype] * (size + np.abs(made[1]))
    return bool(((error > 2 * allowed) & (size > _SILENT)).any())


_DIGITS = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8, ir.DataType.FLOAT: 24, ir.DataType.DOUBLE: 53}


def round_once(array: Array, dtype: ir.DataType) -> Array:
    """Round doubles to a type of fewer digits, to the nearest, ties to even, infinite where they do not fit."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype != ir.DataType.BFLOAT16:
            return np.asarray(array.astype(dtype.numpy()))
        # Conversion to bfloat16 goes by float; what that rounds away is kept in its last bit ("round to odd").
        near = array.astype(np.float32)
        toward = np.where(np.abs(near.astype(np.float64)) > np.abs(array), np.nextafter(near, np.float32(0)), near)
        inexact = np.isfinite(toward) & (toward.astype(np.float64) != array)
        odd = (toward.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)
        return np.asarray(odd.astype(dtype.numpy()))


def _set_parameter(node: ir.Node, index: int, tensor: ir.TensorProtocol, base: str, graph: ir.Graph) -> None:
    """Give a node a new tensor: in place where the parameter is its alone, else under a name of its own."""
    value = node.inputs[index]
    if value is not None and value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = named(tensor, value.name or base)
        return
    name = value.name if value is not None and value.name else base
    node.replace_input_with(index, _initializer(tensor, name, graph, node.graph or graph))


def _initializer(tensor: ir.TensorProtocol, name: str, graph: ir.Graph, place: ir.Graph) -> ir.Value:
    """A new initializer of ``place``, the main graph or a body below it, under a name that nothing else has."""
    taken = {value.name for value in _values(graph)}
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=named(tensor, unique),
    )
    place.register_initializer(value)
    return value


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
    for inner in graph.subgraphs():
        yield from (*inner.inputs, *inner.initializers.values())


def _drop_unused(graphs: Sequence[ir.Graph], unused_before: set[ir.Value], sources: list[ir.Node]) -> None:
    """Remove what the folding left without a consumer, but nothing that had none before."""
    for node in sources:
        if node.graph in graphs:
            remove_if_unused(node)
    for graph in graphs:
        for name, value in list(graph.initializers.items()):
            needed = value.uses() or value.is_graph_output() or value.is_graph_input()
            if value not in unused_before and not needed:
                del graph.initializers[name]
