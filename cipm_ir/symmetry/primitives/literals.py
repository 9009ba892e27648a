"""What a resize rule sees and changes of one node while a model is restricted."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError, UnsupportedPattern
from cipm_ir.ir.bodies import bodies, is_control_flow
from cipm_ir.ir.constants import attribute, evaluate
from cipm_ir.ir.labels import Array, Labels, State
from cipm_ir.ir.nested import captured_values
from cipm_ir.ops.context import Literal
from cipm_ir.ops.events import Uniform
from cipm_ir.ops.registry import lookup
from cipm_ir.ops.resize import Resize
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.primitives.sizes import Sizes
from cipm_ir.symmetry.walk import node_graphs

Shape = tuple[int, ...]
_SCATTER_ELEMENTS = 11
"""The opset from which on this operator exists."""


class NodeResize(Resize):
    """One node: its shapes and kept positions before and after, its attributes and literals."""

    def __init__(self, parent: Literals, node: ir.Node, position: int) -> None:
        self.parent, self.node, self.position = parent, node, position
        walk = parent.analysis.walk
        self.names = parent.names[position]
        self.outs = [v.name or "" for v in walk.nodes[position].outputs]
        self.version = node.version or parent.editor.model.opset_imports.get(node.domain, 1)

    def attr(self, name: str, default: Any = None) -> Any:
        return attribute(self.node, name, default)

    def set_attr(self, name: str, value: Any) -> None:
        if value is None:
            self.node.attributes.pop(name, None)
        elif isinstance(value, float):
            self.node.attributes[name] = ir.AttrFloat32(name, value)
        elif isinstance(value, int | np.integer):
            self.node.attributes[name] = ir.AttrInt64(name, int(value))
        else:
            self.node.attributes[name] = ir.AttrInt64s(name, [int(v) for v in value])

    def literal(self, index: int) -> Array | None:
        name = self.names[index] if index < len(self.names) else ""
        pair = self.parent.analysis.walk.literals.get(name) if name else None
        return None if pair is None else pair[0]

    def set_literal(self, index: int, value: Array) -> None:
        parent = self.parent
        name = self.names[index] if index < len(self.names) else ""
        if name:
            now = parent.now.get(name) or parent.analysis.walk.literals[name]
            if np.array_equal(now[0], value):
                return
            if not np.array_equal(now[0], now[1]) or name in parent.analysis.walk.varying:
                current = self.node.inputs[index]
                if current is None:
                    raise SymmetryError(f"input {index} of {self.node.name} is gone")
                self.node.replace_input_with(index, self.patched(current, now, value))
                return
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        tensor = ir.tensor(np.asarray(value))
        self.node.replace_input_with(
            index, parent.editor.initializer(name or f"{self.node.name or self.outs[0]}_sizes", tensor)
        )

    def patched(self, current: ir.Value, now: Literal, value: Array) -> ir.Value:
        """Return the computed literal with some entries replaced: in its Concat, or by nodes that the opset has."""
        editor = self.parent.editor
        moving = (now[0] != value) & (now[0] != now[1])
        varies = self.parent.analysis.walk.varying.get(current.name or "")
        if varies is not None and (varies & (now[0] != value) & ~moving).any():
            raise SymmetryError(f"{self.node.op_type} {self.node.name}: a dynamic size does not follow what is kept.")
        if moving.any():
            current, now = self._proportioned(current, now, value, moving)
        wrong = np.flatnonzero(now[0] != value)
        if not wrong.size:
            return current
        producer = current.producer()
        if producer is not None and producer.op_type == "Concat":
            sizes = [self.parent.literal(v.name or "", 0) if v is not None else None for v in producer.inputs]
            if all(s is not None for s in sizes):
                ends = np.cumsum([s.size for s in sizes if s is not None])
                piece = np.searchsorted(ends, wrong, side="right")
                inputs = list(producer.inputs)
                for k in np.unique(piece).tolist():
                    lo = int(ends[k]) - int(sizes[k].size)
                    inputs[k] = editor.initializer(
                        inputs[k].name or "size", ir.tensor(np.asarray(value[lo : int(ends[k])], now[0].dtype))
                    )
                return self._insert("Concat", inputs, list(producer.attributes.values()), current)
        opset = editor.model.opset_imports.get("", 1)
        if opset < _SCATTER_ELEMENTS:
            wanted = np.asarray(value, now[0].dtype)
            stays, other = np.ones_like(wanted), np.zeros_like(wanted)
            stays[wrong], other[wrong] = 0, wanted[wrong]
            for op_type, array in (("Mul", stays), ("Add", other)):
                current = self._insert(op_type, [current, editor.initializer("size", ir.tensor(array))], [], current)
            return current
        index = editor.initializer("index", ir.tensor(wrong.astype(np.int64)))
        update = editor.initializer("size", ir.tensor(np.asarray(value[wrong], now[0].dtype)))
        return self._insert("ScatterElements", [current, index, update], [], current)

    def _proportioned(
        self, current: ir.Value, now: Literal, value: Array, moving: np.ndarray
    ) -> tuple[ir.Value, Literal]:
        """Dynamic entries (heads times batch) follow in proportion: times what is kept, divided by what was."""
        common = np.gcd(now[0], value)
        up, down = np.where(moving, value // common, 1), np.where(moving, now[0] // common, 1)
        if (now[1] * up % down).any():
            raise SymmetryError(f"{self.node.op_type} {self.node.name}: a dynamic size does not follow what is kept.")
        for op_type, factor in (("Mul", up), ("Div", down)):
            if (factor != 1).any():
                constant = self.parent.editor.initializer("factor", ir.tensor(factor.astype(now[0].dtype)))
                current = self._insert(op_type, [current, constant], [], current)
        return current, (now[0] * up // down, now[1] * up // down)

    def _insert(self, op_type: str, inputs: list[ir.Value | None], attributes: list[Any], like: ir.Value) -> ir.Value:
        out = ir.Value(name=self.parent.editor.fresh_name(like.name or "size"), shape=like.shape, type=like.type)
        node = ir.Node("", op_type, inputs, attributes, outputs=[out], name=f"{out.name}_node")
        self.node.prepend(node)
        return out

    # ------------------------------------------------------------ shapes
    def _state(self, index: int) -> State:
        state = self.parent.analysis.walk.input_state(self.position, index)
        if state is None:
            raise KeyError(self.names[index])
        return state

    def old(self, index: int) -> Shape:
        return self._state(index).shape

    def new(self, index: int) -> Shape:
        shape = self.parent.shape_of(self.position, index)
        return self.old(index) if shape is None else shape

    def old_out(self, index: int) -> Shape:
        return self.parent.analysis.walk.states[self.outs[index]].shape

    def new_out(self, index: int) -> Shape:
        return self.parent.shapes.get(self.outs[index]) or self.old_out(index)

    def kept(self, index: int, axis: int) -> Labels:
        return self.parent.sizes.positions(self._state(index), axis, self.names[index])

    def kept_out(self, index: int, axis: int) -> Labels:
        return self.parent.sizes.positions(self.parent.analysis.walk.states[self.outs[index]], axis, self.outs[index])

    def rows(self, index: int, axis: int, count: int) -> int:
        f = self._state(index).factor_of(axis)
        if f is None:
            return count
        width = self.parent.sizes.keep[f.labels].reshape(count, -1).sum(axis=1)
        kept = width[width > 0]
        if (kept != kept[0]).any():
            raise SymmetryError(f"The {count} groups of {self.names[index]} must keep equally many units each.")
        return len(kept)

    def replace(
        self, op_type: str, inputs: list[ir.Value | None], constants: dict[int, Array], attributes: dict[str, Any]
    ) -> None:
        current = self.node.inputs[0]
        new = list(inputs)
        new[0] = current
        for k, array in constants.items():
            new[k] = self.parent.editor.initializer(f"{self.outs[0]}_index", ir.tensor(array))
        made = [ir.AttrInt64(k, v) for k, v in attributes.items()]
        old = self.node.outputs[0]
        out = ir.Value(name=old.name, shape=old.shape, type=old.type)
        self.node.prepend(ir.Node("", op_type, new, made, outputs=[out], name=self.node.name))
        old.name = self.parent.editor.fresh_name(old.name or "old")
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        graph = self.node.graph
        if graph is not None:
            graph.remove(self.node, safe=True)


class Literals:
    """Second walk: sizes as numbers, and each operator's own resize rule where a shape changed."""

    def __init__(
        self, editor: Editor, analysis: Analysis, sizes: Sizes, shapes: dict[str, Shape], edits: dict[int, Edit]
    ) -> None:
        self.editor, self.analysis, self.sizes, self.shapes, self.edits = editor, analysis, sizes, shapes, edits
        self.now: dict[str, Literal] = {}
        self.names = [[v.name or "" if v is not None else "" for v in n.inputs] for n in analysis.walk.nodes]
        self.uniforms: dict[int, list[Uniform]] = {}
        for one in analysis.walk.rec.uniforms:
            self.uniforms.setdefault(one.node, []).append(one)

    def run(self) -> None:
        """Visit the nodes in order."""
        walk = self.analysis.walk
        for position, node in enumerate(self.editor.nodes):
            self._evaluate(node, position)
            for one in self.uniforms.get(position, ()):
                self._shorten(node, one)
            changed = [n for n in [*self.names[position], *(v.name or "" for v in node.outputs)] if n in self.shapes]
            touched = changed or any(k in self.edits for k in self._leaves(position))
            entry = lookup(node.domain, node.op_type)
            handled: set[int] = set()
            if entry is not None and entry.resize is not None and touched:
                resize = NodeResize(self, node, position)
                try:
                    entry.resize(resize)
                except UnsupportedPattern as reason:
                    raise SymmetryError(
                        f"{node.op_type} {node.name}: {reason}; keep more of the units that reach it."
                    ) from reason
                handled = set(entry.literals)
            self._freeze(node, position, handled, walk.literals)
        self._freeze_outputs(self.editor.graph)

    def _shorten(self, node: ir.Node, one: Uniform) -> None:
        """Cut an input that is uniform along an axis to the length of what it meets there."""
        sizes, value = self.sizes.factor(one.factor), node.inputs[one.index]
        length = 0 if sizes is None else sizes[one.factor.axes.index(one.place)]
        old = one.factor.labels.shape[one.factor.axes.index(one.place)]
        if not length or length == old or value is None or self._expands(value, one.axis, old, length):
            return
        index = self.editor.initializer("index", ir.tensor(np.arange(length)))
        out = ir.Value(name=self.editor.fresh_name(value.name or "short"), type=value.type)
        cut = ir.Node("", "Gather", [value, index], [ir.AttrInt64("axis", one.axis)], outputs=[out], name=out.name)
        node.prepend(cut)
        node.replace_input_with(one.index, out)

    def _expands(self, value: ir.Value, axis: int, old: int, length: int) -> bool:
        """Return whether an Expand that nothing else uses could be told the new length of an axis itself."""
        maker, name = value.producer(), value.name or ""
        if maker is None or maker.op_type != "Expand" or len(value.uses()) > 1 or value.is_graph_output():
            return False
        resize = NodeResize(self, maker, self.editor.nodes.index(maker))
        target, shape = resize.literal(1), resize.old_out(0)
        place = axis - len(shape) + (0 if target is None else target.size)
        if name in self.shapes or target is None or place < 0 or target[place] != old or resize.names[1] in self.now:
            return False  # a target that has become another by itself is held at what it was
        made = target.copy()
        made[place] = length
        resize.set_literal(1, made)
        self.shapes[name] = tuple(length if a == axis else n for a, n in enumerate(shape))
        return True

    def _leaves(self, position: int) -> list[int]:
        use = self.analysis.walk.use_leaf
        return [use[position, k] for k in range(len(self.names[position])) if (position, k) in use]

    def shape_of(self, position: int, index: int) -> Shape | None:
        """Return new shape of an input."""
        leaf = self.analysis.walk.use_leaf.get((position, index))
        if leaf is not None:
            shape = self.analysis.walk.leaves[leaf].shape
            return self.edits[leaf].shape(shape) if leaf in self.edits else shape
        name = self.names[position][index]
        return self.shapes.get(name) or self.analysis.walk.shapes.first.get(name)

    def _evaluate(self, node: ir.Node, position: int) -> None:
        """Recompute a chain of sizes that now comes out different."""
        out = node.outputs[0].name or "" if node.outputs else ""
        old = self.analysis.walk.literals.get(out)
        names = self.names[position]
        state = self.analysis.walk.states.get(out)
        if state is not None and state.factors:
            return  # a small parameter's part, which moves: no size
        if old is None or not names or not (node.op_type in ("Shape", "Size") or any(n in self.now for n in names)):
            return
        if node.op_type in ("Shape", "Size") and names[0] not in self.shapes and self._unchanged(position):
            return
        results = []
        for which in (0, 1):
            args = [self.literal(n, which) for n in names]
            shape = self.shape_of(position, 0)
            second = self.analysis.walk.shapes.second.get(names[0])
            before = self.analysis.walk.shapes.first.get(names[0])
            if which and shape is not None and second is not None and before is not None:
                shape = tuple(s if b == n else n for n, b, s in zip(shape, before, second, strict=True))
            results.append(evaluate(node, args, shape, 0))
        if results[0] is not None and results[1] is not None and not np.array_equal(results[0], old[0]):
            self.now[out] = (results[0], results[1])

    def _unchanged(self, position: int) -> bool:
        return not any(k in self.edits for k in self._leaves(position))

    def literal(self, name: str, which: int) -> Array | None:
        pair = self.now.get(name) or self.analysis.walk.literals.get(name)
        return None if pair is None else pair[which]

    def _freeze(self, node: ir.Node, position: int, handled: set[int], literals: dict[str, Literal]) -> None:
        """A number that came from a size and is used as a number (1 / sqrt(d)) must stay what it was."""
        out = node.outputs[0].name or "" if node.outputs else ""
        if out in literals and node.op_type != "ConstantOfShape":
            return  # still part of the chain
        for k, name in enumerate(self.names[position]):
            value = node.inputs[k]
            if value is not None and name in self.now and k not in handled:
                node.replace_input_with(k, self._as_before(name, value, node, position))
        for _, body in bodies(node):
            self._freeze_outputs(body)
        captured = [] if is_control_flow(node) else captured_values(node)
        for value in dict.fromkeys(v for v in captured if v.name in self.now):
            held = self._as_before(value.name or "", value, node, position)
            for graph in node_graphs(node):
                for use in tuple(value.uses()):
                    if use.node.graph is graph:
                        use.node.replace_input_with(use.idx, held)
                graph.outputs[:] = [held if v is value else v for v in graph.outputs]

    def _freeze_outputs(self, graph: ir.Graph) -> None:
        """A size that the model or a body gives out is a number too."""
        outputs = graph.outputs
        for place, value in enumerate(outputs):
            name = value.name or ""
            if name in self.now:
                made = ir.Node("", "Identity", [value], num_outputs=1)
                graph.append(made)
                made.replace_input_with(0, self._as_before(name, value, made, len(self.editor.nodes) - 1))
                held = made.outputs[0]
                value.name = self.editor.fresh_name(name)
                held.name, held.type, held.shape = name, value.type, value.shape
                outputs[place] = held

    def _as_before(self, name: str, value: ir.Value, node: ir.Node, position: int) -> ir.Value:
        """Return the number that a value was, in front of a node."""
        old, now = self.analysis.walk.literals[name], self.now[name]
        if name in self.analysis.walk.varying and np.array_equal(old[0], old[1]):
            raise SymmetryError(
                f"{node.op_type} {node.name}: input {name!r} mixes a size that changes with a dynamic one."
            )
        if np.array_equal(old[0], old[1]):
            return self.editor.initializer(name, ir.tensor(old[0]))
        changed = now[0] != old[0]
        moving = changed & (now[0] != now[1])
        if moving.any() and now[0].dtype.kind == "i":
            follows = np.where(moving, (now[0] != 0) & (now[1] * old[0] == old[1] * now[0]), old[0] == old[1])
        else:
            follows = ~moving & (old[0] == old[1])
        if now[0].ndim > 1 or not (follows | ~changed).all():
            raise SymmetryError(
                f"{node.op_type} {node.name}: input {name!r} mixes a size that changes with a dynamic one."
            )
        return NodeResize(self, node, position).patched(value, now, old[0])
