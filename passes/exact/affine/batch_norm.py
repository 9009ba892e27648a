"""Which batch normalizations can be folded into the contraction before them, and the new weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.nested import graphs_within, nodes_within
from cipm_ir.ir.opsets import standard_version
from cipm_ir.passes.exact.affine.products import (
    Array,
    Names,
    constant,
    copies,
    double,
    drop_unused,
    names_of,
    round_once,
    scale_output,
)
from cipm_ir.passes.exact.cleanup.replace_values import remove_if_unused, replace_value

__all__ = ["fold_batch_norms", "give_output", "no_fixed_map", "round_once", "scale_and_shift"]

_INTO = ("Conv", "ConvTranspose", "Gemm")


def fold_batch_norms(model: ir.Model) -> tuple[int, Counter[str]]:
    """Fold in place what can be folded, in bodies too; return how many were, and why how many were not.

    Names: the result keeps the name of the normalization's output, the weight its own; a new bias is named after it.
    New weights are computed in double precision and rounded once.
    """
    graph = model.graph
    graphs = graphs_within(graph)
    unused = {value for one in graphs for value in one.initializers.values() if not value.uses()}
    version = standard_version(graph.opset_imports)
    folded, kept, sources = 0, Counter[str](), list[ir.Node]()
    norms = [node for node in nodes_within(graph) if _is_norm(node)]
    taken = names_of(graph) if norms else set()
    for norm in norms:
        reason = _obstacle(norm, version)
        if not reason:
            sources += [node for value in _parameters(norm) for node in copies(value)]
            reason = _fold(norm, taken)
        if reason:
            kept[reason] += 1
        else:
            folded += 1
    if folded:
        drop_unused(graphs, unused, sources)
    return folded, kept


def _is_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and not node.domain


def _obstacle(norm: ir.Node, version: int) -> str:
    """Return why a normalization is no fixed affine map right after a contraction that has room for it.

    "" where it is.
    """
    value = norm.inputs[0]
    before = value.producer() if value is not None else None
    if norm.graph is None or sum(out is norm.outputs[0] for out in norm.graph.outputs) > 1:
        return "an output twice"
    if value is None or before is None or before.op_type not in _INTO or before.domain:
        return "nothing before can take it"
    if before.graph is not norm.graph or value.is_graph_output() or len(value.uses()) != 1:
        return "its input is consumed elsewhere too"
    training = no_fixed_map(norm, version)
    if training:
        return training
    tensors = [constant(parameter) for parameter in _parameters(norm)]
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


def no_fixed_map(norm: ir.Node, version: int) -> str:
    """Return why a normalization is no fixed scale and shift of each channel; "" where it is."""
    if attribute(norm, "training_mode", 0) or any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]):
        return "training mode"
    # Before opset 14 further outputs, and before opset 7 an attribute, say whether it trains.
    if version < 7 or (version < 14 and any(out.name for out in norm.outputs[1:])):
        return "training mode"
    # `spatial=0` of opset 7 and 8 normalizes every position with parameters of its own.
    if attribute(norm, "spatial", 1) != 1 or len(norm.inputs) != 5:
        return "parameters of every position"
    return ""


def _parameters(norm: ir.Node) -> list[ir.Value | None]:
    """Return the weight and bias of the contraction, if any, then the parameters of the normalization."""
    before = _inbound(norm)
    given = [value for value in before.inputs[2:] if value is not None]
    return [before.inputs[1], *given, *norm.inputs[1:]]


def _inbound(norm: ir.Node) -> ir.Node:
    value = norm.inputs[0]
    producer = value.producer() if value is not None else None
    assert producer is not None
    return producer


def _fold(norm: ir.Node, taken: Names) -> str:
    """Write the new weights; return why they cannot be written, "" if they could."""
    reason = scale_output(_inbound(norm), *scale_and_shift(norm), taken)
    if not reason:
        give_output(norm, _inbound(norm))
    return reason


def scale_and_shift(norm: ir.Node) -> tuple[Array, Array]:
    """Return scale / sqrt(var + epsilon) and shift - mean * that, in double precision."""
    scale, shift, mean, var = [double(value) for value in norm.inputs[1:]]
    with np.errstate(all="ignore"):  # what is not finite is refused
        factor = scale / np.sqrt(var + np.float64(np.float32(attribute(norm, "epsilon", 1e-5))))
        return factor, shift - mean * factor


def give_output(node: ir.Node, before: ir.Node) -> None:
    """Let the node before a node give its output, under its name, and remove it."""
    out, inner, label = node.outputs[0], before.outputs[0], node.outputs[0].name
    replace_value(out, inner)
    if inner.name != label:
        out.name, inner.name = inner.name, label
    remove_if_unused(node)
