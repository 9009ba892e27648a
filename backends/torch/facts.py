"""What is known of an ONNX value before anything runs: constants, shapes, element types."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from torch import fx

from cipm_ir.errors import UnsupportedError
from cipm_ir.ir.constants import LIMIT, attribute, constant_tensor, evaluate
from cipm_ir.ir.opsets import standard_version
from cipm_ir.ir.parameters import is_overridable
from cipm_ir.ir.shapes import Shapes, infer_node
from cipm_ir.ir.stand_ins import infer_shapes
from cipm_ir.runtime.graphs import describe_node

__all__ = ["CHAIN", "Facts", "Int", "argument_default", "held_tensor", "is_default", "refuse"]

Int: TypeAlias = int | fx.Node
"""A size: a Python integer, or the fx node that computes one."""

CHAIN = frozenset(
    ("Identity", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Reshape", "Expand", "Add", "Sub", "Mul", "Div",
     "Min", "Max", "Shape", "Size", "Cast", "ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin", "Equal", "Where",
     "Mod", "Less", "Greater", "Neg", "Not", "Floor", "Ceil", "Sqrt", "Range", "ConstantOfShape", "ScatterElements")
)  # fmt: skip
"""Operators through which a value may be a constant or a size."""
_OF_SHAPE = ("Shape", "Size")
_SAME_SHAPE = ("GroupNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "RotaryEmbedding")
"""Operators whose output has the shape of the first input, and for which ONNX may have no inference."""


def refuse(node: ir.Node, reason: str) -> UnsupportedError:
    """Return the error for a node that cannot be written exactly.

    `reason` says what is missing and what to do instead.
    """
    return UnsupportedError(f"{describe_node(node)} cannot be written as torch calls: {reason}.")


def is_default(node: ir.Node) -> bool:
    """Return whether a node is of the standard operator set."""
    return not node.domain


def argument_default(v: ir.Value) -> ir.TensorProtocol | None:
    """Default of an input of floats, which becomes an argument; one of integers, mostly a size, stays its default."""
    held = v.const_value
    return held if held is not None and held.dtype.is_floating_point() and is_overridable(v) else None


def held_tensor(v: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant; None for one that is an argument (`argument_default`)."""
    if v.const_value is not None:
        return v.const_value if argument_default(v) is None else None
    node = v.producer()
    return constant_tensor(node) if node is not None and node.op_type == "Constant" and is_default(node) else None


def _foldable(node: ir.Node | None) -> bool:
    if node is None or not is_default(node) or len(node.outputs) != 1 or node.op_type not in CHAIN:
        return False
    return not (node.op_type == "Mod" and attribute(node, "fmod", 0))


def _filled(node: ir.Node, sizes: np.ndarray | None) -> np.ndarray | None:
    """Return a small integer ConstantOfShape of known sizes; one of floats may be a weight and stays a call."""
    value = attribute(node, "value")
    if sizes is None or value is None or not value.dtype.is_integer() or np.prod(sizes) > LIMIT:
        return None
    return np.full(sizes.tolist(), np.asarray(value.numpy()).reshape(()))


class Facts:
    """Constants, shapes and types of the values of a model, worked out when they are asked for.

    Attributes:
        model: the model; not changed.
        version: the version of its default operator set.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.version = standard_version(model.opset_imports) or 1
        self._folded: dict[str, np.ndarray | None] = {}
        self._inferred: Shapes | None = None

    def constant(self, v: ir.Value | None) -> np.ndarray | None:
        """Return the array that a value always holds.

        An initializer, a Constant, or small integer arithmetic on such.
        """
        if v is None:
            return None
        held = held_tensor(v)
        if held is not None:
            return np.asarray(held.numpy())
        stack = [v]
        while stack:
            top = stack[-1]
            pending = [] if self._decided(top) else self._undecided_inputs(top)
            stack.extend(pending)
            if not pending:
                if not self._decided(top):
                    self._folded[top.name or ""] = self._fold(top)
                stack.pop()
        return self._folded[v.name or ""]

    def shape(self, v: ir.Value | None) -> tuple[int | None, ...] | None:
        """Static sizes of a value, None for a dynamic one; None where even the rank is unknown."""
        if v is None:
            return None
        if v.const_value is not None:
            return tuple(v.const_value.shape.numpy())
        if v.shape is not None and v.shape.is_static():
            return tuple(v.shape.numpy())
        shapes = self._shapes()
        first, second = shapes.first.get(v.name or ""), shapes.second.get(v.name or "")
        if first is not None and second is not None and len(first) == len(second):
            return tuple(a if a == b else None for a, b in zip(first, second, strict=True))
        return None if v.shape is None else tuple(d if isinstance(d, int) else None for d in v.shape)

    def rank(self, node: ir.Node, v: ir.Value | None) -> int:
        """Return the number of axes of a value; UnsupportedError where it cannot be inferred."""
        shape = self.shape(v)
        if shape is None:
            name = None if v is None else v.name
            raise refuse(node, f"the rank of {name!r} is unknown; run shape inference on the model first")
        return len(shape)

    def dtype(self, node: ir.Node, v: ir.Value | None) -> ir.DataType:
        """Return element type of a value; UnsupportedError where it cannot be inferred."""
        found = None
        if v is not None:
            found = v.dtype or (v.const_value.dtype if v.const_value is not None else None)
            found = found or self._shapes().types.get(v.name or "")
        if found is None:
            name = None if v is None else v.name
            raise refuse(node, f"the element type of {name!r} is unknown; run shape inference on the model first")
        return found

    # ------------------------------------------------------------ inside
    def _shapes(self) -> Shapes:
        if self._inferred is None:
            self._inferred = infer_shapes(self.model)
            for node in self.model.graph:
                if any((v.name or "") not in self._inferred.first for v in node.outputs):
                    self._complete(self._inferred, node)
        return self._inferred

    def _complete(self, shapes: Shapes, node: ir.Node) -> None:
        """Shapes of a node's outputs where the inference over the whole graph gave up."""
        for which in {id(known): known for known in (shapes.first, shapes.second)}.values():
            inputs = [None if v is None else which.get(v.name or "") for v in node.inputs]
            numbers = [None if v is None else self._small(v) for v in node.inputs]
            found = infer_node(node, inputs, self.version, shapes.types, numbers)
            if found[0] is None and node.op_type in _SAME_SHAPE:
                found[0] = inputs[0]
            for v, shape in zip(node.outputs, found, strict=True):
                if shape is not None and v.name:
                    which.setdefault(v.name, shape)

    def _decided(self, v: ir.Value) -> bool:
        return (v.name or "") in self._folded or held_tensor(v) is not None

    def _undecided_inputs(self, v: ir.Value) -> list[ir.Value]:
        node = v.producer()
        if node is None or not _foldable(node) or node.op_type in _OF_SHAPE:
            return []
        return [i for i in node.inputs if i is not None and not self._decided(i)]

    def _fold(self, v: ir.Value) -> np.ndarray | None:
        node = v.producer()
        if node is None or not _foldable(node):
            return None
        if node.op_type in _OF_SHAPE:
            shape = self.shape(node.inputs[0])
            static = None if shape is None or None in shape else tuple(d for d in shape if d is not None)
            return evaluate(node, [], static, self.version)
        if node.op_type == "ConstantOfShape":
            return _filled(node, None if node.inputs[0] is None else self._small(node.inputs[0]))
        return evaluate(node, [None if i is None else self._small(i) for i in node.inputs], None, self.version)

    def _small(self, v: ir.Value) -> np.ndarray | None:
        """Return a constant that may be folded: weights stay parameters."""
        held = held_tensor(v)
        if held is None:
            return self._folded.get(v.name or "")
        trained = v.is_initializer() and not (held.dtype.is_integer() or held.dtype == ir.DataType.BOOL)
        return None if trained or held.size > LIMIT else np.asarray(held.numpy())
