"""One walk over the graph: parameters get fresh atoms, rules carry them along and emit events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.bodies import bodies, body_path, is_control_flow, nodes_in_order, qualified
from cipm_ir.ir.constants import constant_tensor, evaluate
from cipm_ir.ir.fused_shapes import node_shapes
from cipm_ir.ir.labels import Array, Factor, State
from cipm_ir.ir.parameters import overridable_inputs, parameters
from cipm_ir.ir.places import Place, place_body
from cipm_ir.ir.shapes import Shape, Shapes, implied_shape, subgraphs
from cipm_ir.ir.stand_ins import infer_shapes
from cipm_ir.ir.varying import note_varying
from cipm_ir.rules import load_rules
from cipm_ir.rules.context import Literal, OpContext
from cipm_ir.rules.events import Recorder
from cipm_ir.rules.registry import Opaque, lookup
from cipm_ir.symmetry.leaves import Leaf, LeafFactor, OpaqueNode, Use

LITERAL_SIZE = 4096
FLOAT_LITERAL_SIZE = 64
FLOATS = frozenset(d for d in ir.DataType if d.is_floating_point())
_QUANTIZED = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}
_LABELLED_INTS = {*_QUANTIZED, ir.DataType.INT32}


@dataclass
class Walk:
    """All that the walk collected."""

    rec: Recorder
    shapes: Shapes
    states: dict[str, State]
    leaves: list[Leaf]
    leaf_factors: list[LeafFactor]
    use_leaf: dict[Use, int]
    literals: dict[str, Literal]
    varying: dict[str, Array]
    opaque: list[OpaqueNode]
    nodes: list[ir.Node]
    paths: list[str]
    """The body that each node stands in (``If_12.then/Loop_3``), "" for the main graph."""

    def constant(self, name: str) -> Array | None:
        """A number that a value is known to be at all sizes of the inputs."""
        pair = self.literals.get(name)
        return None if pair is None or pair[0] is not pair[1] or name in self.varying else pair[0]


def walk(model: ir.Model) -> Walk:
    """Walk a model without model-local functions in its (topological) order, bodies of If, Loop and Scan included."""
    load_rules()
    return _Walker(model).run()


class _Walker:
    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.opsets = model.opset_imports
        self.rec = Recorder()
        self.shapes = infer_shapes(model)
        self.states: dict[str, State] = {}
        self.leaves: list[Leaf] = []
        self.leaf_factors: list[LeafFactor] = []
        self.use_leaf: dict[Use, int] = {}
        self.literals: dict[str, Literal] = {}
        self.varying: dict[str, Array] = {}
        self.opaque: list[OpaqueNode] = []
        self.nodes = nodes_in_order(model.graph)
        self.walked = {model.graph, *(graph for node in self.nodes for _, graph in bodies(node))}
        self.paths: list[str] = []
        self.path = ""
        self.trusted = not overridable_inputs(model)
        self.tied: dict[str, int] = {}
        self.params: dict[str, tuple[ir.TensorProtocol | None, bool]] = {}
        self.grouped_cache: dict[tuple[int, int, int], Factor] = {}
        self.here = -1
        self.nested = next(iter(model.graph.subgraphs()), None) is not None

    def run(self) -> Walk:
        graph, shapes = self.graph, self.shapes
        for name, value in parameters(graph).items():
            self.params[name] = (value.const_value, False)
        for value in graph.inputs:
            name = value.name or ""
            if name not in self.params and name in shapes.first:
                self.states[name] = State(shapes.first[name])
        self._nodes_of(graph, "")
        self.rec.node = -1
        self._pin_values(graph.outputs, "graph output")
        return Walk(
            self.rec,
            shapes,
            self.states,
            self.leaves,
            self.leaf_factors,
            self.use_leaf,
            self.literals,
            self.varying,
            self.opaque,
            self.nodes,
            self.paths,
        )

    def _nodes_of(self, graph: ir.Graph, path: str) -> None:
        for node in graph:
            starts = self._starts(node)
            for key, body in bodies(node):
                self._enter(body, starts)
                self._nodes_of(body, body_path(path, node, key))
            self.here = self.rec.node = len(self.paths)
            self.path = path
            self.paths.append(path)
            if is_control_flow(node):
                self._border(node, starts)
            else:
                self._visit(node)

    def _pin_values(self, values: Iterable[ir.Value | None], reason: str) -> list[str]:
        """Pin what moves in some values that are no parameters; the names of those in which something did."""
        names = []
        for value in values:
            name = "" if value is None else value.name or ""
            state = None if name in self.params else self.states.get(name)
            for f in state.factors if state else ():
                self.rec.pin(f.labels, reason)
                self.rec.zero(f.labels, f.var)
            if state is not None and state.factors:
                names.append(name)
        return names

    # ------------------------------------------------------------ bodies
    def _starts(self, node: ir.Node) -> list[Place]:
        """A Loop or Scan at both choices of dynamic sizes: its body is not known before its first run's shapes are."""
        if not is_control_flow(node) or node.op_type == "If":
            return []
        found = []
        literals = {v.name or "": known for v in self._outer_values(node) if (known := self._literal(v)) is not None}
        for which, table in enumerate((self.shapes.first, self.shapes.second)[: 1 if self.shapes.static else 2]):
            own = {name: tuple(t.shape.numpy()) for name, (t, _) in self.params.items() if t is not None}
            numbers = {name: known[which] for name, known in {**literals, **self.literals}.items()}
            found.append(place_body(self.model, node, {**own, **table}, self.shapes.types, numbers))
        return found

    def _outer_values(self, node: ir.Node) -> list[ir.Value]:
        return [v for v in (*node.inputs, *captured_values(node)) if v is not None]

    def _enter(self, body: ir.Graph, starts: list[Place]) -> None:
        """Inputs of a body are fixed, and so is an initializer that is an output of it, or an input with a default."""
        for name, value in body.initializers.items():
            if value.const_value is not None and not value.is_graph_input():
                self._fixed(name, [tuple(value.const_value.shape.numpy())] * 2)
        for k, value in enumerate(body.inputs):
            shapes = [place.starts[k] if k < len(place.starts) else None for place in starts]
            self._fixed(value.name or "", shapes)

    def _fixed(self, name: str, shapes: Sequence[Shape | None]) -> None:
        """Note a value without labels, at both choices of dynamic sizes; nothing where a shape is not known."""
        first, second = (*shapes, *shapes)[:2] if shapes else (None, None)
        if first is None or second is None:
            return
        self.states[name] = State(first)
        self._shaped(name, first, second)

    def _border(self, node: ir.Node, starts: list[Place]) -> None:
        """Pin what crosses the border of the bodies of an If, Loop or Scan: its inputs, and what bodies hand on.

        What a body uses of the graph around it is no border: it is the same value there.
        """
        reason = f"{node.op_type}: it crosses the border of a body"
        for k, value in enumerate(node.inputs):
            if value is not None and value.name in self.params:
                for f in self._parameter(value, (self.here, k)).factors:
                    self.rec.pin(f.labels, reason)
                    self.rec.zero(f.labels, f.var)
        names = self._pin_values(node.inputs, reason)
        for _, body in bodies(node):
            names += self._pin_values(body.outputs, reason)
        if names:
            self.opaque.append(
                OpaqueNode(qualified(node, self.path), node.op_type, reason.partition(": ")[2], tuple(names))
            )
        for k, value in enumerate(node.outputs):
            name = value.name or ""
            if name and name not in self.shapes.first:
                self._fixed(name, self._result(node, k, starts))
            if name in self.shapes.first:
                self.states[name] = State(self.shapes.first[name])

    def _result(self, node: ir.Node, index: int, starts: list[Place]) -> list[Shape | None]:
        """Shapes of an output: what all branches give, or what does not depend on how often a body runs."""
        tables = (self.shapes.first, self.shapes.second)[: 1 if self.shapes.static else 2]
        if node.op_type == "If":
            ends = [body.outputs[index] for _, body in bodies(node)]
            found = [{self._known_shape(value, table) for value in ends} for table in tables]
            return [made.pop() if len(made) == 1 else None for made in found]
        if node.op_type == "Loop" and index >= len(node.inputs) - 2:
            return [None]
        return [place.outputs[index] for place in starts]

    # ------------------------------------------------------------ parameters
    def _literal(self, value: ir.Value | None) -> Literal | None:
        """Number that a value is known to be: a small parameter, or what a chain of sizes evaluates to."""
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

    def _parameter(self, value: ir.Value, use: Use) -> State:
        """State of a parameter at this use: its own leaf, unless the tie is meant."""
        name = value.name or ""
        index = self.tied.get(name)
        if index is None:
            tensor, filled = self.params[name]
            index = self._new_leaf(value, tensor, filled, use)
            if self._stays_tied(value, tensor, filled):
                self.tied[name] = index
        else:
            self.leaves[index].uses.append(use)
        self.use_leaf[use] = index
        return self.leaves[index].state

    def _stays_tied(self, value: ir.Value, tensor: ir.TensorProtocol | None, filled: bool) -> bool:
        """Whether several uses of one tensor are one parameter: a matrix with content, not a vector or a constant.

        A file may share equal tensors by chance; what a frontend marks as tied is meant.
        """
        if value.meta.get("tied"):
            return True
        if tensor is None or filled or (len(value.uses()) < 2 and not value.is_graph_output()):
            return False
        if sum(d > 1 for d in tensor.shape.numpy()) < 2:
            return False
        array = np.asarray(tensor.numpy())
        return not bool((array[:1] == array.flat[0]).all() and (array == array.flat[0]).all())

    def _new_leaf(self, value: ir.Value, tensor: ir.TensorProtocol | None, filled: bool, use: Use) -> int:
        name = value.name or ""
        shape = self.shapes.first.get(name) or (() if tensor is None else tuple(tensor.shape.numpy()))
        dtype = value.dtype or (tensor.dtype if tensor is not None else ir.DataType.FLOAT)
        constant = bool(value.meta.get("constant"))
        leaf = Leaf(name, shape, dtype, [use], State(shape), constant=constant, filled=filled)
        index = len(self.leaves)
        if dtype in FLOATS or dtype in _LABELLED_INTS:
            factors = []
            fixed = (
                "graph output" if value.is_graph_output() else "captured by a subgraph" if self._captured(value) else ""
            )
            for axis, size in enumerate(shape):
                if size < 2:
                    continue
                labels, var = self.rec.allocate(size), self.rec.variable()
                made = LeafFactor(index, (axis,), int(labels[0]), (size,), var)
                leaf.factors.append(made)
                self.leaf_factors.append(made)
                factors.append(Factor((axis,), labels, var))
                if fixed or dtype not in FLOATS:
                    self.rec.zero(labels, var)
                if fixed:
                    self.rec.pin(labels, fixed)
            leaf.state = State(shape, tuple(factors))
        self.leaves.append(leaf)
        return index

    def _captured(self, value: ir.Value) -> bool:
        return self.nested and any(use.node.graph not in self.walked for use in value.uses())

    # ------------------------------------------------------------ nodes
    def _visit(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and not node.domain:
            self._constant(node)
            return
        literals = [self._literal(v) for v in node.inputs]
        if self._evaluated(node, literals) or self._filled(node, literals):
            return
        inputs: list[State | None] = []
        for k, value in enumerate(node.inputs):
            if value is None:
                inputs.append(None)
            elif value.name in self.params:
                inputs.append(self._parameter(value, (self.here, k)))
            else:
                inputs.append(self.states.get(value.name or ""))
        if inputs and inputs[0] is None:
            inputs[0] = self._implied(node)
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = node.version or self.opsets.get(domain, 1)
        shapes = self._output_shapes(node, version)
        entry = lookup(domain, node.op_type)
        op = OpContext(node, version, inputs, shapes, literals, self.rec, self.shapes.second, self.varying, self)
        op.elementwise = entry is not None and entry.elementwise
        try:
            if entry is None:
                raise Opaque(node.metadata_props.get("reason") or "no rule for this operator")
            if any(v is not None and s is None for v, s in zip(node.inputs, inputs, strict=True)):
                raise Opaque("the shape of an input is not known")
            if entry.elementwise and len(inputs) > 1:
                op.split_rows()
            entry.labels(op)
        except (Opaque, ValueError, IndexError) as reason:
            said = str(reason) if isinstance(reason, Opaque) else f"its shapes do not fit the operator ({reason})"
            self._pin_all(op, said)
            op.outputs = [None if s is None else State(s) for s in shapes]
        for value, state in zip(node.outputs, op.outputs, strict=False):
            if state is not None and value.name:
                self.states[value.name] = state
                if value.name not in self.shapes.first:
                    self._learn(value.name, state, node)

    def _implied(self, node: ir.Node) -> State | None:
        """An unlabelled first operand of unknown shape (behind an opaque node), as far as the weight implies it."""
        first, weight = (*node.inputs, None, None)[:2]
        shape = None if weight is None else self._known_shape(weight, self.shapes.first)
        if first is None or shape is None or (made := implied_shape(node, shape, 0)) is None:
            return None
        if self.shapes.static:
            self.shapes = replace(self.shapes, second=dict(self.shapes.first))
        self.shapes.first[first.name or ""] = made
        self.shapes.second[first.name or ""] = implied_shape(node, shape, 1) or made
        self.states[first.name or ""] = State(made)
        return self.states[first.name or ""]

    def _output_shapes(self, node: ir.Node, version: int) -> list[Shape | None]:
        """Shapes of the outputs; node by node where the inference of the whole graph gave up."""
        shapes = [self.shapes.first.get(v.name or "") for v in node.outputs]
        if not any(s is None and v.name for s, v in zip(shapes, node.outputs, strict=True)):
            return shapes
        literals = [self._literal(v) for v in node.inputs]
        for which, table in enumerate((self.shapes.first, self.shapes.second)[: 1 if self.shapes.static else 2]):
            known = [None if v is None else self._known_shape(v, table) for v in node.inputs]
            numbers = [None if p is None else p[which] for p in literals]
            found = node_shapes(node, known, version, self.shapes.types, numbers)
            for value, shape in zip(node.outputs, found, strict=True):
                if shape is None and self.path and self.trusted and value.shape is not None and value.shape.is_static():
                    shape = tuple(value.shape.numpy())  # in a body: ONNX's inference of the main graph gives none
                if shape is not None and value.name:
                    table.setdefault(value.name, shape)
        return [self.shapes.first.get(v.name or "") for v in node.outputs]

    def _learn(self, name: str, state: State, node: ir.Node) -> None:
        """A rule knew the shape of an output that ONNX could not infer: that of its first input."""
        self.shapes.first[name] = state.shape
        source = node.inputs[0].name or "" if node.inputs and node.inputs[0] is not None else ""
        if not self.shapes.static and self.shapes.first.get(source) == state.shape and source in self.shapes.second:
            self.shapes.second[name] = self.shapes.second[source]

    def _shaped(self, name: str, first: Shape, second: Shape | None) -> None:
        """Note the shapes, at both choices of dynamic sizes, of a value that the walk knows as numbers."""
        self.shapes.first[name] = first
        if not self.shapes.static and second is not None:
            self.shapes.second[name] = second

    def _known_shape(self, value: ir.Value, table: dict[str, Shape]) -> Shape | None:
        name = value.name or ""
        tensor = self.params[name][0] if name in self.params else None
        return table.get(name) if tensor is None else tuple(tensor.shape.numpy())

    def _pin_all(self, op: OpContext, reason: str) -> None:
        node = op.node
        names = []
        for value, state in zip(node.inputs, op.inputs, strict=True):
            if state is not None and state.factors:
                names.append("" if value is None else value.name or "")
            op.pin(state, f"{node.op_type}: {reason}")
        for k in range(len(node.inputs)):  # labels that a rule gave groups of rows before it gave up
            where = self.use_leaf.get((self.here, k))
            for f in () if where is None else self.leaves[where].factors:
                if f.groups:
                    labels = np.arange(f.base, f.base + f.size)
                    self.rec.pin(labels, f"{node.op_type}: {reason}")
                    self.rec.zero(labels, f.var)
        for value in captured_values(node):
            name = value.name or ""
            if name in self.states and self.states[name].factors and name not in names:
                names.append(name)
            if value.name in self.params:
                continue  # such a parameter is pinned where it is created
            op.pin(self.states.get(value.name or ""), f"captured by a subgraph of {node.op_type}")
        self.opaque.append(OpaqueNode(qualified(node, self.path), node.op_type, reason, tuple(names)))

    def _constant(self, node: ir.Node) -> None:
        name = node.outputs[0].name or ""
        tensor = constant_tensor(node)
        if tensor is None:  # strings, sparse tensors
            self.states[name] = State(self.shapes.first.get(name, ()))
            return
        self.params[name] = (tensor, False)
        self.shapes.first.setdefault(name, tuple(tensor.shape.numpy()))

    def _evaluated(self, node: ir.Node, literals: list[Literal | None]) -> bool:
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
        if first.dtype.kind not in "iub" or any(self._quantized(v) for v in node.inputs):
            return False
        self.states[out] = State(first.shape)
        self._shaped(out, first.shape, None if second is None else second.shape)
        return True

    def _quantized(self, value: ir.Value | None) -> bool:
        """Whether this may be a weight in few bits, whose axes have units, rather than sizes and indices."""
        name = "" if value is None else value.name or ""
        tensor = self.params[name][0] if name in self.params else None
        state = self.states.get(name)
        return bool(tensor.dtype in _QUANTIZED) if tensor is not None else state is not None and bool(state.factors)

    def _filled(self, node: ir.Node, literals: list[Literal | None]) -> bool:
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
        self._shaped(name, shape, shape)
        fill = node.attributes.get("value")
        array = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
        if value.dtype is None:
            value.dtype = ir.DataType.from_numpy(array.dtype)
        if int(np.prod(self.shapes.first[name])) <= LITERAL_SIZE:
            full = np.full(self.shapes.first[name], array.reshape(-1)[0], array.dtype)
            self.literals[name] = (full, full)
        return True

    # ------------------------------------------------------------ seeds
    def grouped(self, node: ir.Node, index: int, axis: int, groups: int) -> Factor | None:
        """See `Seeds.grouped`."""
        where = self.use_leaf.get((self.here, index))
        if where is None:
            return None
        leaf = self.leaves[where]
        known = self.grouped_cache.get((where, axis, groups))
        if known is not None:
            return known
        if leaf.shape[axis] == 1:
            made = Factor((0, axis), self.rec.fresh(groups, 1), self.rec.variable())
        else:
            for f in leaf.factors:
                if f.axes == (axis,):
                    f.active = False
            labels, var = self.rec.allocate(groups, leaf.shape[axis]), self.rec.variable()
            factor = LeafFactor(where, (0, axis), int(labels[0, 0]), labels.shape, var, groups)
            leaf.factors.append(factor)
            self.leaf_factors.append(factor)
            made = Factor((0, axis), labels, var)
        self.grouped_cache[where, axis, groups] = made
        return made

    def variance(self, node: ir.Node, index: int, epsilon: float) -> bool:
        """See `Seeds.variance`."""
        where = self.use_leaf.get((self.here, index))
        if where is None:
            return False
        leaf = self.leaves[where]
        known = {f.epsilon for f in leaf.factors} - {None}
        if known and known != {epsilon}:
            return False
        for f in leaf.factors:
            f.epsilon = epsilon
        return True


def node_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node holds, and the graphs that their nodes hold."""
    for graph in subgraphs(node):
        yield graph
        yield from graph.subgraphs()


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Values of outer graphs that the subgraphs of a node use."""
    found: list[ir.Value] = []
    for attr in node.attributes.values():
        graphs = [attr.as_graph()] if attr.type == ir.AttributeType.GRAPH else []
        if attr.type == ir.AttributeType.GRAPHS:
            graphs = list(attr.as_graphs())
        for graph in graphs:
            inside = {v for n in graph for v in n.outputs} | set(graph.inputs) | set(graph.initializers.values())
            for inner in graph:
                found.extend(v for v in inner.inputs if v is not None and v not in inside)
                found.extend(v for v in captured_values(inner) if v not in inside)
            found.extend(v for v in graph.outputs if v not in inside)
    return found
