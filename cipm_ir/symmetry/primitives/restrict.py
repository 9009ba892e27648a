"""The primitive `restrict`: drop classes, slice every tensor, rewrite every literal that depends on a size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.ir.parameters import is_parameter, parameters
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.primitives.arrival_order import arrival_order, interleaved
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.primitives.literals import Literals, Shape
from cipm_ir.symmetry.primitives.sizes import Sizes


def closed_keep(analysis: Analysis, keep: np.ndarray) -> np.ndarray:
    """Return classes that stay, when blocks go with their contents and empty blocks go too (per class, in place).

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
