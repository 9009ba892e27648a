"""Every node of a graph with the concrete shapes around it, subgraphs included, at given sizes of the inputs.

For the analysis dynamic sizes are chosen by `cipm_ir.ir.stand_ins`; to count, sizes are those of a run. ONNX's
inference of the whole graph comes first; where it gives up, small numbers are evaluated and nodes are taken one by one
(`cipm_ir.ir.fused_shapes.node_shapes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import LIMIT, attribute, constant_tensor, evaluate
from cipm_ir.ir.fused_shapes import node_shapes
from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.parameters import free_inputs, overridable_inputs
from cipm_ir.ir.shapes import (
    Shape,
    annotated,
    contradicts,
    infer_sized,
    own_name,
    recorded_shape,
    replaceable_values,
    stripped,
)

_NUMBERS = 4096
"""Parameters with so many entries or fewer are known as numbers."""


_WINDOWS = {"AveragePool", "Conv", "ConvInteger", "ConvTranspose", "LpPool", "MaxPool", "QLinearConv", "STFT"}
_RECURRENT = {"GRU", "LSTM", "RNN"}


@dataclass
class Place:
    """One node with the shapes of its inputs and outputs, None where unknown.

    Attributes:
        node: the node.
        version: of its operator set.
        inputs, outputs: concrete shapes.
        numbers: values of small constant inputs.
        bodies: the nodes of each subgraph.
        starts: shapes of the inputs of the body of a Loop or Scan, None where unknown or different from run to run.
        trips: how often a Loop or Scan runs its body at most; None where that is not known.
        fits: False where its shapes contradict each other, so that no run at these sizes gets past it.
        left_out: branches of an If, here and below, that cannot run at these sizes, beside ones that can.
    """

    node: ir.Node
    version: int
    inputs: list[Shape | None]
    outputs: list[Shape | None]
    numbers: list[Array | None]
    bodies: list[list[Place]] = field(default_factory=list)
    starts: list[Shape | None] = field(default_factory=list)
    trips: int | None = None
    fits: bool = True
    left_out: int = 0


Constants = dict[int, tuple[ir.TensorProtocol, Shape, ir.DataType, Array | None]]
"""By the identity of a tensor: itself, its shape, its type, and its entries where they are few."""

Recorded = Callable[[ir.Value], Shape | None]
"""The shape that a file records of a value, None where it has no sizes."""


def place_nodes(model: ir.Model, sizes: Mapping[str, int]) -> list[Place]:
    """Return the nodes of the main graph of a model without model-local functions, in its order.

    Args:
        model: the model.
        sizes: of the dynamic dimensions, by the names of `dynamic_sizes`; 1 where one is left out.

    Raises: `InputError` when ONNX's shape inference finds the model inconsistent at these sizes.
    """
    replaceable = replaceable_values(model)
    shapes, types, complete = annotated(model, replaceable)
    fixed = all(v.shape is not None and v.shape.is_static() for v in free_inputs(model.graph))
    given = dict(sizes)
    for value in model.graph.inputs:  # a default has the sizes that it has
        if value.const_value is not None and value.shape is not None:
            own = zip(value.shape, value.const_value.shape.numpy(), strict=False)
            given.update({d.value: n for d, n in own if not isinstance(d, int) and d.value})
    if not complete:
        found = infer_sized(
            stripped(model, replaceable, recorded=fixed),
            lambda symbol, name, axis: given.get(symbol or own_name(name, axis), 1),
            types,
        )
        shapes = {**found, **shapes} if fixed else found
    return place_from(
        model,
        shapes,
        types,
        lambda value: None if value in replaceable else recorded_shape(value, given),
        defaults=True,
    )


def place_from(
    model: ir.Model,
    shapes: dict[str, Shape],
    types: dict[str, ir.DataType],
    recorded: Recorded,
    *,
    defaults: bool,
    constants: Constants | None = None,
) -> list[Place]:
    """Return the same, from shapes that are known: those that follow node by node are added to them.

    Args:
        model: the model.
        shapes: of values of the main graph.
        types: of values.
        recorded: asked for the shape of a value where nothing else gives it.
        defaults: whether inputs have the values of their defaults.
        constants: what was read of tensors at other sizes; added to.
    """
    unknown = () if defaults else [value.name or "" for value in overridable_inputs(model)]
    found = {} if constants is None else constants
    return _Scope(model, shapes, types, {}, recorded, frozenset(unknown), found, defaults).places(model.graph)


def place_body(
    model: ir.Model,
    node: ir.Node,
    shapes: Mapping[str, Shape],
    types: Mapping[str, ir.DataType],
    numbers: Mapping[str, Array],
) -> Place:
    """Return a Loop or Scan with its body, from what is known of the values around it, by name."""
    unknown = frozenset(value.name or "" for value in overridable_inputs(model))
    return _Scope(model, dict(shapes), dict(types), dict(numbers), lambda _: None, unknown).place(node)


@dataclass
class _Scope:
    """What is known inside one graph; a subgraph starts from what is known around it."""

    model: ir.Model
    shapes: dict[str, Shape]
    types: dict[str, ir.DataType]
    numbers: dict[str, Array]
    recorded: Recorded
    unknown: frozenset[str]
    """Initializers the values of which are not known."""
    constants: Constants = field(default_factory=dict)
    of_a_run: bool = False
    """Sizes are those of a run, which enters no branch that cannot run at them; else all branches are placed."""

    def places(self, graph: ir.Graph) -> list[Place]:
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is not None:
                self._tensor(name, tensor)
        return [self.place(node) for node in graph]

    def _tensor(self, name: str, tensor: ir.TensorProtocol) -> None:
        known = self.constants.get(id(tensor))
        if known is None:
            small = tensor.size <= _NUMBERS and tensor.dtype != ir.DataType.STRING
            number = np.asarray(tensor.numpy()) if small else None
            known = self.constants[id(tensor)] = tensor, tuple(tensor.shape.numpy()), tensor.dtype, number
        _, self.shapes[name], self.types[name], number = known
        if number is not None and name not in self.unknown:
            self.numbers[name] = number

    def place(self, node: ir.Node) -> Place:
        version = node.version or self.model.opset_imports.get(node.domain, 1)
        names = [None if v is None else v.name or "" for v in node.inputs]
        inputs = [None if n is None else self.shapes.get(n) for n in names]
        numbers = [None if n is None else self.numbers.get(n) for n in names]
        place = Place(node, version, inputs, [], numbers)
        if node.op_type == "Constant" and not node.domain:
            tensor = constant_tensor(node)
            if tensor is not None:
                self._tensor(node.outputs[0].name or "", tensor)
        elif subgraphs(node):
            self._nested(place)
        else:
            self._inferred(place)
        for value in node.outputs:
            if value.name and value.name not in self.shapes:
                self._set(value, self.recorded(value))
        place.outputs = [self.shapes.get(v.name or "") for v in node.outputs]
        if not place.bodies:
            typed = all(v is None or self._type(v) is not None for v in node.inputs)
            place.fits = not cannot_run(place, self.types if typed else None)
        place.left_out += sum(one.left_out for body in place.bodies for one in body)
        return place

    def _inferred(self, place: Place) -> None:
        node = place.node
        known = all(v is None or a is not None for v, a in zip(node.inputs, place.numbers, strict=True))
        if known or node.op_type in ("Shape", "Size"):
            first = place.inputs[0] if place.inputs else None
            made = evaluate(node, place.numbers, first, 0, LIMIT)
            made = _more_numbers(place) if made is None else made
            if made is not None:
                name = node.outputs[0].name or ""
                self.numbers[name] = made
                self.shapes[name] = made.shape
                return
        if all(v.name in self.shapes or not v.name for v in node.outputs):
            return
        found = node_shapes(node, place.inputs, place.version, self.types, place.numbers)
        for value, shape in zip(node.outputs, found, strict=False):
            if shape is not None and value.name:
                self.shapes.setdefault(value.name, shape)

    # ------------------------------------------------------------ subgraphs
    def _nested(self, place: Place) -> None:
        node = place.node
        if node.op_type == "If" and not node.domain:
            self._branches(place)
        elif node.op_type == "Loop" and not node.domain:
            self._loop(place)
        elif node.op_type == "Scan" and not node.domain and place.version >= 9:
            self._scan(place)
        else:
            place.bodies = [self._inner(graph, []).places(graph) for graph in subgraphs(node)]

    def _inner(self, graph: ir.Graph, inputs: list[Shape | None]) -> _Scope:
        known = dict(self.shapes), dict(self.types), dict(self.numbers)
        scope = _Scope(self.model, *known, self.recorded, self.unknown, self.constants, self.of_a_run)
        for k, value in enumerate(graph.inputs):
            shape = inputs[k] if k < len(inputs) else None
            if value.dtype is not None:
                scope.types[value.name or ""] = value.dtype
            if shape is not None:
                scope.shapes[value.name or ""] = shape
        for made in graph:
            for value in made.outputs:
                if value.name and value.shape is not None and value.shape.is_static():
                    scope.shapes[value.name] = tuple(value.shape.numpy())
                if value.name and value.dtype is not None:
                    scope.types[value.name] = value.dtype
        return scope

    def _branches(self, place: Place) -> None:
        """Place both branches, or the one that a constant condition takes; results are as large as the larger ones.

        At the sizes of a run, a branch that cannot run beside one that can is left out.
        """
        ends: list[list[Shape | None]] = []
        condition = place.numbers[0]
        graphs = [attribute(place.node, name) for name in ("then_branch", "else_branch")]
        if condition is not None and condition.size == 1:
            graphs = graphs[:1] if bool(condition.reshape(-1)[0]) else graphs[1:]
        for graph in graphs:
            scope = self._inner(graph, [])
            place.bodies.append(scope.places(graph))
            ends.append([scope.shapes.get(v.name or "") for v in graph.outputs])
        fitting = [k for k, body in enumerate(place.bodies) if all(one.fits for one in body)]
        place.fits = bool(fitting)
        if fitting and self.of_a_run:
            place.left_out = len(place.bodies) - len(fitting)
            place.bodies, ends = [place.bodies[k] for k in fitting], [ends[k] for k in fitting]
        for value, made in zip(place.node.outputs, zip(*ends, strict=False), strict=False):
            known = [s for s in made if s is not None]
            if len(known) == len(made) and len({len(s) for s in known}) == 1:
                self._set(value, tuple(map(max, *known)) if len(known) > 1 else known[0])

    def _loop(self, place: Place) -> None:
        graph = attribute(place.node, "body")
        most, go = place.numbers[0], place.numbers[1] if len(place.numbers) > 1 else None
        place.trips = None if most is None or most.size != 1 else max(0, int(most.reshape(-1)[0]))
        if go is not None and go.size == 1 and not bool(go.reshape(-1)[0]):
            place.trips = 0
        carried = place.inputs[2:]
        ends = self._body(place, graph, [(), (), *carried], {k + 2: k + 1 for k in range(len(carried))})
        count = len(carried)
        for value, shape in zip(place.node.outputs[:count], ends[1:], strict=False):
            self._set(value, shape)
        for value, shape in zip(place.node.outputs[count:], ends[1 + count :], strict=False):
            self._set(value, None if shape is None or place.trips is None else (place.trips, *shape))

    def _scan(self, place: Place) -> None:
        graph, scanned = attribute(place.node, "body"), int(attribute(place.node, "num_scan_inputs", 0))
        count = len(place.inputs) - scanned
        axes = list(attribute(place.node, "scan_input_axes", [0] * scanned))
        rows: list[Shape | None] = []
        for shape, axis in zip(place.inputs[count:], axes, strict=True):
            if shape is None:
                rows.append(None)
                continue
            axis %= len(shape)
            place.trips = shape[axis]
            rows.append((*shape[:axis], *shape[axis + 1 :]))
        ends = self._body(place, graph, [*place.inputs[:count], *rows], {k: k for k in range(count)})
        for value, shape in zip(place.node.outputs[:count], ends, strict=False):
            self._set(value, shape)
        outs = list(attribute(place.node, "scan_output_axes", [0] * (len(place.node.outputs) - count)))
        for value, shape, axis in zip(place.node.outputs[count:], ends[count:], outs, strict=False):
            if shape is not None and place.trips is not None:
                axis %= len(shape) + 1
                self._set(value, (*shape[:axis], place.trips, *shape[axis:]))

    def _body(
        self, place: Place, graph: ir.Graph, inputs: list[Shape | None], carried: dict[int, int]
    ) -> list[Shape | None]:
        """Return shapes at the end of one run of a body; what does not keep its shape from run to run has none.

        ``carried``: which output each input takes its next value from.
        """
        while True:
            scope = self._inner(graph, inputs)
            nodes = scope.places(graph)
            ends = [scope.shapes.get(v.name or "") for v in graph.outputs]
            changed = {k for k, out in carried.items() if inputs[k] is not None and ends[out] != inputs[k]}
            if not changed:
                place.bodies, place.starts = [nodes], inputs
                return ends
            inputs = [None if k in changed else s for k, s in enumerate(inputs)]

    def _type(self, value: ir.Value | None) -> ir.DataType | None:
        return None if value is None else value.dtype or self.types.get(value.name or "")

    def _set(self, value: ir.Value, shape: Shape | None) -> None:
        if shape is not None and value.name:
            self.shapes.setdefault(value.name, shape)


def cannot_run(place: Place, types: dict[str, ir.DataType] | None) -> bool:
    """Return whether the shapes around a node contradict each other, so that no run at these sizes gets past it.

    Args:
        place: the node.
        types: of values by name; None where those of the inputs are not known, so that ONNX cannot be asked.
    """
    node, outs = place.node, place.outputs
    if node.domain or any(v is not None and s is None for v, s in zip(node.inputs, place.inputs, strict=True)):
        return False
    a = place.inputs[0] if place.inputs else None
    if node.op_type in _RECURRENT and a is not None:
        if len(a) != 3:
            return True
        axis, weight = 0 if attribute(node, "layout", 0) else 1, place.inputs[1]
        if weight is not None and len(weight) == 3 and weight[2] != a[2]:
            return True
        if any(s is not None and len(s) == 3 and s[axis] != a[axis] for s in place.inputs[5:7]):
            return True
    if any(s is None and v.name for v, s in zip(node.outputs, outs, strict=True)):
        return types is not None and contradicts(node, place.inputs, place.version, types, place.numbers)
    if node.op_type in _WINDOWS:
        return any(d < 1 for s in outs for d in s or ()) and all(d > 0 for s in place.inputs for d in s or ())
    if node.op_type == "Reshape" and a is not None:
        return math.prod(a) != math.prod(outs[0] or ())
    if node.op_type == "Gemm" and a is not None and (b := place.inputs[1]) is not None and len(a) == len(b) == 2:
        return a[0 if attribute(node, "transA", 0) else 1] != b[1 if attribute(node, "transB", 0) else 0]
    return False


def _more_numbers(place: Place) -> Array | None:
    """Small numbers that the analysis must not take for constants, since labels move along them; here they may be."""
    node, first = place.node, place.numbers[0] if place.numbers else None
    if first is None or node.domain:
        return None
    if node.op_type == "Transpose":
        return np.transpose(first, attribute(node, "perm"))
    if node.op_type == "ConstantOfShape" and int(np.prod(first)) <= _NUMBERS:
        fill = node.attributes.get("value")
        value = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
        return np.full(tuple(int(d) for d in first), value.reshape(-1)[0], value.dtype)
    return None
