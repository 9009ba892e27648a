"""Which batch normalizations can be folded, and the preparation that onnxscript's rewriting rules need."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cipm_ir.runtime.graphs import named

_INTO = ("Conv", "ConvTranspose", "Gemm")
_STANDARD = ("", "ai.onnx")
# Node.domain of normalizations that must stay, while the rules run: the rules match on the operator alone.
_KEPT = "cipm_ir.kept"


def fold_batch_norms(model: ir.Model) -> tuple[int, int]:
    """Fold in place what can be folded in the main graph; gives how many were folded, and how many are left.

    Names: the result keeps the name of the normalization's output, the weight its own; a new bias is named after it.
    """
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules.common import (
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_conv_transpose_rule,
        fuse_batchnorm_into_gemm_rule,
    )

    norms = [node for node in model.graph.all_nodes() if _is_norm(node)]
    version = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
    chosen = [norm for norm in norms if version >= 7 and norm.graph is model.graph and _foldable(norm, model.graph)]
    if not chosen:
        return 0, len(norms)
    unused = {name for name, value in model.graph.initializers.items() if not value.uses()}
    copies = [node for norm in chosen for value in _parameters(norm) for node in _copies(value)]
    for norm in chosen:
        _prepare(norm, model.graph)
    places = {_output(norm): (_inbound(norm).name, dict(_inbound(norm).metadata_props)) for norm in chosen}
    kept = [(norm, norm.domain) for norm in norms if norm not in chosen]
    for norm, _ in kept:
        norm.domain = _KEPT
    try:
        rules = [fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule]
        RewritePass(rules)(model)
    finally:
        for norm, domain in kept:
            norm.domain = domain
    _restore_names(model.graph, places)
    _drop_unused(model.graph, unused, copies)
    left = sum(1 for node in model.graph.all_nodes() if _is_norm(node))
    return len(norms) - left, left


def _is_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in _STANDARD


def _inbound(norm: ir.Node) -> ir.Node:
    value = norm.inputs[0]
    producer = value.producer() if value is not None else None
    assert producer is not None
    return producer


def _output(norm: ir.Node) -> str:
    return norm.outputs[0].name or ""


def _foldable(norm: ir.Node, graph: ir.Graph) -> bool:
    """The normalization is a fixed affine map right after a contraction that has room for it."""
    value = norm.inputs[0]
    before = value.producer() if value is not None else None
    if value is None or before is None or before.op_type not in _INTO or before.domain not in _STANDARD:
        return False
    if before.graph is not graph or value.is_graph_output() or len(value.uses()) != 1:
        return False
    statistics_read = any(out.uses() or out.is_graph_output() for out in norm.outputs[1:])
    if statistics_read or norm.attributes.get_int("training_mode", 0) == 1:
        return False
    # `spatial=0` of opset 7 and 8 normalizes every position with parameters of its own.
    if norm.attributes.get_int("spatial", 1) != 1 or len(norm.inputs) != 5:
        return False
    tensors = [_constant(parameter) for parameter in _parameters(norm)]
    if any(tensor is None for tensor in tensors):
        return False
    known = [tensor for tensor in tensors if tensor is not None]
    floats = {tensor.dtype for tensor in known}
    if len(floats) != 1 or not next(iter(floats)).is_floating_point():
        return False
    channels = known[-1].shape.numpy()
    return all(tensor.shape.numpy() == channels for tensor in known[1:])


def _parameters(norm: ir.Node) -> list[ir.Value | None]:
    """The weight and bias of the contraction, if any, then the parameters of the normalization."""
    before = _inbound(norm)
    given = [value for value in before.inputs[2:] if value is not None]
    return [before.inputs[1], *given, *norm.inputs[1:]]


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value always has: an initializer that no caller can override, a Constant, a copy of these."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.domain not in _STANDARD:
            return None
        if node.op_type == "Constant":
            return ir.convenience.get_const_tensor(value)
        if node.op_type != "Identity":
            return None
        value = node.inputs[0]
    if value is None or value.is_graph_input():
        return None
    return value.const_value


def _copies(value: ir.Value | None) -> Iterator[ir.Node]:
    """The Identity and Constant nodes that a parameter comes through, the last one first."""
    node = value.producer() if value is not None else None
    while node is not None:
        yield node
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


def _prepare(norm: ir.Node, graph: ir.Graph) -> None:
    """Give the contraction its own weight and a bias, and write all parameters as initializers."""
    before = _inbound(norm)
    bias = before.inputs[2] if len(before.inputs) > 2 else None
    _own(before, 1, graph)
    if bias is not None:
        _own(before, 2, graph)
    else:
        _add_bias(before, norm, graph)
    for index in range(1, 5):
        _own(norm, index, graph, shareable=True)


def _own(node: ir.Node, index: int, graph: ir.Graph, shareable: bool = False) -> None:
    value = node.inputs[index]
    tensor = _constant(value)
    assert value is not None and tensor is not None
    if value.is_initializer() and (shareable or len(value.uses()) == 1):
        return
    node.replace_input_with(index, _initializer(tensor, value.name or "weight", graph))


def _add_bias(before: ir.Node, norm: ir.Node, graph: ir.Graph) -> None:
    weight, mean = before.inputs[1], _constant(norm.inputs[3])
    assert weight is not None and mean is not None
    name = (weight.name or "weight").removesuffix(".weight").removesuffix("_weight")
    zero = ir.tensor(mean.numpy() * 0, dtype=mean.dtype)
    before.resize_inputs(3)
    before.replace_input_with(2, _initializer(zero, f"{name}.bias", graph))


def _initializer(tensor: ir.TensorProtocol, name: str, graph: ir.Graph) -> ir.Value:
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
    graph.register_initializer(value)
    return value


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _restore_names(graph: ir.Graph, places: dict[str, tuple[str | None, dict[str, str]]]) -> None:
    """The rules make a new node without a name: it takes the name and metadata of the contraction."""
    for node in graph:
        if node.op_type in _INTO and node.outputs[0].name in places:
            node.name, metadata = places[node.outputs[0].name]
            node.metadata_props.clear()
            node.metadata_props.update(metadata)


def _drop_unused(graph: ir.Graph, unused_before: set[str], copies: list[ir.Node]) -> None:
    """Remove what the folding left without a reader, but nothing that had none before."""
    for node in copies:
        if node.graph is graph and not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        read = value.uses() or value.is_graph_output() or value.is_graph_input()
        if name not in unused_before and not read:
            del graph.initializers[name]
