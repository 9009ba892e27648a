"""What a resize rule sees and changes of one node while a model is restricted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array, Labels, State
from cipm_ir.ops.context import Literal
from cipm_ir.ops.resize import Resize

if TYPE_CHECKING:
    from cipm_ir.symmetry.primitives.restrict import Literals, Shape


_SCATTER_ELEMENTS = 11
"""The opset from which on this operator exists."""


class NodeResize(Resize):
    """One node: its shapes and kept positions before and after, its attributes and literals."""

    def __init__(self, parent: Literals, node: ir.Node, position: int) -> None:
        self.parent, self.node, self.position = parent, node, position
        walk = parent.analysis.walk
        self.names = parent.names[position]
        self.outs = [v.name or "" for v in walk.nodes[position].outputs]
        self.version = node.version or parent.editor.model.opset_imports.get(
            "" if node.domain == "ai.onnx" else node.domain, 1
        )

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
        """The computed literal with some entries replaced: in its Concat, or by nodes that the opset has."""
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
        leaf = self.parent.analysis.walk.use_leaf.get((self.position, index))
        if leaf is not None:
            return self.parent.analysis.walk.leaves[leaf].state
        return self.parent.analysis.walk.states[self.names[index]]

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
