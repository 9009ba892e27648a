"""Constant scales and shifts of what a product takes or gives, written into its weight and its bias.

New weights are computed in double precision and rounded once. The weight keeps its name, a new bias is named after it.
Large ones are computed again when they are written, so that they are never all in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.parameters import named, on_demand, parameter_tensor
from cipm_ir.passes.exact.cleanup.replace_values import remove_if_unused
from cipm_ir.runtime.graphs import all_values

Array = npt.NDArray[Any]
Names = set[str | None]
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SILENT = 1e-30
"""A channel whose weights are smaller than this as a whole may vanish."""


def names_of(graph: ir.Graph) -> Names:
    """Return the names of all values of a main graph and its bodies."""
    return {value.name for value in all_values(graph)}


def scale_output(node: ir.Node, factor: Array | None, shift: Array | None, taken: Names) -> str:
    """Make a product give ``factor * y + shift`` by channel; return why that cannot be, "" where it is done.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul, with constants for weight and bias.
        factor: shape (output channels,), float64; None: 1.
        shift: the same; None: 0. A MatMul takes none.
        taken: all names of the model (`names_of`); those of new parameters are added.
    """

    def weights(weight: Array) -> Array:
        if factor is None:
            return weight
        view = output_view(node, weight)
        return np.asarray((view * factor.reshape(len(view), 1, -1, 1)).reshape(weight.shape))

    old = bias_of(node)
    with np.errstate(all="ignore"):  # what is not finite is refused
        bias = None if old is None else old if factor is None else old * factor
    return _write(node, None if factor is None else weights, bias, shift, taken, output_view)


def scale_input(node: ir.Node, factor: Array | None, shift: Array | None, taken: Names) -> str:
    """Make a product compute what it would from ``factor * x + shift``; return why that cannot be, "" where it is done.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul, with constants for weight and bias; where there is a shift, without
            padding, and no ConvTranspose.
        factor: shape (input channels,), float64; None: 1.
        shift: the same; None: 0.
        taken: all names of the model (`names_of`); those of new parameters are added.
    """

    def weights(weight: Array) -> Array:
        view = input_view(node, weight)
        return np.asarray((view * _by_input(view, factor)).reshape(weight.shape))

    added = None
    if shift is not None:
        weight = double(node.inputs[1])
        if node.op_type == "Conv":
            view = input_view(node, weight)
            added = (view * _by_input(view, shift)).sum(axis=(2, 3)).reshape(-1)
        else:
            matrix = weight.T if attribute(node, "transB", 0) else weight
            added = shift @ matrix * (attribute(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0)
    return _write(node, None if factor is None else weights, bias_of(node), added, taken, input_view)


def _by_input(view: Array, vector: Array | None) -> Array:
    assert vector is not None
    return vector.reshape(len(view), 1, -1, 1)


def _write(
    node: ir.Node,
    weights: Callable[[Array], Array] | None,
    bias: Array | None,
    shift: Array | None,
    taken: Names,
    view: Callable[[ir.Node, Array], Array],
) -> str:
    """Write a new weight, and the sum of bias and shift; ``weights`` makes the new weight of the old one."""
    old = constant(node.inputs[1])
    assert old is not None
    dtype, name = old.dtype, (node.inputs[1].name if node.inputs[1] is not None else None) or "weight"
    total = bias if shift is None else shift if bias is None else bias + shift
    rounded = None if total is None else round_once(total, dtype)
    reason = "" if rounded is None or _finite(rounded) else f"the new weights do not fit into {dtype.name.lower()}"
    if weights is not None and not reason:
        with np.errstate(all="ignore"):
            made = weights(np.asarray(old.numpy()).astype(np.float64))
        tensor = ir.tensor(round_once(made, dtype), dtype=dtype)
        if not _finite(tensor.numpy()):
            return f"the new weights do not fit into {dtype.name.lower()}"
        if _loses_channels(node, made, total, np.asarray(tensor.numpy()), dtype, view):
            return f"the new weights are too small for {dtype.name.lower()}"
        new = weights

        def again() -> ir.TensorProtocol:
            return ir.tensor(round_once(new(np.asarray(old.numpy()).astype(np.float64)), dtype), dtype=dtype)

        _set_parameter(node, 1, on_demand(again, dtype, made.shape, made=tensor), name, taken)
    if reason:
        return reason
    if rounded is not None:
        stem = name.removesuffix(".weight").removesuffix("_weight")
        node.resize_inputs(3)
        _set_parameter(node, 2, ir.tensor(rounded, dtype=dtype), f"{stem}.bias", taken)
        if node.op_type == "Gemm":
            node.attributes.pop("beta", None)
    return ""


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array.astype(np.float64)).all())


def bias_of(node: ir.Node) -> Array | None:
    """Return the bias that a product adds, scaled by beta, in double precision; None where it has none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return None
    return double(value) * (attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0)


def double(value: ir.Value | None) -> Array:
    """Return the entries of a constant in double precision."""
    tensor = constant(value)
    assert tensor is not None
    return np.asarray(tensor.numpy()).astype(np.float64)


def channels(node: ir.Node) -> tuple[int, int]:
    """Return how many channels a product takes and gives."""
    tensor = constant(node.inputs[1])
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    groups = int(attribute(node, "group", 1))
    if node.op_type == "Conv":
        return shape[1] * groups, shape[0]
    if node.op_type == "ConvTranspose":
        return shape[0], shape[1] * groups
    rows, columns = shape[-2:]
    return (columns, rows) if attribute(node, "transB", 0) else (rows, columns)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that a value is in every run, through copies."""
    for node in copies(value):
        if node.domain or node.op_type not in ("Identity", "Constant"):
            return None
        value = node.inputs[0] if node.op_type == "Identity" else value
    return parameter_tensor(value)


def copies(value: ir.Value | None) -> Iterator[ir.Node]:
    """Yield the Identity and Constant nodes that a parameter comes through, the last one first.

    Or what else makes it.
    """
    node = value.producer() if value is not None else None
    while node is not None:
        yield node
        node = node.inputs[0].producer() if node.op_type == "Identity" and node.inputs[0] is not None else None


def output_view(node: ir.Node, weight: Array) -> Array:
    """Return a view of a weight as (group, in, out, rest): output channels count through group and out."""
    if node.op_type == "ConvTranspose":  # (in, out / group, kernel)
        groups = int(attribute(node, "group", 1))
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if node.op_type in ("Gemm", "MatMul") and not attribute(node, "transB", 0):
        return weight.reshape(1, *weight.shape, 1)
    return weight.reshape(1, 1, len(weight), -1)


def input_view(node: ir.Node, weight: Array) -> Array:
    """Return a view of a weight as (group, out, in, rest), or a copy: input channels count through group and in."""
    if node.op_type == "ConvTranspose":
        return weight.reshape(1, 1, len(weight), -1)
    if node.op_type == "Conv":
        groups = int(attribute(node, "group", 1))
        return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    if attribute(node, "transB", 0):
        return weight.reshape(1, *weight.shape, 1)
    return weight.reshape(1, 1, *weight.shape)


def _loses_channels(
    node: ir.Node,
    made: Array,
    bias: Array | None,
    rounded: Array,
    dtype: ir.DataType,
    view: Callable[[ir.Node, Array], Array],
) -> bool:
    """Return whether a channel lost digits because its weights are below the smallest normal number of the type."""

    def norms(weight: Array) -> Array:
        return np.asarray(np.sqrt((view(node, weight) ** 2).sum(axis=(1, 3))).reshape(-1))

    size, error = norms(made), norms(rounded.astype(np.float64) - made)
    beside = np.abs(bias) if bias is not None and view is output_view else 0.0
    return bool(((error > 2.0 ** (1 - _DIGITS[dtype]) * (size + beside)) & (size > _SILENT)).any())


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


def _set_parameter(node: ir.Node, index: int, tensor: ir.TensorProtocol, base: str, taken: Names) -> None:
    """Give a node a new tensor: in place where the parameter is its alone, else under a name of its own."""
    value = node.inputs[index]
    if value is not None and value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = named(tensor, value.name or base)
        return
    name = value.name if value is not None and value.name else base
    assert node.graph is not None
    node.replace_input_with(index, _initializer(tensor, name, taken, node.graph))


def _initializer(tensor: ir.TensorProtocol, name: str, taken: Names, place: ir.Graph) -> ir.Value:
    """Return a new initializer of ``place``, the main graph or a body below it, under a name that nothing else has."""
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    taken.add(unique)
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=named(tensor, unique),
    )
    place.register_initializer(value)
    return value


def drop_unused(graphs: Sequence[ir.Graph], unused_before: set[ir.Value], sources: list[ir.Node]) -> None:
    """Remove what the folding left without a consumer, but nothing that had none before."""
    for node in sources:
        if node.graph in graphs:
            remove_if_unused(node)
    for graph in graphs:
        for name, value in list(graph.initializers.items()):
            needed = value.uses() or value.is_graph_output() or value.is_graph_input()
            if value not in unused_before and not needed:
                del graph.initializers[name]
