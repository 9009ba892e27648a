"""The primitive `restrict`: drop classes, slice every tensor, rewrite every literal that depends on a size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError, UnsupportedPattern
from cipm_ir.ir.bodies import bodies, is_control_flow
from cipm_ir.ir.constants import evaluate
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.ir.nested import captured_values
from cipm_ir.ir.parameters import is_parameter, parameters
from cipm_ir.ops.context import Literal
from cipm_ir.ops.events import Uniform
from cipm_ir.ops.registry import lookup
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.primitives.arrival_order import arrival_order, interleaved
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.primitives.node_resize import NodeResize
from cipm_ir.symmetry.primitives.sizes import Sizes
from cipm_ir.symmetry.walk import node_graphs

Shape = tuple[int, ...]


def closed_keep(analysis: Analysis, keep: np.ndarray) -> np.ndarray:
    """Classes that stay, when blocks go with their contents and empty blocks go too (per class, in place).

    A part goes with the classes that it lies in, and these go with the last of the parts that they consist of.
    """
    links, of, parts = analysis.classes.links, analysis.classes.of, analysis.classes.parts
    if not len(links.parent):
        return keep
    parent, child = of[links.parent], of[links.child]
    crossed = np.unique(np.r_[parts.cell_class, parts.cell_part])
    while True:
        before = int(keep.sum())
        if len(crossed):
            alive = np.zeros(len(keep), bool)
            cells = keep[parts.cell_class] & keep[parts.cell_part]
            alive[parts.cell_class[cells]] = alive[parts.cell_part[cells]] = True
            keep[crossed] &= alive[crossed]
        keep[child[~keep[parent]]] = False
        alive = np.zeros(len(keep), bool)
        alive[parent[keep[child]]] = True
        blocks = np.zeros(len(keep), bool)
        blocks[parent] = True
        keep &= alive | ~blocks
        if int(keep.sum()) == before:
            return keep


def restrict_edits(analysis: Analysis, keep: Labels, order: dict[int, Labels] | None = None) -> dict[int, Edit]:
    """Slices of every parameter; ``keep`` is per atom, ``order`` as `arrival_order` gives it."""
    edits: dict[int, Edit] = {}
    for f in analysis.walk.leaf_factors:
        if not f.active:
            continue
        mask = keep[f.base : f.base + f.size]
        if mask.all():
            continue
        edit = edits.setdefault(f.leaf, Edit())
        if not f.groups:
            edit.take[f.axes[0]] = _places(f, mask, order)
            continue
        table = mask.reshape(f.shape)
        width = table.sum(axis=1)
        kept = width[width > 0]
        if (kept != kept[0]).any():
            raise SymmetryError(
                f"The groups of {analysis.walk.leaves[f.leaf].name} must keep equally many channels each."
            )
        columns = np.zeros((f.groups, int(kept[0])), np.int64)
        columns[width > 0] = (_places(f, mask, order) % f.shape[1]).reshape(-1, int(kept[0]))
        rows = analysis.walk.leaves[f.leaf].shape[0]
        edit.inner[f.axes[1]] = columns[np.arange(rows) * f.groups // rows]
    for k, edit in edits.items():  # rows of grouped axes follow the rows that stay
        if 0 in edit.take and edit.inner:
            edit.inner = {axis: rows[edit.take[0]] for axis, rows in edit.inner.items()}
        leaf = analysis.walk.leaves[k]
        if 0 in edit.shape(leaf.shape) and 0 not in leaf.shape:
            raise SymmetryError(f"Nothing would remain of {leaf.name}; keep at least one unit of each of its spaces.")
    return edits


def _places(f: LeafFactor, mask: np.ndarray, order: dict[int, Labels] | None) -> Labels:
    """Kept places of a factor, in the order in which the units arrive."""
    return np.flatnonzero(mask) if order is None or f.base not in order else order[f.base] - f.base


def restrict(model: ir.Model, analysis: Analysis, keep: np.ndarray) -> dict[int, Edit]:
    """Restrict ``model`` (a clone of the analysed one) in place to the classes in ``keep``; returns the edits made."""
    atoms = analysis.classes.stays(keep)[analysis.classes.refined()]
    _check_copies(analysis, atoms)
    sizes = Sizes(atoms, analysis.walk.states)
    order = None
    if interleaved(analysis, atoms):
        trial = model.clone()
        _write(trial, analysis, sizes, restrict_edits(analysis, atoms))
        order = arrival_order(trial, analysis, atoms)
    edits = restrict_edits(analysis, atoms, order)
    _write(model, analysis, sizes, edits)
    return edits


def _check_copies(analysis: Analysis, keep: np.ndarray) -> None:
    """Check that everything that copies are made of keeps equally many of them (``keep`` is per atom).

    Raises: `SymmetryError` naming the node that copies.
    """
    walk = analysis.walk
    for k in walk.rec.copies if analysis.classes.parts.spaces else ():
        event = walk.rec.unifications[k]
        times = np.bincount(event.b, weights=keep[event.a])[np.unique(event.b[keep[event.b]])]
        if times.size and (times != times[0]).any():
            node = walk.nodes[event.node]
            raise SymmetryError(
                f"{node.op_type} {node.name} copies each key head for equally many query heads; keep the same number "
                "of query heads for every key head."
            )


def _write(model: ir.Model, analysis: Analysis, sizes: Sizes, edits: dict[int, Edit]) -> None:
    new_shapes: dict[str, Shape] = {}
    for name, state in analysis.walk.states.items():
        if state.factors:
            shape = sizes.shape(state, name)
            if shape != state.shape:
                new_shapes[name] = shape
    editor = Editor(model, analysis)
    editor.apply(edits)
    for name, value in parameters(model.graph).items():
        if value.shape is not None and name in analysis.walk.shapes.first:
            now = tuple(value.shape.numpy())
            if now != analysis.walk.shapes.first[name]:
                new_shapes[name] = now
    Literals(editor, analysis, sizes, new_shapes, edits).run()
    for node in editor.nodes:
        for value in node.outputs:
            _reshape_value(value, analysis, new_shapes)
    for value in model.graph.inputs:
        if not is_parameter(value):  # those have been cut
            _reshape_value(value, analysis, new_shapes)
    editor.sweep()


def _reshape_value(value: ir.Value, analysis: Analysis, new_shapes: dict[str, Shape]) -> None:
    new = new_shapes.get(value.name or "")
    if new is None or value.shape is None or value.shape.rank() != len(new):
        return
    old = analysis.walk.states[value.name or ""].shape
    dims = zip(value.shape, old, new, strict=True)
    value.shape = ir.Shape([d if a == b else b if isinstance(d, int) else None for d, a, b in dims])


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
        """Whether an Expand that nothing else uses could be told the new length of an axis itself."""
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
        """New shape of an input."""
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
        """The number that a value was, in front of a node."""
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
