"""Writing edits into a graph: shared tensors are forked per use, equal edits stay one tensor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import graphs_within, nodes_within
from cipm_ir.ir.parameters import is_parameter, parameter_tensor
from cipm_ir.ops.registry import entry_of
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import Leaf
from cipm_ir.symmetry.primitives.edits import Edit, EditedTensor


class Editor:
    """Edits the parameters of a clone of the analysed graph."""

    def __init__(self, model: ir.Model, analysis: Analysis) -> None:
        self.model = model
        self.graph = model.graph
        self.analysis = analysis
        self.nodes = nodes_in_order(model.graph)
        self.position = {id(node): k for k, node in enumerate(self.nodes)}
        self.taken = {v.name for n in nodes_within(model.graph) for v in n.outputs}
        for graph in graphs_within(self.graph):
            self.taken |= {v.name for v in graph.inputs} | set(graph.initializers)
        self.inputs = {v.name for v in self.graph.inputs}

    def apply(self, edits: dict[int, Edit]) -> None:
        """Apply one edit per leaf; leaves of one tensor with different edits get tensors of their own."""
        by_name: dict[str, list[int]] = {}
        for k, leaf in enumerate(self.analysis.walk.leaves):
            by_name.setdefault(leaf.name, []).append(k)
        for name, leaves in by_name.items():
            if all(edits.get(k) is None or edits[k].empty for k in leaves):
                continue
            groups: dict[bytes, list[int]] = {}
            for k in leaves:
                edit = edits.get(k)
                groups.setdefault(b"" if edit is None or edit.empty else edit.key(), []).append(k)
            keep = b"" if b"" in groups else next(iter(groups))
            elsewhere = self._used_elsewhere(name, leaves)
            value = self._value(name, leaves)
            tensor = self._tensor(value, self.analysis.walk.leaves[leaves[0]])
            for key, members in groups.items():
                if key != b"":
                    self._rewrite(value, tensor, members, edits[members[0]], in_place=key == keep and not elsewhere)

    def _used_elsewhere(self, name: str, leaves: list[int]) -> bool:
        value = self._value(name, leaves)
        inside = {use for k in leaves for use in self.analysis.walk.leaves[k].uses}
        # What reads sizes alone follows a tensor that is edited in place.
        reads = [u for u in value.uses() if not entry_of(u.node).sizes_only]
        uses = {(self.position.get(id(u.node), -1), u.idx) for u in reads}
        return value.is_graph_output() or not uses <= inside

    def _value(self, name: str, leaves: list[int]) -> ir.Value:
        node, index = self.analysis.walk.leaves[leaves[0]].uses[0]
        value = self.nodes[node].inputs[index]
        if value is None:
            raise ValueError(f"input {index} of node {node} ({name}) is gone")
        return value

    def _rewrite(
        self, value: ir.Value, tensor: ir.TensorProtocol | None, members: list[int], edit: Edit, *, in_place: bool
    ) -> None:
        leaf = self.analysis.walk.leaves[members[0]]
        name = leaf.name
        if tensor is None:  # ConstantOfShape
            if not edit.scale and not edit.inner_scale and not edit.mixes and edit.shape(leaf.shape) == leaf.shape:
                return
            tensor = ir.Tensor(np.broadcast_to(self._fill(value), leaf.shape), dtype=leaf.dtype)
            if not edit.scale and not edit.inner_scale and not edit.mixes:
                self._point(members, self._refilled(value, edit.shape(leaf.shape)))
                return
        if in_place and value.is_initializer():
            value.const_value = EditedTensor(tensor, edit, name)
            value.shape = ir.Shape(edit.shape(leaf.shape))
            return
        self._point(members, self.initializer(name, EditedTensor(tensor, edit, name)))

    def _tensor(self, value: ir.Value, leaf: Leaf) -> ir.TensorProtocol | None:
        if leaf.filled:
            return None
        return parameter_tensor(value)

    def _fill(self, value: ir.Value) -> Array:
        producer = value.producer()
        attr = producer.attributes.get("value") if producer is not None else None
        return np.zeros((), np.float32) if attr is None else attr.as_tensor().numpy().reshape(())

    def _refilled(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        producer = value.producer()
        if producer is None:
            raise ValueError(f"{value.name} has no producer")
        target = self.initializer(f"{value.name}_shape", ir.tensor(np.asarray(shape, np.int64)))
        out = ir.Value(name=self.fresh_name(value.name or "filled"), shape=ir.Shape(shape), type=value.type)
        node = ir.Node("", "ConstantOfShape", [target], list(producer.attributes.values()), outputs=[out])
        producer.append(node)
        return out

    def _point(self, members: list[int], new: ir.Value) -> None:
        for k in members:
            for node, index in self.analysis.walk.leaves[k].uses:
                self.nodes[node].replace_input_with(index, new)

    # ------------------------------------------------------------ new values
    def fresh_name(self, base: str) -> str:
        """Return a value name that is not taken."""
        k = 1
        while f"{base}.{k}" in self.taken:
            k += 1
        self.taken.add(f"{base}.{k}")
        return f"{base}.{k}"

    def initializer(self, base: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a tensor under a fresh name (also as a graph input where the file format wants that)."""
        name = self.fresh_name(base)
        tensor.name = name
        value = ir.Value(
            name=name,
            shape=ir.Shape(tuple(tensor.shape.numpy())),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        if self.model.ir_version < 4:
            self.graph.inputs.append(value)
        return value

    def sweep(self) -> None:
        """Drop initializers and constant nodes that nothing reads any more and that were read before."""
        used = {leaf.name for leaf in self.analysis.walk.leaves} | set(self.analysis.walk.literals)
        for node in reversed(nodes_in_order(self.graph)):
            unused = all(not v.uses() and not v.is_graph_output() for v in node.outputs)
            if unused and node.outputs[0].name in used and node.graph is not None:
                node.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if name in used and is_parameter(value) and not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
                if value in self.graph.inputs:
                    self.graph.inputs.remove(value)
