"""One walk over the graph: parameters get fresh atoms, rules carry them along and emit events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.bodies import bodies, body_path, is_control_flow, nodes_in_order, qualified
from cipm_ir.ir.labels import Array, Factor, State
from cipm_ir.ir.nested import captured_values, graphs_within, subgraphs
from cipm_ir.ir.parameters import parameters
from cipm_ir.ir.places import Place, place_body
from cipm_ir.ir.shapes import Shape, Shapes
from cipm_ir.ops import load_rules
from cipm_ir.ops.context import Literal, OpContext
from cipm_ir.ops.events import Recorder
from cipm_ir.ops.no_rule import reason_for
from cipm_ir.ops.registry import lookup
from cipm_ir.symmetry.known import FLOATS, QUANTIZED, Known
from cipm_ir.symmetry.leaves import Leaf, LeafFactor, OpaqueNode, Use

_LABELLED_INTS = {*QUANTIZED, ir.DataType.INT32}


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

    def input_state(self, position: int, index: int) -> State | None:
        """Return shape and labels of an input of a node, parameters included; None where it has none."""
        leaf = self.use_leaf.get((position, index))
        if leaf is not None:
            return self.leaves[leaf].state
        value = self.nodes[position].inputs[index]
        return None if value is None else self.states.get(value.name or "")

    def constant(self, name: str) -> Array | None:
        """Return a number that a value is known to be at all sizes of the inputs."""
        pair = self.literals.get(name)
        return None if pair is None or pair[0] is not pair[1] or name in self.varying else pair[0]


def walk(model: ir.Model) -> Walk:
    """Walk a model without model-local functions in its (topological) order, bodies of If, Loop and Scan included."""
    load_rules()
    return _Walker(model).run()


class _Walker(Known):
    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        self.graph = model.graph
        self.opsets = model.opset_imports
        self.rec = Recorder()
        self.leaves: list[Leaf] = []
        self.leaf_factors: list[LeafFactor] = []
        self.use_leaf: dict[Use, int] = {}
        self.opaque: list[OpaqueNode] = []
        self.nodes = nodes_in_order(model.graph)
        self.walked = {model.graph, *(graph for node in self.nodes for _, graph in bodies(node))}
        self.paths: list[str] = []
        self.tied: dict[str, int] = {}
        self.grouped_cache: dict[tuple[int, int, int], Factor] = {}
        self.here = -1
        self.nested = len(graphs_within(model.graph)) > 1

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
                self.rec.zero(f.labels, f.scale_var)
            if state is not None and state.factors:
                names.append(name)
        return names

    # ------------------------------------------------------------ bodies
    def _starts(self, node: ir.Node) -> list[Place]:
        """Return a Loop or Scan at both choices of dynamic sizes.

        Its body is not known before its first run's shapes are.
        """
        if not is_control_flow(node) or node.op_type == "If":
            return []
        found = []
        literals = {v.name or "": known for v in self._outer_values(node) if (known := self.literal(v)) is not None}
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
                self.fixed(name, [tuple(value.const_value.shape.numpy())] * 2)
        for k, value in enumerate(body.inputs):
            shapes = [place.starts[k] if k < len(place.starts) else None for place in starts]
            self.fixed(value.name or "", shapes)

    def _border(self, node: ir.Node, starts: list[Place]) -> None:
        """Pin what crosses the border of the bodies of an If, Loop or Scan: its inputs, and what bodies hand on.

        What a body uses of the graph around it is no border: it is the same value there.
        """
        reason = f"{node.op_type}: it crosses the border of a body"
        for k, value in enumerate(node.inputs):
            if value is not None and value.name in self.params:
                for f in self._parameter(value, (self.here, k)).factors:
                    self.rec.pin(f.labels, reason)
                    self.rec.zero(f.labels, f.scale_var)
        names = self._pin_values(node.inputs, reason)
        ends = [list(body.outputs) for _, body in bodies(node)]
        for k, value in enumerate(node.outputs):
            name = value.name or ""
            if name and name not in self.shapes.first:
                self.fixed(name, self._result(node, k, starts))
            if name not in self.shapes.first:
                continue
            self.states[name] = State(self.shapes.first[name])
            if node.op_type == "If" and (factors := self._selected(self.shapes.first[name], [end[k] for end in ends])):
                self.states[name] = State(self.shapes.first[name], factors)
        for end in ends:
            free = [node.op_type == "If" and bool(self._factors(value)) for value in node.outputs]
            names += self._pin_values([v for k, v in enumerate(end) if k >= len(free) or not free[k]], reason)
        if names:
            what = reason.partition(": ")[2]
            self.opaque.append(OpaqueNode(qualified(node, self.path), node.op_type, what, tuple(names), self.here))

    def _factors(self, value: ir.Value) -> tuple[Factor, ...]:
        state = self.states.get(value.name or "")
        return () if state is None or value.name in self.params else state.factors

    def _selected(self, shape: Shape, ends: Sequence[ir.Value]) -> tuple[Factor, ...]:
        """Return factors of an output of an If: what all branches label alike moves together; the rest is pinned."""
        states = [self.states.get(end.name or "") for end in ends if end.name not in self.params]
        if len(states) < len(ends) or any(state is None or state.shape != shape for state in states):
            return ()
        given = [self._factors(end) for end in ends]
        found = []
        for f in given[0]:
            twins = [g for others in given[1:] for g in others if _alike(f, g)]
            if len(twins) == len(given) - 1:
                found.append(f)
                for g in twins:
                    self.rec.unify(f.labels, g.labels)
                    self.rec.same(f.labels, f.scale_var, g.scale_var)
        for f in [f for factors in given for f in factors if found and not any(_alike(f, g) for g in found)]:
            self.rec.pin(f.labels, "If: not all branches have units on this axis")
            self.rec.zero(f.labels, f.scale_var)
        return tuple(found)

    def _result(self, node: ir.Node, index: int, starts: list[Place]) -> list[Shape | None]:
        """Return shapes of an output: what all branches give, or what does not depend on how often a body runs."""
        tables = (self.shapes.first, self.shapes.second)[: 1 if self.shapes.static else 2]
        if node.op_type == "If":
            ends = [body.outputs[index] for _, body in bodies(node)]
            found = [{self.known_shape(value, table) for value in ends} for table in tables]
            return [made.pop() if len(made) == 1 else None for made in found]
        if node.op_type == "Loop" and index >= len(node.inputs) - 2:
            return [None]
        return [place.outputs[index] for place in starts]

    # ------------------------------------------------------------ parameters
    def _parameter(self, value: ir.Value, use: Use) -> State:
        """Return the state of a parameter at this use: its own leaf, unless the tie is meant."""
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
        """Return whether several uses of one tensor are one parameter: a matrix with content, not a vector or a
        constant.

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
            self.constant(node)
            return
        literals = [self.literal(v) for v in node.inputs]
        if self.evaluated(node, literals) or self.filled(node, literals):
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
            inputs[0] = self.implied(node)
        version = node.version or self.opsets.get(node.domain, 1)
        shapes = self.output_shapes(node, version)
        entry = lookup(node.domain, node.op_type)
        op = OpContext(node, version, inputs, shapes, literals, self.rec, self.shapes.second, self.varying, self)
        op.elementwise = entry is not None and entry.elementwise
        try:
            if entry is None:
                raise UnsupportedPattern(node.metadata_props.get("reason") or reason_for(node.domain, node.op_type))
            if any(v is not None and s is None for v, s in zip(node.inputs, inputs, strict=True)):
                raise UnsupportedPattern("the shape of an input is not known")
            if entry.elementwise and len(inputs) > 1:
                op.split_rows()
            entry.labels(op)
        except (UnsupportedPattern, ValueError, LookupError) as reason:
            said = (
                str(reason)
                if isinstance(reason, UnsupportedPattern)
                else f"its shapes do not fit the operator ({reason})"
            )
            self._pin_all(op, said)
            op.outputs = [None if s is None else State(s) for s in shapes]
        for value, state in zip(node.outputs, op.outputs, strict=False):
            if state is not None and value.name:
                self.states[value.name] = state
                if value.name not in self.shapes.first:
                    self.learn(value.name, state, node)

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
                    self.rec.zero(labels, f.scale_var)
        for value in captured_values(node):
            name = value.name or ""
            if name in self.states and self.states[name].factors and name not in names:
                names.append(name)
            if value.name in self.params:
                continue  # such a parameter is pinned where it is created
            op.pin(self.states.get(value.name or ""), f"captured by a subgraph of {node.op_type}")
        if names or not self.path:  # in a body, of what costs units alone: shapes there are often unknown
            self.opaque.append(OpaqueNode(qualified(node, self.path), node.op_type, reason, tuple(names), self.here))

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


def _alike(f: Factor, g: Factor) -> bool:
    """Return whether two factors label the same axes, each position once."""
    return f.axes == g.axes and f.labels.shape == g.labels.shape and not f.repeats and not g.repeats


def node_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node holds, and the graphs that their nodes hold."""
    for graph in subgraphs(node):
        yield from graphs_within(graph)
