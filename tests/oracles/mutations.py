"""Single edits of a model that a verification should see: a wrong row, a lost bias, a wrong epsilon, a wrong edge.

`mutate(model, kind, rng)` edits a copy at a random place, `mutate(model, kind, rng, name)` at one tensor or node.
Whether an edit changes what the model computes is not known here: `tests.oracles.double_precision` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from tests.oracles.mutation_attributes import other_values

Array: TypeAlias = npt.NDArray[Any]
Generator: TypeAlias = np.random.Generator

ROW_FACTOR, SCALE_FACTOR, ENTRY_SHARE = 1.01, 1.001, 1e-3
_BIAS_INPUTS = {
    "Conv": 2,
    "ConvTranspose": 2,
    "Gemm": 2,
    "LayerNormalization": 2,
    "InstanceNormalization": 2,
    "GroupNormalization": 2,
    "BatchNormalization": 2,
    "GRU": 3,
    "LSTM": 3,
    "RNN": 3,
}
_OPTIONAL_BIAS = {"Conv", "ConvTranspose", "Gemm", "LayerNormalization", "GRU", "LSTM", "RNN"}
_REPLACED = {
    "Relu": "LeakyRelu",
    "LeakyRelu": "Relu",
    "Sigmoid": "HardSigmoid",
    "HardSigmoid": "Sigmoid",
    "Tanh": "Softsign",
    "HardSwish": "Relu",
    "Softplus": "Relu",
    "Elu": "Selu",
    "Selu": "Elu",
    "Abs": "Relu",
    "Erf": "Tanh",
    "Sin": "Cos",
    "Cos": "Sin",
}
_REMOVED = {*_REPLACED, "Clip", "Gelu", "Mish", "Neg", "Sqrt", "Reciprocal", "Exp", "Log"}


@dataclass(frozen=True)
class Mutant:
    """A copy of a model with one edit.

    Attributes:
        model: the edited copy.
        kind: one of `KINDS`.
        where: the tensor's or node's name.
        detail: what was done, in words.
    """

    model: ir.Model
    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.where!r}: {self.detail}"


@dataclass(frozen=True)
class Parameter:
    """A tensor of a model's copy that can be exchanged: an initializer, or the value of a Constant node."""

    name: str
    array: Array
    holder: ir.Value | ir.Node

    def put(self, array: Array) -> None:
        """Exchange the content, in the old element type; values beyond its range end at its limits."""
        dtype = self.array.dtype
        if dtype.kind in "iu":
            array = np.clip(np.rint(array), np.iinfo(dtype).min, np.iinfo(dtype).max)
        with np.errstate(over="ignore", invalid="ignore"):
            tensor = ir.tensor(np.asarray(array).astype(dtype), name=self.name)
        if isinstance(self.holder, ir.Value):
            self.holder.const_value = tensor
        else:
            self.holder.attributes.clear()
            self.holder.attributes["value"] = ir.AttrTensor("value", tensor)


def is_float(array: Array) -> bool:
    """Whether an array holds floating-point numbers; by name, for numpy files bfloat16 under no kind of its own."""
    return array.dtype.name.startswith(("float", "bfloat"))


def parameters(model: ir.Model) -> list[Parameter]:
    """Every used tensor of numbers that has an entry: initializers of all graphs, then Constant nodes."""
    found = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and (value.uses() or value.is_graph_output()):
                found.append(_parameter(value.name or "", value.const_value, value))
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and node.outputs[0].uses():
            tensor = _constant_of(node)
            if tensor is not None:
                found.append(_parameter(node.outputs[0].name or "", tensor, node))
    return [one for one in found if one is not None and one.array.size]


def _parameter(name: str, tensor: ir.TensorProtocol, holder: ir.Value | ir.Node) -> Parameter | None:
    if tensor.dtype.bitwidth < 8 or tensor.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        return None
    return Parameter(name, np.asarray(tensor.numpy()), holder)


def _constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if key in node.attributes:
            return ir.tensor(np.asarray(node.attributes[key].value, dtype))
    attribute = node.attributes.get("value")
    return None if attribute is None else attribute.as_tensor()


def weights(model: ir.Model) -> list[Parameter]:
    """The parameters of a floating type."""
    return [one for one in parameters(model) if is_float(one.array)]


# --- edits of weights -----------------------------------------------------------------------------


def _row(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    one = _pick([w for w in weights(model) if np.any(w.array != 0)], rng, name)
    if one is None:
        return None
    array = one.array.astype(np.float64)
    axis = int(rng.choice([a for a, size in enumerate(array.shape) if size > 1] or [-1]))
    if axis == -1:
        one.put(array * ROW_FACTOR)
        return one.name, f"x {ROW_FACTOR}"
    others = tuple(a for a in range(array.ndim) if a != axis)
    index = int(rng.choice(np.flatnonzero(np.any(array != 0, axis=others))))
    array[(slice(None),) * axis + (index,)] *= ROW_FACTOR
    one.put(array)
    return one.name, f"index {index} of axis {axis} of {list(array.shape)} x {ROW_FACTOR}"


def _scale(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    one = _pick([w for w in weights(model) if np.any(w.array != 0)], rng, name)
    if one is None:
        return None
    one.put(one.array.astype(np.float64) * SCALE_FACTOR)
    return one.name, f"all of {list(one.array.shape)} x {SCALE_FACTOR}"


def _entry(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    narrow = [p for p in parameters(model) if p.array.dtype.itemsize == 1 and p.array.ndim > 1]
    one = _pick([w for w in weights(model) if np.any(w.array != 0)] + narrow, rng, name)
    if one is None:
        return None
    array = one.array.astype(np.float64)
    index = tuple(int(rng.integers(size)) for size in array.shape)
    step = ENTRY_SHARE * float(np.max(np.abs(array))) if is_float(one.array) else 1.0
    array[index] += step
    one.put(array)
    return one.name, f"entry {list(index)} of {list(array.shape)} + {step:.3g}"


def _swap(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    one = _pick([w for w in weights(model) if max(w.array.shape, default=1) > 1], rng, name)
    if one is None:
        return None
    axis = int(rng.choice([a for a, size in enumerate(one.array.shape) if size > 1]))
    i, j = (int(k) for k in rng.choice(one.array.shape[axis], 2, replace=False))
    order = np.arange(one.array.shape[axis])
    order[[i, j]] = j, i
    one.put(np.take(one.array, order, axis))
    return one.name, f"{i} and {j} of axis {axis} of {list(one.array.shape)} exchanged"


def _constant(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    one = _pick([p for p in parameters(model) if p.array.size == 1 or p.array.dtype.kind == "i"], rng, name)
    if one is None:
        return None
    array = one.array.astype(np.float64)
    index = tuple(int(rng.integers(size)) for size in array.shape)
    old = array[index]
    new = old + float(rng.choice([-1, 1])) if not is_float(one.array) else (old * ROW_FACTOR if old else 1e-3)
    array[index] = new
    one.put(array)
    return one.name, f"{old:g} became {new:g}"


# --- edits of the graph ---------------------------------------------------------------------------


def _dropped_bias(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    sites = []
    for node in model.graph.all_nodes():
        if node.op_type in _BIAS_INPUTS and node.domain == "":
            places = [_BIAS_INPUTS[node.op_type]]
        elif node.op_type in ("Add", "Sub"):
            places = [0, 1]
        else:
            continue
        for place in places:
            value = node.inputs[place] if place < len(node.inputs) else None
            content = None if value is None else _content(value)
            if content is not None and is_float(content) and np.any(content != 0):
                sites.append((node, place, content))
    chosen = _pick_node(sites, rng, name)
    if chosen is None:
        return None
    node, place, content = chosen
    if node.op_type in _OPTIONAL_BIAS and rng.random() < 0.5:
        node.replace_input_with(place, None)
        return _label(node), "bias input removed"
    zero = _new_initializer(node, np.zeros_like(content))
    node.replace_input_with(place, zero)
    return _label(node), f"bias of {content.size} set to 0"


def _activation(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    sites = [(n, 0, None) for n in model.graph.all_nodes() if n.op_type in _REMOVED and n.domain == ""]
    chosen = _pick_node(sites, rng, name)
    if chosen is None:
        return None
    node = chosen[0]
    if node.op_type in _REPLACED and (rng.random() < 0.5 or node.outputs[0].is_graph_output()):
        old, node.op_type = node.op_type, _REPLACED[node.op_type]
        node.attributes.clear()
        return _label(node), f"{old} became {node.op_type}"
    source = node.inputs[0]
    if source is None or node.outputs[0].is_graph_output():
        return None
    label, old = _label(node), node.op_type
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
    return label, f"{old} removed"


def _attribute(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    sites = []
    for node in model.graph.all_nodes():
        sites += [(node, 0, change) for change in other_values(node)]
    chosen = _pick_node(sites, rng, name)
    if chosen is None:
        return None
    node, _, (key, old, new) = chosen
    node.attributes[key] = ir.serde.deserialize_attribute(onnx.helper.make_attribute(key, new))
    return _label(node), f"{key} of {node.op_type} {old} became {new}"


def _rewire(model: ir.Model, rng: Generator, name: str | None) -> tuple[str, str] | None:
    kinds = _value_kinds(model)
    available: dict[Any, list[ir.Value]] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.name in kinds and value not in available.setdefault(kinds[value.name], []):
            available[kinds[value.name]].append(value)
    sites = []
    for node in model.graph:
        for place, source in enumerate(node.inputs):
            if source is not None and source.name in kinds:
                others = [value for value in available.get(kinds[source.name], []) if value is not source]
                if others:
                    sites.append((node, place, others))
        for value in node.outputs:
            if value.name in kinds:
                available.setdefault(kinds[value.name], []).append(value)
    chosen = _pick_node(sites, rng, name)
    if chosen is None:
        return None
    node, place, others = chosen
    old, new = node.inputs[place], others[int(rng.integers(len(others)))]
    node.replace_input_with(place, new)
    return _label(node), f"input {place} of {node.op_type} {old.name if old else ''!r} became {new.name!r}"


Edit = Callable[[ir.Model, Generator, str | None], tuple[str, str] | None]

_EDITS: dict[str, Edit] = {
    "row": _row,
    "scale": _scale,
    "entry": _entry,
    "swap": _swap,
    "dropped bias": _dropped_bias,
    "activation": _activation,
    "attribute": _attribute,
    "rewire": _rewire,
    "constant": _constant,
}

KINDS = tuple(_EDITS)
"""What `mutate` can do: a row 1% off, a whole weight 0.1% off, one entry 1e-3 of the largest off, two slices exchanged,
a bias of 0, an activation removed or replaced, an attribute changed, an edge moved, a scalar or an integer changed."""

STRUCTURAL = ("dropped bias", "activation", "attribute", "rewire", "constant")
"""Kinds whose results may be no valid model, or one of other shapes."""


def mutate(model: ir.Model, kind: str, rng: Generator, name: str | None = None) -> Mutant | None:
    """Make one edit on a copy of a model.

    Args:
        model: left as it is; tensors are shared with the copy.
        kind: one of `KINDS`.
        rng: draws the place and the index.
        name: of the tensor or node; None draws one.

    Returns:
        The mutant; None where the model has no place for this kind, or the drawn one changes nothing.
    """
    copy = model.clone()
    made = _EDITS[kind](copy, rng, name)
    return None if made is None else Mutant(copy, kind, *made)


# --- places ---------------------------------------------------------------------------------------


def _pick(found: list[Parameter], rng: Generator, name: str | None) -> Parameter | None:
    chosen = [one for one in found if name is None or one.name == name]
    return chosen[int(rng.integers(len(chosen)))] if chosen else None


def _pick_node(
    found: list[tuple[ir.Node, int, Any]], rng: Generator, name: str | None
) -> tuple[ir.Node, int, Any] | None:
    chosen = [one for one in found if name is None or _label(one[0]) == name]
    return chosen[int(rng.integers(len(chosen)))] if chosen else None


def _label(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name or "" if node.outputs else "")


def _content(value: ir.Value) -> Array | None:
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        tensor = _constant_of(producer)
    return None if tensor is None else np.asarray(tensor.numpy())


def _new_initializer(node: ir.Node, array: Array) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    value = ir.Value(name=f"mutant_{len(graph.initializers)}", const_value=ir.tensor(array))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
    value.const_value = ir.tensor(array, name=value.name)
    graph.register_initializer(value)
    return value


def _value_kinds(model: ir.Model) -> dict[str | None, tuple[int, tuple[int | str, ...]]]:
    """Element type and shape of each value of the main graph whose axes are all known by number or name."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    found: dict[str | None, tuple[int, tuple[int | str, ...]]] = {}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        kind = info.type.tensor_type
        dims = tuple(_dims(kind))
        if kind.HasField("shape") and None not in dims:
            found[info.name] = kind.elem_type, tuple(dim for dim in dims if dim is not None)
    for tensor in proto.graph.initializer:
        found[tensor.name] = tensor.data_type, tuple(tensor.dims)
    return found


def _dims(kind: onnx.TypeProto.Tensor) -> Iterator[int | str | None]:
    for dim in kind.shape.dim:
        yield dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
