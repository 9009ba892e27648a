"""The text form of a program, for people, diffs and golden tests: stable order and names, no ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Labels, State

if TYPE_CHECKING:
    from cipm_ir.symmetry.program import Program, Space

_SHORT = {
    ir.DataType.FLOAT: "f32", ir.DataType.DOUBLE: "f64", ir.DataType.FLOAT16: "f16", ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT64: "i64", ir.DataType.INT32: "i32", ir.DataType.INT8: "i8", ir.DataType.UINT8: "u8",
    ir.DataType.BOOL: "bool",
}  # fmt: skip
_LITERAL = 8


class _Annotator:
    """Which spaces an axis moves with."""

    def __init__(self, program: Program) -> None:
        analysis = program.analysis
        self.analysis = analysis
        self.names = [s.name for s in program.spaces]
        self.of = np.full(analysis.classes.count, -1, np.int64)
        for k in reversed(range(len(analysis.spaces))):
            raw = analysis.spaces[k]
            if raw.kind != "blocks" and raw.table.shape[1] == 1:
                self.of[raw.table[:, 0]] = k
        for k, raw in enumerate(analysis.spaces):
            if raw.kind == "blocks" or raw.table.shape[1] > 1:
                free = self.of[raw.table[:, 0]] < 0
                self.of[raw.table[free, 0]] = k

    def labels(self, labels: Labels) -> str:
        """Names of the spaces of some atoms, in order of appearance; empty where all are fixed."""
        found = self.of[self.analysis.classes.of[labels.ravel()]]
        keys, first = np.unique(found, return_index=True)
        order = keys[np.argsort(first)]
        names = ["@" + self.names[k] for k in order if k >= 0]
        if len(names) > 4:
            names = [*names[:3], f"... {len(names) - 3} more"]
        return "+".join(names + (["fixed"] if names and (found < 0).any() else []))


def dual_atoms(program: Program) -> np.ndarray:
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


def _dims(shape: list[Any], state: State | None, annotate: _Annotator, dual: np.ndarray) -> str:
    parts = []
    for axis, size in enumerate(shape):
        f = state.factor_of(axis) if state is not None else None
        text = annotate.labels(f.labels) if f is not None else ""
        star = "*" if f is not None and text and dual[f.labels.flat[0]] else ""
        parts.append(f"{size}:{text}{star}" if text else str(size))
    return "[" + ", ".join(parts) + "]"


def _dtype(dtype: ir.DataType | None) -> str:
    return "?" if dtype is None else _SHORT.get(dtype, dtype.name.lower())


def _parent(space: Space) -> str:
    return "" if space.parent is None else f", in block {space.parent[1]} of @{space.parent[0].name}"


def render(program: Program) -> str:
    """The annotated graph: spaces, parameters, nodes, opaque nodes."""
    analysis = program.analysis
    annotate, dual = _Annotator(program), dual_atoms(program)
    graph = program.model.graph
    lines = [f"graph {graph.name or 'main'}"]
    width = max((len(s.name) for s in program.spaces), default=0)
    for s in program.spaces:
        note = f"{s.kind}, {len(s.members)} tensor{'s' if len(s.members) != 1 else ''}{_parent(s)}"
        if s.exact and not all(s.exact):
            note += "; epsilon of a normalization rounds: no bit-exact scaling before it is folded"
        lines.append(f"space @{s.name:<{width}} : {s.size}  {s.group}  // {note}")
    for value in graph.inputs:
        if value.name not in graph.initializers:
            lines.append(
                f"input %{value.name} : {_dtype(value.dtype)}{_dims(_shape(value, analysis), None, annotate, dual)}"
            )
    first: dict[str, State] = {}
    for leaf in analysis.walk.leaves:
        first.setdefault(leaf.name, leaf.state)
    for leaf in analysis.walk.leaves:
        if first.get(leaf.name) is leaf.state and leaf.state.rank and not leaf.name.startswith("?"):
            state = State(leaf.shape, tuple(f for f in leaf.state.factors))
            lines.append(f"param %{leaf.name} : {_dtype(leaf.dtype)}{_dims(list(leaf.shape), state, annotate, dual)}")
    opaque = {(o.op, o.name, o.inputs): o for o in analysis.walk.opaque}
    for node in graph:
        lines.append(_node(node, program, annotate, dual, opaque))
    lines.append("output " + ", ".join(f"%{v.name}" for v in graph.outputs))
    return "\n".join(lines)


def _shape(value: ir.Value, analysis: Any) -> list[Any]:
    if value.shape is not None:
        return [d if isinstance(d, int) else (d.value or "?") for d in value.shape]
    return list(analysis.walk.shapes.first.get(value.name or "", ["?"]))


def _node(node: ir.Node, program: Program, annotate: _Annotator, dual: np.ndarray, opaque: dict[Any, Any]) -> str:
    analysis = program.analysis
    outs = [v for v in node.outputs if v.name]
    left = ", ".join(f"%{v.name}" for v in outs)
    args = ", ".join("_" if v is None else f"%{v.name}" for v in node.inputs)
    shown = [f"{name}={_attribute(attr)}" for name, attr in sorted(node.attributes.items())]
    attrs = " {" + ", ".join(shown) + "}" if shown else ""
    types = []
    for v in outs:
        state = analysis.walk.states.get(v.name or "")
        types.append(_dtype(v.dtype) + _dims(_shape(v, analysis), state, annotate, dual))
    prefix = f"{node.domain}::" if node.domain else ""
    line = f"{left} = {prefix}{node.op_type}({args}){attrs} : {', '.join(types)}"
    for (op, name, inputs), note in opaque.items():
        if (
            op == node.op_type
            and name == (node.name or "")
            and (name or set(inputs) <= {v.name for v in node.inputs if v is not None})
        ):
            pinned = ", ".join("%" + i for i in note.inputs) or "nothing"
            return line + f"  // opaque: {note.reason}; pinned: {pinned}"
    return line


def _attribute(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return str(tensor.numpy().tolist()) if tensor.size <= _LITERAL else f"tensor{list(tensor.shape.numpy())}"
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    value = attr.value
    if isinstance(value, tuple | list):
        return "[" + ",".join(str(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_networkx(program: Program) -> nx.Graph[str]:
    """Bipartite graph: ``@space`` nodes (size, kind, group) and parameter nodes; an edge lists the axes that move."""
    graph: nx.Graph[str] = nx.Graph()
    for s in program.spaces:
        graph.add_node(f"@{s.name}", kind=s.kind, size=s.size, group=str(s.group))
        if s.parent is not None:
            graph.add_edge(f"@{s.name}", f"@{s.parent[0].name}", block=s.parent[1])
        for member in s.members:
            tensor, _, axis = member.rpartition("[")
            graph.add_node(tensor, kind="parameter")
            axes = graph.edges[f"@{s.name}", tensor]["axes"] if graph.has_edge(f"@{s.name}", tensor) else ()
            graph.add_edge(f"@{s.name}", tensor, axes=(*axes, int(axis[:-1])))
    return graph


def annotate_model(program: Program, model: ir.Model) -> None:
    """Write ``cipm_ir.axes`` into the metadata of values and ``cipm_ir.spaces`` into the model's, for graph viewers."""
    annotate, dual = _Annotator(program), dual_atoms(program)
    states = dict(program.analysis.walk.states)
    for leaf in program.analysis.walk.leaves:
        states.setdefault(leaf.name, leaf.state)
    values = (
        list(model.graph.inputs) + list(model.graph.initializers.values()) + [v for n in model.graph for v in n.outputs]
    )
    for value in values:
        state = states.get(value.name or "")
        if state is not None and any(annotate.labels(f.labels) for f in state.factors):
            value.metadata_props["cipm_ir.axes"] = _dims(list(state.shape), state, annotate, dual)
    for node in model.graph:
        axes = [v.metadata_props["cipm_ir.axes"] for v in node.outputs if "cipm_ir.axes" in v.metadata_props]
        if axes:
            node.metadata_props["cipm_ir.axes"] = "; ".join(axes)
    model.metadata_props["cipm_ir.spaces"] = "\n".join(str(s) for s in program.spaces)
