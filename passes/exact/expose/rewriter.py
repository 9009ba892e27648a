"""A model while `expose` rewrites it: shapes, constants, weights of a node's own, names that are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import nodes_within
from cipm_ir.ir.opsets import standard_version
from cipm_ir.ir.parameters import named, on_demand, parameter_tensor
from cipm_ir.ir.shapes import Shapes
from cipm_ir.ir.stand_ins import infer_shapes
from cipm_ir.passes.exact.cleanup.replace_values import is_unused
from cipm_ir.runtime.graphs import all_values

REAL = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant that one input of a node always has.

    Attributes:
        node, index: the input.
        holder: the initializer, or the output of a Constant, that stores it.
        path: Transpose and Identity nodes between, the nearest to the node first.
        tensor: as stored.
    """

    node: ir.Node
    index: int
    holder: ir.Value
    path: tuple[ir.Node, ...]
    tensor: ir.TensorProtocol

    @property
    def name(self) -> str:
        """The name it is stored under."""
        return self.holder.name or "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as the node reads it."""
        shape = tuple(self.tensor.shape.numpy())
        for node in reversed(self.path):
            shape = tuple(shape[a] for a in _perm(node, len(shape)))
        return shape

    @property
    def array(self) -> Array:
        """The content as the node reads it, in float64."""
        array = np.asarray(self.tensor.numpy()).astype(np.float64)
        for node in reversed(self.path):
            array = array.transpose(_perm(node, array.ndim))
        return array

    def stored(self, array: Array) -> Array:
        """Return what must be stored for the node to read this."""
        for node in self.path:
            array = array.transpose(np.argsort(_perm(node, array.ndim)))
        return array

    @property
    def alone(self) -> bool:
        """Whether nothing else reads it, on any part of the way."""
        values = [self.holder, *(node.outputs[0] for node in self.path)]
        return all(len(value.uses()) == 1 and not value.is_graph_output() for value in values)


def _shapes(model: ir.Model) -> Shapes:
    """Return shapes of all values; onnxruntime's own normalization, unknown to ONNX, passes for a product meanwhile."""
    foreign = [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization"]
    domains = [node.domain for node in foreign]
    for node in foreign:
        node.op_type, node.domain = "Mul", ""
    try:
        return infer_shapes(model)
    finally:
        for node, domain in zip(foreign, domains, strict=True):
            node.op_type, node.domain = "SimplifiedLayerNormalization", domain


def _perm(node: ir.Node, rank: int) -> list[int]:
    if node.op_type == "Identity":
        return list(range(rank))
    return [int(a) for a in attribute(node, "perm", range(rank - 1, -1, -1))]


@dataclass(frozen=True)
class Write:
    """A weight that gets new content, decided and checked, not yet written.

    Attributes:
        weight: as it was.
        make: gives the new content from the old one, in float64.
    """

    weight: Weight
    make: Callable[[Array], Array]

    @property
    def array(self) -> Array:
        """The new content, rounded."""
        with np.errstate(over="ignore"):
            return np.asarray(self.make(self.weight.array).astype(self.weight.tensor.dtype.numpy()))


class GraphRewriter:
    """The model, its shapes, and the edits that every rewrite needs. ``split``: "vectors", "all" or "none"."""

    def __init__(self, model: ir.Model, split: str = "vectors") -> None:
        self.model, self.graph, self.split = model, model.graph, split
        self.version = standard_version(model.opset_imports)
        self.shapes = _shapes(model)
        self._names: set[str | None] = {value.name for value in all_values(model.graph)}
        self._nodes: set[str | None] = {node.name for node in nodes_within(model.graph)}
        self._idle = {node for node in model.graph if is_unused(node)}
        self._unread = {name for name, value in model.graph.initializers.items() if not value.uses()}

    # ------------------------------------------------------------ reading
    def sizes(self, value: ir.Value | None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the shape under two assignments of the dynamic sizes, None where it is unknown."""
        name = "" if value is None else value.name or ""
        tensor = parameter_tensor(value)
        if tensor is not None:
            shape = tuple(tensor.shape.numpy())
            return shape, shape
        first, second = self.shapes.first.get(name), self.shapes.second.get(name)
        return None if first is None or second is None else (first, second)

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of axes, None where it is unknown."""
        sizes = self.sizes(value)
        return None if sizes is None else len(sizes[0])

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return element type, None where it is unknown."""
        return value.dtype or self.shapes.types.get(value.name or "")

    def weight(self, node: ir.Node, index: int) -> Weight | None:
        """Return the floating-point constant at an input: an initializer that no caller can override, or a Constant."""
        value = node.inputs[index] if index < len(node.inputs) else None
        path: list[ir.Node] = []
        while value is not None and not value.is_initializer():
            maker = value.producer()
            if maker is None or maker.domain or maker.graph is not self.graph:
                return None
            if maker.op_type == "Constant":
                break
            if maker.op_type not in ("Identity", "Transpose"):
                return None
            path.append(maker)
            value = maker.inputs[0]
        tensor = parameter_tensor(value)
        if value is None or tensor is None or tensor.dtype not in REAL:
            return None
        return Weight(node, index, value, tuple(path), tensor)

    def constant(self, value: ir.Value | None) -> Array | None:
        """Content of a value that is a constant, of any type."""
        while value is not None and not value.is_initializer():
            maker = value.producer()
            if maker is None or maker.domain or maker.op_type not in ("Constant", "Identity"):
                return None
            if maker.op_type == "Constant":
                break
            value = maker.inputs[0]
        tensor = parameter_tensor(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return None
        return np.asarray(tensor.numpy())

    def scalar(self, value: ir.Value | None) -> float | None:
        """Return the number that a value of one entry is known to be."""
        array = self.constant(value)
        return float(array.reshape(())) if array is not None and array.size == 1 else None

    def made_by(self, value: ir.Value | None, *ops: str) -> ir.Node | None:
        """Return the node of the main graph that makes a value, if it is one of these operators."""
        node = None if value is None else self.through(value).producer()
        right = node is not None and node.op_type in ops and not node.domain and node.graph is self.graph
        return node if right else None

    def through(self, value: ir.Value) -> ir.Value:
        """Return the value behind copies of it: Identity, and Cast to the type that it has."""
        node = value.producer()
        while node is not None and not node.domain and node.op_type in ("Identity", "Cast"):
            source = node.inputs[0]
            if source is None:
                break
            if node.op_type == "Cast" and attribute(node, "to") != self.dtype(source):
                break
            value, node = source, source.producer()
        return value

    # ------------------------------------------------------------ deciding
    def owned(self, weight: Weight) -> None:
        """Refuse a weight that others read too, unless it may be split."""
        if weight.alone or self.may_split(weight.tensor):
            return
        raise UnsupportedPattern(f"{weight.name} is read in several places (shared=all splits it)")

    def may_split(self, tensor: ir.TensorProtocol) -> bool:
        """Return whether a shared constant of this size may become several."""
        vector = sum(size > 1 for size in tensor.shape.numpy()) <= 1
        return self.split == "all" or (self.split == "vectors" and vector)

    def change(self, weight: Weight, make: Callable[[Array], Array]) -> Write:
        """Return a decided change of a weight, as a function of its content in float64.

        Refuses what other places read, overflow, and rounding to half precision.
        """
        self.owned(weight)
        self.rounded(make(weight.array), weight.tensor.dtype, weight.name)
        return Write(weight, make)

    def rounded(self, array: Array, dtype: ir.DataType, name: str) -> Array:
        """Content in the type of a constant. Refuses overflow, and rounding to half precision."""
        with np.errstate(over="ignore"):
            rounded: Array = array.astype(dtype.numpy())
        if not np.isfinite(rounded if rounded.dtype.kind == "f" else rounded.astype(np.float32)).all():
            raise UnsupportedPattern(f"{name} would not stay finite")
        if dtype in _HALF and not np.array_equal(rounded.astype(np.float64), array):
            raise UnsupportedPattern(f"{name} would round in {dtype.name.lower()}")
        return rounded

    # ------------------------------------------------------------ writing
    def write(self, change: Write) -> None:
        """Give the input its new content: in place where nothing else reads the constant."""
        weight = change.weight
        now = self.weight(weight.node, weight.index) or weight  # an earlier write may have split it
        if now.alone and now.holder.is_initializer():
            now.holder.const_value = self._changed(change, now)
            return
        weight.node.replace_input_with(weight.index, self.stored(weight.name, self._changed(change, None)))

    def _changed(self, change: Write, place: Weight | None) -> ir.TensorProtocol:
        """Return the new tensor, in the layout of where it is stored."""
        dtype, shape = change.weight.tensor.dtype, change.weight.shape
        name = None if place is None else place.holder.name

        def made() -> ir.TensorProtocol:
            array = change.array if place is None else place.stored(change.array)
            return ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=name)

        return on_demand(made, dtype, shape if place is None else tuple(place.tensor.shape.numpy()), name)

    def initializer(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        """Return a new constant under this name, or the next one that is free."""
        return self.stored(name, ir.tensor(np.asarray(array).astype(dtype.numpy()), dtype=dtype))

    def stored(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a tensor, which may be shared, as an initializer under this name, or the next one that is free."""
        name, dtype = self.fresh(name), tensor.dtype
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=named(tensor, name))
        self.graph.register_initializer(value)
        return value

    def fresh(self, name: str) -> str:
        """Return a name that no value has; it counts as taken from now on."""
        return _free(name, self._names)

    def twin(self, value: ir.Value, name: str) -> ir.Value:
        """Return a new value of the same shape and type under this name, or the next one that is free."""
        return ir.Value(name=self._same_shape(value, name), shape=value.shape, type=value.type)

    def _same_shape(self, value: ir.Value, name: str) -> str:
        name = self.fresh(name)
        for table in (self.shapes.first, self.shapes.second):
            if value.name in table:
                table[name] = table[value.name]
        return name

    def new_node(
        self, place: ir.Node, op: str, inputs: list[ir.Value], out: ir.Value, name: str | None = None, **attrs: Any
    ) -> ir.Node:
        """Return a node to stand beside another one, with the other's metadata.

        Its name is free, or given up by another.
        """
        if name is None:
            name = _free(out.name or op, self._nodes)
        metadata = dict(place.metadata_props)
        attributes = ir.convenience.convert_attributes(attrs)
        return ir.Node("", op, inputs, attributes, outputs=[out], name=name, metadata_props=metadata)

    def take_over(self, value: ir.Value, aside: str) -> ir.Value:
        """Return a new value that gets the name and all readers of this one, which goes on as ``aside``."""
        successor = ir.Value(name=value.name, shape=value.shape, type=value.type)
        successor.metadata_props.update(value.metadata_props)
        successor.meta.update(value.meta)
        value.name = self._same_shape(value, aside)
        value.replace_all_uses_with(successor, replace_graph_outputs=True)
        return successor

    def sweep(self) -> None:
        """Remove the nodes and initializers that the rewriting left without a reader."""
        for node in reversed(list(self.graph)):
            if node not in self._idle and is_unused(node):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            read = value.uses() or value.is_graph_output() or value.is_graph_input()
            if name not in self._unread and not read:
                del self.graph.initializers[name]


def _free(name: str, taken: set[str | None]) -> str:
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    taken.add(unique)
    return unique
