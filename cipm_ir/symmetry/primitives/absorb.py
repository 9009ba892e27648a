"""The primitive `absorb`: consumers take W M and b + W c, so that h may become M h_keep + c."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.ops.events import Contraction
from cipm_ir.ops.registry import entry_of
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.primitives.edits import Edit


@dataclass
class BiasShift:
    """Adds a vector to the output of one contraction node."""

    node: int
    delta: Array

    def write(self, editor: Editor) -> None:
        """Into the bias where there is one; otherwise as a bias input, or as an Add behind a MatMul."""
        node = editor.nodes[self.node]
        weight = node.inputs[1]
        dtype = (weight.dtype if weight is not None else None) or ir.DataType.FLOAT  # outputs need not be annotated
        if node.op_type == "MatMul":
            out = node.outputs[0]
            bias = editor.initializer(f"{out.name}_shift", ir.tensor(self.delta.astype(dtype.numpy())))
            shifted = ir.Value(name=out.name, shape=out.shape, type=out.type)
            out.name = editor.fresh_name(out.name or "unshifted")
            out.replace_all_uses_with(shifted, replace_graph_outputs=True)
            node.append(ir.Node("", "Add", [out, bias], outputs=[shifted]))
            return
        old = node.inputs[2] if len(node.inputs) > 2 else None
        if old is None:
            node.resize_inputs(3)
            node.replace_input_with(
                2, editor.initializer(f"{node.outputs[0].name}_bias", ir.tensor(self.delta.astype(dtype.numpy())))
            )
            return
        tensor = parameter_tensor(old)
        if tensor is None:
            raise SymmetryError(
                f"{node.op_type} {node.name}: its bias {old.name} is computed or may be overridden by the caller, "
                "so it cannot take a constant shift."
            )
        value = (np.asarray(tensor.numpy(), np.float64) + self.delta).astype(tensor.dtype.numpy())
        node.replace_input_with(2, editor.initializer(old.name or "bias", ir.tensor(value)))


def absorb_edits(
    analysis: Analysis, model: ir.Model, space: int, keep: Labels, mixing: Array, shift: Array | None
) -> tuple[dict[int, Edit], list[BiasShift]]:
    """Edits of the consumers at unchanged size (columns of dropped units become zero), and shifts of their biases."""
    raw = analysis.spaces[space]
    members = raw.table[:, 0]
    n = len(members)
    if raw.kind == "blocks" or raw.table.shape[1] > 1:
        raise SymmetryError("absorb works on spaces of units; drop blocks with restrict.")
    if mixing.shape != (n, len(keep)):
        raise SymmetryError(f"mixing has shape {mixing.shape}; it must be (units, kept units) = ({n}, {len(keep)}).")
    if not np.isfinite(mixing).all():
        raise SymmetryError("mixing has entries that are not finite.")
    full = np.zeros((n, n), mixing.dtype)
    full[:, keep] = mixing
    shifted = shift is not None and bool(np.any(shift))
    if shifted:
        _refuse_borders(analysis, members)
    nodes = nodes_in_order(model.graph) if shifted else analysis.walk.nodes
    edits: dict[int, Edit] = {}
    shifts: list[BiasShift] = []
    for c in consumers(analysis, members):
        factor = _weight_factor(analysis, c)
        leaf = analysis.walk.leaves[factor.leaf]
        if len({node for node, _ in leaf.uses}) > 1:
            raise SymmetryError(f"{leaf.name} is read in several places; untie it before absorbing.")
        positions = analysis.factor_positions(factor, members)
        edits.setdefault(factor.leaf, Edit()).mix.setdefault(factor.axes[0], []).append((positions, full))
        if shifted:
            shifts.append(_shift(analysis, nodes, c, factor, positions, np.asarray(shift, np.float64)))
    return edits, shifts


def merged_edits(parts: Iterable[dict[int, Edit]]) -> dict[int, Edit]:
    """Return the mixings of several spaces as one edit per leaf: they act on other axes or other places."""
    out: dict[int, Edit] = {}
    for leaf, edit in (pair for part in parts for pair in part.items()):
        mix = out.setdefault(leaf, Edit()).mix
        for axis, mixings in edit.mix.items():
            mix.setdefault(axis, []).extend(mixings)
    return out


def consumers(analysis: Analysis, members: Labels) -> list[Contraction]:
    """Contractions over these classes; an error where something else reads them in a way that is not linear in them."""
    walk, inside = analysis.walk, np.zeros(analysis.classes.count, bool)
    inside[members] = True
    if analysis.consumers.normalized[members].any():
        raise SymmetryError(
            "A normalization, softmax or mean runs over this space, so its units cannot be merged; restrict drops them."
        )
    for node in (walk.nodes[position] for position in analysis.consumers.nodes(members)):
        entry = entry_of(node)
        if entry.mergeable or (entry.reduces and _keeps_units(analysis, node, inside)):
            continue
        raise SymmetryError(f"{node.op_type} {node.name} reads this space, and its weights cannot absorb a mixing.")
    found = analysis.consumers.contractions(members)
    if not found:
        raise SymmetryError("No weight contracts this space, so nothing can absorb a mixing.")
    return found


def _keeps_units(analysis: Analysis, node: ir.Node, inside: np.ndarray) -> bool:
    """Return whether a reduction runs over other axes than these classes': what came in per unit goes out per unit."""
    walk, of = analysis.walk, analysis.classes.of
    ends = [walk.states.get(v.name or "") for v in (node.inputs[0], node.outputs[0]) if v is not None]
    found = [
        np.concatenate([np.zeros(0, np.int64), *(f.labels.ravel() for f in state.factors)])
        for state in ends
        if state is not None
    ]
    if len(found) < 2:
        return False
    # an axis that is gone takes its labels along, so none may be missing
    before, after = (np.sort(labels[inside[of[labels]]]) for labels in found)
    return np.array_equal(before, after)


_INDICES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def _refuse_borders(analysis: Analysis, members: Labels) -> None:
    """A constant that passes an operator which puts other numbers beside it is no constant any more."""
    walk, of = analysis.walk, analysis.classes.of
    inside = np.zeros(analysis.classes.count, bool)
    inside[members] = True
    for node in (walk.nodes[position] for position in analysis.consumers.nodes(members)):
        states = [None if v is None else walk.states.get(v.name or "") for v in node.inputs]
        carried = [f for s in states if s is not None for f in s.factors if inside[of[f.labels]].any()]
        if not carried:
            continue
        _refuse_border(node)
        joined = [s for s, v in zip(states, node.inputs, strict=True) if v is not None and v.dtype not in _INDICES]
        if not entry_of(node).moves or len(joined) < 2:
            continue
        axis = attribute(node, "axis", None)
        rank = max(s.rank for s in joined if s is not None)
        if not isinstance(axis, int) or not all(axis % rank in f.axes for f in carried):
            raise SymmetryError(
                f"{node.op_type} {node.name} puts other values beside these along axis {axis}, so a constant shift of "
                "its input is not constant there."
            )


def _refuse_border(node: ir.Node) -> None:
    pads = entry_of(node).pads
    if pads is not None and pads(node):
        raise SymmetryError(
            f"{node.op_type} {node.name} pads with zeros, so a constant shift of its input "
            "is not constant at the border."
        )


def _weight_factor(analysis: Analysis, c: Contraction) -> LeafFactor:
    owners = [analysis.consumers.owner(labels) for labels in (c.a, c.b)]
    direct = [
        f for f in owners if f is not None and any(node == c.node for node, _ in analysis.walk.leaves[f.leaf].uses)
    ]
    node = analysis.walk.nodes[c.node]
    if len(direct) != 1:
        raise SymmetryError(
            f"{node.op_type} {node.name} does not contract this space with a weight of its own, "
            "so it cannot absorb a mixing."
        )
    if direct[0].groups:
        raise SymmetryError(f"{node.op_type} {node.name} is grouped; a mixing across its groups cannot be absorbed.")
    return direct[0]


def _shift(
    analysis: Analysis, nodes: list[ir.Node], c: Contraction, f: LeafFactor, positions: Labels, shift: Array
) -> BiasShift:
    node, leaf = nodes[c.node], analysis.walk.leaves[f.leaf]
    index = next(k for position, k in leaf.uses if position == c.node)
    _refuse_border(node)
    if node.op_type not in ("Conv", "Gemm", "MatMul") or index != 1:
        raise SymmetryError(f"{node.op_type} {node.name} cannot take a constant shift of its input.")
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
        raise SymmetryError(f"Gemm {node.name} has alpha or beta; a constant shift of its input is not supported.")
    value = node.inputs[index]
    tensor = parameter_tensor(value)
    if tensor is None:
        raise SymmetryError(f"The weight of {node.op_type} {node.name} is not an initializer.")
    vector = np.zeros(leaf.shape[f.axes[0]])
    vector[positions] = shift[:, None]
    weight = np.moveaxis(np.asarray(tensor.numpy(), np.float64), f.axes[0], -1) @ vector
    return BiasShift(c.node, weight.reshape(weight.shape[0], -1).sum(axis=1) if node.op_type == "Conv" else weight)
