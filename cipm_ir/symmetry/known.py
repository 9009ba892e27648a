"""What a walk knows of the values it meets: shapes at both choices of dynamic sizes, and small numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import constant_tensor, evaluate
from cipm_ir.ir.fused_shapes import node_shapes
from cipm_ir.ir.labels import Array, State
from cipm_ir.ir.parameters import overridable_inputs
from cipm_ir.ir.shapes import Shape, implied_shape
from cipm_ir.ir.stand_ins import infer_shapes
from cipm_ir.ir.varying import note_varying
from cipm_ir.ops.context import Literal

LITERAL_SIZE = 4096
FLOAT_LITERAL_SIZE = 64
FLOATS = frozenset(d for d in ir.DataType if d.is_floating_point())
QUANTIZED = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}


class Known:
    """Shapes and numbers of the values of a model, learned as a walk goes along.

    Attributes:
        model: the model that is walked.
        shapes: of values, at both choices of dynamic sizes; what the inference of the whole graph lacks is added.
        states: labels of values that are no parameters.
        literals: values that are known as numbers, at both choices.
        varying: which entries of such numbers depend on a dynamic size.
        params: parameters by name: the tensor, and whether it is a filled constant.
        trusted: no input has a default, so that shapes that a file notes inside bodies hold.
        path: the body that is walked.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.shapes = infer_shapes(model)
        self.states: dict[str, State] = {}
        self.literals: dict[str, Literal] = {}
        self.varying: dict[str, Array] = {}
        self.params: dict[str, tuple[ir.TensorProtocol | None, bool]] = {}
        self.trusted = not overridable_inputs(model)
        self.path = ""

    def literal(self, value: ir.Value | None) -> Literal | None:
        """Return number that a value is known to be: a small parameter, or what a chain of sizes evaluates to."""
        name = "" if value is None else value.name or ""
        if name in self.literals or name not in self.params:
            return self.literals.get(name)
        tensor = self.params[name][0]
        shape = self.shapes.first.get(name)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return None
        size = tensor.size if shape is None else math.prod(shape)
        if size > (FLOAT_LITERAL_SIZE if tensor.dtype in FLOATS else LITERAL_SIZE):
            return None
        array = np.asarray(tensor.numpy())
        self.literals[name] = (array, array)
        return self.literals[name]

    def known_shape(self, value: ir.Value, table: dict[str, Shape]) -> Shape | None:
        name = value.name or ""
        tensor = self.params[name][0] if name in self.params else None
        return table.get(name) if tensor is None else tuple(tensor.shape.numpy())

    def shaped(self, name: str, first: Shape, second: Shape | None) -> None:
        """Note the shapes, at both choices of dynamic sizes, of a value that the walk knows as numbers."""
        self.shapes.first[name] = first
        if not self.shapes.static and second is not None:
            self.shapes.second[name] = second

    def fixed(self, name: str, shapes: Sequence[Shape | None]) -> None:
        """Note a value without labels, at both choices of dynamic sizes; nothing where a shape is not known."""
        first, second = (*shapes, *shapes)[:2] if shapes else (None, None)
        if first is None or second is None:
            return
        self.states[name] = State(first)
        self.shaped(name, first, second)

    def learn(self, name: str, state: State, node: ir.Node) -> None:
        """A rule knew the shape of an output that ONNX could not infer: that of its first input."""
        self.shapes.first[name] = state.shape
        source = node.inputs[0].name or "" if node.inputs and node.inputs[0] is not None else ""
        if not self.shapes.static and self.shapes.first.get(source) == state.shape and source in self.shapes.second:
            self.shapes.second[name] = self.shapes.second[source]

    def implied(self, node: ir.Node) -> State | None:
        """Return an unlabelled first operand of unknown shape (behind an opaque node).

        As far as the weight implies it.
        """
        first, weight = (*node.inputs, None, None)[:2]
        shape = None if weight is None else self.known_shape(weight, self.shapes.first)
        if first is None or shape is None or (made := implied_shape(node, shape, 0)) is None:
            return None
        if self.shapes.static:
            self.shapes = replace(self.shapes, second=dict(self.shapes.first))
        self.shapes.first[first.name or ""] = made
        self.shapes.second[first.name or ""] = implied_shape(node, shape, 1) or made
        self.states[first.name or ""] = State(made)
        return self.states[first.name or ""]

    def output_shapes(self, node: ir.Node, version: int) -> list[Shape | None]:
        """Return shapes of the outputs; node by node where the inference of the whole graph gave up."""
        shapes = [self.shapes.first.get(v.name or "") for v in node.outputs]
        if not any(s is None and v.name for s, v in zip(shapes, node.outputs, strict=True)):
            return shapes
        literals = [self.literal(v) for v in node.inputs]
        for which, table in enumerate((self.shapes.first, self.shapes.second)[: 1 if self.shapes.static else 2]):
            known = [None if v is None else self.known_shape(v, table) for v in node.inputs]
            numbers = [None if p is None else p[which] for p in literals]
            found = node_shapes(node, known, version, self.shapes.types, numbers)
            for value, shape in zip(node.outputs, found, strict=True):
                if shape is None and self.path and self.trusted and value.shape is not None and value.shape.is_static():
                    shape = tuple(value.shape.numpy())  # in a body: ONNX's inference of the main graph gives none
                if shape is not None and value.name:
                    table.setdefault(value.name, shape)
        return [self.shapes.first.get(v.name or "") for v in node.outputs]

    def constant(self, node: ir.Node) -> None:
        name = node.outputs[0].name or ""
        tensor = constant_tensor(node)
        if tensor is None:  # strings, sparse tensors
            self.states[name] = State(self.shapes.first.get(name, ()))
            return
        self.params[name] = (tensor, False)
        self.shapes.first.setdefault(name, tuple(tensor.shape.numpy()))

    def evaluated(self, node: ir.Node, literals: list[Literal | None]) -> bool:
        """Follow chains of shapes and indices as numbers; True where nothing else is left to do."""
        known = len(node.outputs) == 1 and all(v is None or lit for v, lit in zip(node.inputs, literals, strict=True))
        if not known and node.op_type not in ("Shape", "Size"):
            return False
        source = node.inputs[0] if node.inputs else None
        name = (source.name or "") if source is not None else ""
        first_shape, second_shape = self.shapes.first.get(name), self.shapes.second.get(name)
        first = evaluate(node, [None if p is None else p[0] for p in literals], first_shape, 0)
        if first is None:
            return False
        second: Array | None = first
        if not self.shapes.static:
            second = evaluate(node, [None if p is None else p[1] for p in literals], second_shape, 0)
        out = node.outputs[0].name or ""
        if second is not None:
            self.literals[out] = (first, first if first.shape == second.shape and (first == second).all() else second)
            if not self.shapes.static:
                note_varying(self.varying, self.shapes, node, [None if p is None else p[0] for p in literals], first)
        if first.dtype.kind not in "iub" or any(self.quantized(v) for v in node.inputs):
            return False
        self.states[out] = State(first.shape)
        self.shaped(out, first.shape, None if second is None else second.shape)
        return True

    def quantized(self, value: ir.Value | None) -> bool:
        """Return whether this may be a weight in few bits, whose axes have units, rather than sizes and indices."""
        name = "" if value is None else value.name or ""
        tensor = self.params[name][0] if name in self.params else None
        state = self.states.get(name)
        return bool(tensor.dtype in QUANTIZED) if tensor is not None else state is not None and bool(state.factors)

    def filled(self, node: ir.Node, literals: list[Literal | None]) -> bool:
        """ConstantOfShape of a constant shape is a parameter."""
        if (
            node.op_type != "ConstantOfShape"
            or node.domain
            or literals[0] is None
            or literals[0][0] is not literals[0][1]
            or (node.inputs[0].name if node.inputs[0] else "") in self.varying
        ):
            return False
        value = node.outputs[0]
        name = value.name or ""
        self.params[name] = (None, True)
        shape = tuple(int(d) for d in literals[0][0])
        self.shaped(name, shape, shape)
        fill = node.attributes.get("value")
        array = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
        if value.dtype is None:
            value.dtype = ir.DataType.from_numpy(array.dtype)
        if int(np.prod(self.shapes.first[name])) <= LITERAL_SIZE:
            full = np.full(self.shapes.first[name], array.reshape(-1)[0], array.dtype)
            self.literals[name] = (full, full)
        return True
