"""The text form of a program, for people, diffs and golden tests: stable order and names, no ids.

``16:@s`` is an axis of 16 that moves with space @s, ``*`` by the dual, bare a fixed one. ``@w..@w#3`` stands for the
sibling spaces of a layer's blocks (the units of each head), ``@a+@b`` for an axis with units of several spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.bodies import bodies, body_graphs, body_path, names_twice, nodes_in_order, qualified
from cipm_ir.ir.labels import Factor, Labels, State
from cipm_ir.ir.nested import captured_values
from cipm_ir.ir.parameters import free_inputs, is_overridable, parameters
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import Leaf, OpaqueNode
from cipm_ir.symmetry.short_names import repeats, short_names
from cipm_ir.symmetry.space import Space

if TYPE_CHECKING:
    import networkx as nx


_SHORT = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.DOUBLE: "f64",
    ir.DataType.FLOAT16: "f16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32",
    ir.DataType.INT8: "i8",
    ir.DataType.UINT8: "u8",
    ir.DataType.BOOL: "bool",
}
_LITERAL = 8
_NAMES = 4


class ProgramView(Protocol):
    """What the text form shows: a `cipm_ir.symmetry.program.Program` has it all."""

    @property
    def model(self) -> ir.Model: ...
    @property
    def analysis(self) -> Analysis: ...
    @property
    def spaces(self) -> tuple[Space, ...]: ...
    @property
    def opaque(self) -> Sequence[OpaqueNode]: ...
    def index(self, space: Space) -> int: ...


class _Annotator:
    """Which spaces the axes of a value move with."""

    def __init__(self, program: ProgramView, short: Mapping[str, str] | None = None) -> None:
        analysis = program.analysis
        self.classes = analysis.classes
        self.names = [s.name if short is None else short[s.name] for s in program.spaces]
        self.dual = dual_atoms(program)
        self.parents = [
            (-1, -1) if s.parent is None else (program.index(s.parent[0]), s.parent[1]) for s in program.spaces
        ]
        self.of = np.full(analysis.classes.count, -1, np.int64)
        for k in reversed(range(len(analysis.spaces))):
            raw = analysis.spaces[k]
            if raw.kind != "blocks" and raw.table.shape[1] == 1:
                self.of[raw.table[:, 0]] = k
        for k, raw in enumerate(analysis.spaces):
            if raw.kind == "blocks" or raw.table.shape[1] > 1:
                free = self.of[raw.table[:, 0]] < 0
                self.of[raw.table[free, 0]] = k

    def axis(self, f: Factor, axis: int) -> str:
        """Return names of the spaces that one axis of a factor moves with; empty where it is fixed."""
        found = self.of[self.classes.of[f.along(axis)]]
        name = self._blocks(found) if len(f.axes) > 1 else ""
        name = name or self._names(found)
        return name + "*" if name and self.dual[f.labels.flat[0]] else name

    def leaf(self, leaf: Leaf) -> dict[int, str]:
        """Return names by axis of a parameter, for the axes that move."""
        names = {}
        for f in leaf.factors:
            name = self._names(self.of[self.classes.of[f.base : f.base + f.size]]) if f.active else ""
            if name:
                names[f.axes[-1]] = name + ("*" if self.dual[f.base] else "")
        return names

    def _blocks(self, rows: Labels) -> str:
        """Return the space of blocks whose element i holds what stands in row i, if that is how it is."""
        if (rows != rows[:, :1]).any():
            return ""
        parents = [self.parents[k] if k >= 0 else (-1, -1) for k in rows[:, 0].tolist()]
        owners = {space for space, _ in parents}
        if len(owners) != 1 or -1 in owners or len({row for _, row in parents}) < len(parents):
            return ""
        return "@" + self.names[owners.pop()]

    def _names(self, found: Labels) -> str:
        keys, first = np.unique(found.ravel(), return_index=True)
        order = [int(k) for k in keys[np.argsort(first)] if k >= 0]
        names = ["@" + self.names[k] for k in order]
        if len(order) > 1 and len({self.parents[k][0] for k in order}) == 1 and self.parents[order[0]][0] >= 0:
            names = [f"{names[0]}..{names[-1]}"]
        elif len(names) > _NAMES:
            names = [*names[: _NAMES - 1], f"... {len(names) - _NAMES + 1} more"]
        return "+".join(names + (["fixed"] if names and (found < 0).any() else []))

    def dims(self, sizes: list[str], state: State | None) -> str:
        """``[N, 32:@h, 3:@s*]``."""
        parts = []
        for axis, size in enumerate(sizes):
            f = None if state is None else state.factor_of(axis)
            name = "" if f is None else self.axis(f, axis)
            parts.append(f"{size}:{name}" if name else size)
        return "[" + ", ".join(parts) + "]"


def dual_atoms(program: ProgramView) -> np.ndarray:
    """Per atom, whether it is the consumer's side of a contraction: it moves by the dual."""
    walk = program.analysis.walk
    owner = np.full(len(program.analysis.classes.of), -1, np.int64)
    for f in walk.leaf_factors:
        owner[f.base : f.base + f.size] = f.leaf
    dual = np.zeros(len(owner), bool)
    for c in walk.rec.contractions:
        for labels in (c.a, c.b):
            leaf = int(owner[labels[0]]) if labels.size else -1
            if leaf >= 0 and any(node == c.node for node, _ in walk.leaves[leaf].uses):
                dual[labels] = True
    return dual


class _Sizes:
    """Sizes as the model writes them: a dynamic one by its symbol, not by the number that stood in for it."""

    def __init__(self, program: ProgramView) -> None:
        shapes = program.analysis.walk.shapes
        self.first, self.second, self.types = shapes.first, shapes.second, shapes.types
        self.symbols: dict[str, tuple[int, int]] = {}
        for value in program.model.graph.inputs:
            a, b = self.first.get(value.name or "", ()), self.second.get(value.name or "", ())
            for d, x, y in zip(value.shape or (), a, b, strict=False):
                if not isinstance(d, int) and d.value is not None:
                    self.symbols.setdefault(str(d.value), (x, y))

    def of(self, value: ir.Value) -> list[str]:
        """Return what the model declares, else what was inferred; an unknown rank is one question mark."""
        first = self.first.get(value.name or "")
        declared = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
        if declared is not None and (first is None or None not in declared):
            return ["?" if d is None else str(d) for d in declared]
        if first is None:
            return ["?"]
        return [self.dim(x, y) for x, y in zip(first, self.second.get(value.name or "", first), strict=True)]

    def dim(self, first: int, second: int) -> str:
        """Return a number, or a multiple, product or sum of symbols that fits both assignments."""
        if first == second:
            return str(first)
        symbols = list(self.symbols.items())
        products = [(name, a, b) for name, (a, b) in symbols]
        products += [
            (f"{one}*{other}", a * c, b * d) for k, (one, (a, b)) in enumerate(symbols) for other, (c, d) in symbols[k:]
        ]
        for name, a, b in products:
            if first % a == 0 and first // a * b == second:
                return name if first == a else f"{first // a}*{name}"
        for name, a, b in products:
            if first - a == second - b:
                return f"{name}{first - a:+d}"
        return "?"


def render(program: ProgramView, *, fold: bool = False) -> str:
    """Return the annotated graph: spaces, inputs, parameters in order of use, nodes, outputs.

    Long names are cut to their shortest end that is unique; the line of a space gives its whole name. Small constants
    stand where they are used.

    Args:
        program: what to show.
        fold: show a block of nodes that repeats itself once, with how often it does.
    """
    return "\n".join(_Text(program).lines(fold))


class _Text:
    """The text of one program under construction."""

    def __init__(self, program: ProgramView) -> None:
        self.program, self.graph = program, program.model.graph
        self.spaces = short_names(space.name for space in program.spaces)
        self.annotate, self.sizes = _Annotator(program, self.spaces), _Sizes(program)
        self.states = _states(program)
        self.opaque = list(program.opaque)
        self.leaves: dict[str, list[Leaf]] = {}
        for leaf in program.analysis.walk.leaves:
            self.leaves.setdefault(leaf.name, []).append(leaf)
        self.parameters = parameters(self.graph)
        order = dict.fromkeys(
            v.name or "" for node in nodes_in_order(self.graph) for v in (*node.inputs, *captured_values(node)) if v
        )
        at = {name: k for k, name in enumerate(order)}
        self.used = sorted(self.parameters, key=lambda name: at.get(name, len(at)))
        moving = {name for name, leaves in self.leaves.items() if any(self.annotate.leaf(leaf) for leaf in leaves)}
        outputs = {v.name for v in self.graph.outputs}
        self.literals = {
            name: text
            for name, value in self.parameters.items()
            if name not in moving and name not in outputs and (text := _literal(value)) and value.uses()
        }
        kept = [v.name or "" for v in (*free_inputs(self.graph), *self.graph.outputs)]
        names = [v.name or "" for v in _values(program.model) if v.name]
        self.names = {**short_names([*names, *kept]), **{name: name for name in kept}}

    def name(self, value: ir.Value) -> str:
        """Return a value as an argument: a literal, or its short name."""
        name = value.name or ""
        return self.literals.get(name) or f"%{self.names.get(name, name)}"

    def lines(self, fold: bool) -> list[str]:
        """Return all lines."""
        made = [f"graph {self.graph.name or 'main'}", *(_space(s, self.spaces) for s in self.program.spaces)]
        for value in free_inputs(self.graph):
            note = "  // has a default, which the caller may replace: pinned" if is_overridable(value) else ""
            made.append(
                f"input %{value.name} : {_dtype(value.dtype)}{self.annotate.dims(self.sizes.of(value), None)}{note}"
            )
        for name in self.used:
            if name not in self.literals:
                made.append(_parameter(self.parameters[name], self.leaves.get(name, []), self.annotate, self.names))
        made += self.nodes(self.graph, "", "", fold)
        made.append("output " + ", ".join(f"%{v.name}" for v in self.graph.outputs))
        return made

    def typed(self, value: ir.Value) -> str:
        """Return the element type of a value."""
        return _dtype(value.dtype or self.sizes.types.get(value.name or ""))

    def nodes(self, graph: ir.Graph, path: str, indent: str, fold: bool) -> list[str]:
        """Return the lines of the nodes of a graph; repeated blocks once, if asked."""
        nodes = list(graph)
        made = [self.node(node, path, indent) for node in nodes]
        folded: list[str] = []
        at = 0
        found = repeats([self.kind(node, lines) for node, lines in zip(nodes, made, strict=True)]) if fold else []
        for start, length, times in [*found, (len(nodes), 0, 0)]:
            for lines in made[at : start + length]:
                folded += lines
            if times:
                last = nodes[start + times * length - 1].outputs[0]
                folded.append(
                    f"{indent}// {times - 1} more of these {length} operators at these sizes, to {self.name(last)}"
                )
            at = start + times * length
        return folded

    def kind(self, node: ir.Node, lines: list[str]) -> str:
        """Return what two nodes of a repeated block share: all that is shown but the names of values and spaces."""
        if len(lines) > 1 or "  // opaque" in lines[0]:
            return f"only {lines[0]}"
        attributes = ",".join(f"{name}={_attribute(attr)}" for name, attr in sorted(node.attributes.items()))
        inputs = ",".join("_" if v is None else self.literals.get(v.name or "", self.sized(v)) for v in node.inputs)
        return f"{node.domain}:{node.op_type}({inputs}){attributes}:{','.join(map(self.sized, node.outputs))}"

    def sized(self, value: ir.Value) -> str:
        """Return the element type and the sizes of a value, and which of its axes move."""
        state, sizes = self.states.get(value.name or ""), self.sizes.of(value)
        found = [None if state is None else state.factor_of(axis) for axis in range(len(sizes))]
        moves = [f is not None and bool(self.annotate.axis(f, axis)) for axis, f in enumerate(found)]
        return f"{self.typed(value)}{sizes}{moves}"

    def node(self, node: ir.Node, path: str, indent: str) -> list[str]:
        """Return the line of a node, and those of its bodies."""
        types = [
            self.typed(v) + self.annotate.dims(self.sizes.of(v), self.states.get(v.name or "")) for v in node.outputs
        ]
        made = [indent + _node(node, types, self.name) + _opaque(node, path, self.opaque)]
        for key, body in bodies(node):
            place = body_path(path, node, key)
            args = ", ".join(
                f"{self.name(v)} : {self.typed(v)}{self.annotate.dims(self.sizes.of(v), None)}" for v in body.inputs
            )
            made.append(f"{indent}  body {place}({args})")
            made += self.nodes(body, place, indent + "    ", False)
            made.append(f"{indent}    output " + ", ".join(self.name(v) for v in body.outputs))
        return made


def _literal(value: ir.Value) -> str:
    """Return a small constant as it is written in the place of its name; empty for a larger one."""
    tensor = value.const_value
    if tensor is None:
        return ""
    if tensor.size == 1 and tensor.dtype.is_floating_point():
        return f"{float(tensor.numpy().reshape(())):g}"
    if tensor.size <= _LITERAL and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return str(tensor.numpy().tolist())
    return ""


def _states(program: ProgramView) -> dict[str, State]:
    """Return the state of every value; of a parameter, that of its first use."""
    states = dict(program.analysis.walk.states)
    for leaf in program.analysis.walk.leaves:
        states.setdefault(leaf.name, leaf.state)
    return states


def _space(space: Space, short: Mapping[str, str]) -> str:
    note = f"{space.kind}, {len(space.members)} tensor{'s' if len(space.members) != 1 else ''}"
    if space.parent is not None:
        note += f", in block {space.parent[1]} of @{short[space.parent[0].name]}"
    if short[space.name] != space.name:
        note += f"; named {space.name}"
    if not all(space.exact):
        note += "; epsilon of a normalization rounds: no bit-exact scaling before it is folded"
    return f"space @{short[space.name]} : {space.size}  {space.admits}  // {note}"


def _parameter(value: ir.Value, uses: list[Leaf], annotate: _Annotator, short: Mapping[str, str]) -> str:
    """Return labels of the first use; a tensor that several layers share without being tied is said to move apart."""
    tensor = value.const_value
    name = short.get(value.name or "", value.name)
    if tensor is None:
        return f"param %{name}"
    names = [annotate.leaf(leaf) for leaf in uses]
    shown = names[0] if names else {}
    dims = [f"{d}:{shown[axis]}" if axis in shown else str(d) for axis, d in enumerate(tensor.shape)]
    line = f"param %{name} : {_dtype(tensor.dtype)}[{', '.join(dims)}]"
    text = _literal(value)
    line += f" = {text}" if text else ""
    moving = sum(map(bool, names))
    return line if moving < 2 else f"{line}  // stored once, {moving} uses that move apart"


def _node(node: ir.Node, types: list[str], name: Callable[[ir.Value], str]) -> str:
    shown = [(v, t) for v, t in zip(node.outputs, types, strict=True) if v.name]
    left = ", ".join(name(v) for v, _ in shown)
    args = ", ".join("_" if v is None else name(v) for v in node.inputs)
    attributes = [f"{key}={_attribute(attr)}" for key, attr in sorted(node.attributes.items())]
    attrs = " {" + ", ".join(attributes) + "}" if attributes else ""
    prefix = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    return f"{left} = {prefix}{node.op_type}({args}){attrs} : {', '.join(t for _, t in shown)}"


def _opaque(node: ir.Node, path: str, waiting: list[OpaqueNode]) -> str:
    ends = [value for _, body in bodies(node) for value in body.outputs]
    names = {v.name for v in [*node.inputs, *captured_values(node), *ends] if v is not None}
    name = qualified(node, path)
    for k, note in enumerate(waiting):
        if note.op == node.op_type and note.name == name and (note.name or set(note.inputs) <= names):
            del waiting[k]
            pinned = ", ".join("%" + i for i in note.inputs)
            return f"  // opaque: {note.reason}" + (f"; pinned: {pinned}" if pinned else "")
    return ""


def _dtype(dtype: ir.DataType | None) -> str:
    return "?" if dtype is None else _SHORT.get(dtype, dtype.name.lower())


def _attribute(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        shape = [int(d) for d in tensor.shape]  # type: ignore[arg-type]
        if tensor.size > _LITERAL or tensor.dtype == ir.DataType.STRING:
            return f"tensor{shape}"
        entries = [f"{x:g}" if isinstance(x, float) else str(x) for x in tensor.numpy().ravel().tolist()]
        return "[" + ",".join(entries) + "]"
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    value = attr.value
    if isinstance(value, tuple | list):
        return "[" + ",".join(str(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_networkx(program: ProgramView) -> nx.Graph[str]:
    """Bipartite graph: ``@space`` nodes (size, kind, group) and parameter nodes; an edge lists the axes that move."""
    import networkx as nx

    graph: nx.Graph[str] = nx.Graph()
    for s in program.spaces:
        graph.add_node(f"@{s.name}", kind=s.kind, size=s.size, group=str(s.group))
    for s in program.spaces:
        if s.parent is not None:
            graph.add_edge(f"@{s.name}", f"@{s.parent[0].name}", block=s.parent[1])
        for member in s.members:
            tensor, _, axis = member.rpartition("[")
            graph.add_node(tensor, kind="parameter")
            axes = graph.edges[f"@{s.name}", tensor]["axes"] if graph.has_edge(f"@{s.name}", tensor) else ()
            graph.add_edge(f"@{s.name}", tensor, axes=(*axes, int(axis[:-1])))
    return graph


def annotate_model(program: ProgramView, model: ir.Model) -> None:
    """Write ``cipm_ir.axes`` into the metadata of values and ``cipm_ir.spaces`` into the model's, for graph viewers."""
    annotate, sizes, states = _Annotator(program), _Sizes(program), _states(program)
    analysed = {v.name or "": v for v in _values(program.model)}
    twice = names_twice(program.model.graph)
    for value in _values(model):
        if value.name in twice:
            continue
        state = states.get(value.name or "")
        if state is not None and any(annotate.axis(f, a) for f in state.factors for a in f.axes):
            value.metadata_props["cipm_ir.axes"] = annotate.dims(sizes.of(analysed.get(value.name or "", value)), state)
    for node in nodes_in_order(model.graph):
        for key, side in (("cipm_ir.axes", node.outputs), ("cipm_ir.parameters", node.inputs)):
            shown = [v for v in side if v is not None and "cipm_ir.axes" in v.metadata_props]
            if key == "cipm_ir.parameters":  # files have no place for these on the tensors themselves
                shown = [v for v in shown if v.is_initializer()]
            if shown:
                node.metadata_props[key] = "; ".join(f"{v.name}: {v.metadata_props['cipm_ir.axes']}" for v in shown)
    model.metadata_props["cipm_ir.spaces"] = "\n".join(str(s) for s in program.spaces)


def _values(model: ir.Model) -> list[ir.Value]:
    graphs = [model.graph, *(body for _, _, body in body_graphs(model.graph))]
    parameters = [value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())]
    return [*parameters, *(v for node in nodes_in_order(model.graph) for v in node.outputs)]
