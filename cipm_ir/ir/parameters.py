"""The one place that decides which values are parameters: the same tensor in every run.

A parameter is an initializer that no caller can replace. From IR version 4 on, an initializer that is a graph input as
well only holds that input's default: the caller may feed another tensor. Such an *overridable* initializer is an input
to every analysis and pass. Before IR version 4 every initializer had to be listed among the inputs, so there the list
means nothing, and initializers are parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.constants import constant_tensor

# Set in `Graph.meta` of the main graph of a file whose format lists every initializer among the inputs.
_LISTS_ALL = "cipm_ir.lists_all_initializers"
_FIRST_OVERRIDABLE = 4
_LARGE = 1 << 20
"""Tensors of more bytes are made again whenever they are read."""


def note_ir_version(model: ir.Model) -> None:
    """Record on the main graph whether its initializers can be overridden; values do not know their model's version."""
    model.graph.meta[_LISTS_ALL] = model.ir_version < _FIRST_OVERRIDABLE


def is_overridable(value: ir.Value) -> bool:
    """Return whether a value is an initializer that the caller may replace."""
    graph = value.graph
    listed = value.is_initializer() and value.is_graph_input()
    return listed and not (graph is not None and graph.meta.get(_LISTS_ALL, False))


def is_parameter(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer that holds the same tensor in every run."""
    return value is not None and value.is_initializer() and value.const_value is not None and not is_overridable(value)


def parameter_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that a value is in every run: a parameter's or a Constant node's; None for any other value."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return constant_tensor(node) if node.op_type == "Constant" and not node.domain else None
    return value.const_value if is_parameter(value) else None


def stored_tensor(model: ir.Model, name: str) -> ir.TensorProtocol:
    """Return the tensor of a weight of the main graph, an initializer's or a Constant node's.

    Raises:
        InputError: it has none.
    """
    tensor = parameter_tensor(model.graph.initializers.get(name))
    if tensor is None:
        maker = next((n for n in model.graph if n.outputs and n.outputs[0].name == name), None)
        tensor = None if maker is None else constant_tensor(maker)
    if tensor is None:
        raise InputError(f"The weight {name!r} has no value in the model; give it one first.")
    return tensor


def named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return the tensor under another name, as its own object where the name differs.

    onnx_ir writes the name of the value into the tensor when it serializes; a tensor made from a proto passes that
    on to the proto, which may be the caller's.
    """
    if tensor.name == name:
        return tensor
    shape = ir.Shape(tensor.shape.numpy())
    if isinstance(tensor, ir.StringTensor):
        return ir.StringTensor(tensor.string_data(), shape=shape, name=name)
    return ir.LazyTensor(lambda: tensor, tensor.dtype, shape, name=name)


def on_demand(
    make: Callable[[], ir.TensorProtocol],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str | None = None,
    made: ir.TensorProtocol | None = None,
) -> ir.TensorProtocol:
    """Return a new tensor, or where it is large what makes it whenever it is read, so that large ones are not all kept.

    Args:
        make: makes the tensor.
        dtype, shape, name: its own.
        made: the tensor, where it is at hand.
    """
    if math.prod(shape) * dtype.itemsize <= _LARGE:
        return make() if made is None else made
    return ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)


def unlist_parameters(model: ir.Model) -> int:
    """Take the parameters of a file before IR version 4 out of its inputs, in place (it becomes version 4).

    Returns:
        How many were inputs.
    """
    kept = free_inputs(model.graph)
    number = len(model.graph.inputs) - len(kept)
    if number:
        model.graph.inputs.clear()
        model.graph.inputs.extend(kept)
    model.ir_version = max(model.ir_version, _FIRST_OVERRIDABLE)
    note_ir_version(model)
    return number


def parameters(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the parameters among the initializers of a graph, by name."""
    return {name: value for name, value in graph.initializers.items() if is_parameter(value)}


def overridable_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the graph inputs that have a default, in order: initializers too, from IR version 4 on."""
    note_ir_version(model)
    return [value for value in model.graph.inputs if is_overridable(value)]


def free_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs that a caller may feed, overridable ones included: all that are not parameters."""
    return [value for value in graph.inputs if not is_parameter(value)]
