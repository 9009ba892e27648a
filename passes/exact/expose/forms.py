"""Normalizations over one axis, whichever way they are written: one operator, or spelled out by an exporter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter, Weight

_FUSED = {"LayerNormalization": True, "RMSNormalization": False, "SimplifiedLayerNormalization": False}


@dataclass(frozen=True, eq=False)
class Norm:
    """``gamma · (x - mean) / sqrt(mean((x - mean)²) + epsilon) + beta`` along one axis; without ``centred``, mean = 0.

    Attributes:
        node: the operator, or the division where it is spelled out.
        source: x.
        output: the last value that belongs to it.
        axis: counted from the front; the same for source and output.
        gamma, beta: None where there is none.
        entries: the nodes that read x.
        centre: the Sub that takes the mean away, where it is spelled out.
    """

    node: ir.Node
    centred: bool
    source: ir.Value
    output: ir.Value
    axis: int
    epsilon: float
    gamma: Weight | None
    beta: Weight | None
    entries: frozenset[ir.Node]
    centre: ir.Node | None = None

    @property
    def fused(self) -> bool:
        """One operator."""
        return self.node.op_type in _FUSED


def find_norms(draft: GraphRewriter) -> list[Norm]:
    """Return all normalizations of the main graph that run over exactly one axis, in graph order."""
    found = []
    for node in draft.graph:
        if node.op_type in _FUSED and node.domain in ("", "com.microsoft"):
            norm = _fused(draft, node)
        elif node.op_type in ("Div", "Mul") and not node.domain:
            norm = _spelled(draft, node)
        else:
            continue
        if norm is not None:
            found.append(norm)
    return found


def _fused(draft: GraphRewriter, node: ir.Node) -> Norm | None:
    source, sizes = node.inputs[0], draft.sizes(node.inputs[0])
    if source is None or sizes is None or int(attribute(node, "axis", -1)) % len(sizes[0]) != len(sizes[0]) - 1:
        return None
    axis, centred = len(sizes[0]) - 1, _FUSED[node.op_type]
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None  # mean and deviation are asked for
    gamma, beta = draft.weight(node, 1), draft.weight(node, 2)
    given = [value is not None for value in node.inputs[1:3]]
    if given != [weight is not None for weight in (gamma, beta)][: len(given)] or gamma is None:
        return None  # computed, or to be overridden
    size = sizes[0][axis]
    if any(tuple(weight.shape) != (size,) for weight in (gamma, beta) if weight is not None):
        return None
    epsilon = float(attribute(node, "epsilon", 1e-5))
    return Norm(node, centred, source, node.outputs[0], axis, epsilon, gamma, beta, frozenset((node,)))


def _spelled(draft: GraphRewriter, node: ir.Node) -> Norm | None:
    """Pow, ReduceMean, Add, Sqrt, Div (or Reciprocal and Mul), with or without Sub before, Mul and Add behind."""
    for x, power in _quotients(draft, node):
        mean = _mean_square(draft, x, power)
        if mean is None:
            continue
        axis, epsilon, reader = mean
        centre = draft.made_by(x, "Sub")
        entries = {node, reader}
        source, centred = draft.through(x), False
        if centre is not None and centre.inputs[0] is not None:
            average = draft.made_by(centre.inputs[1], "ReduceMean")
            if average is not None and not _is_mean(draft, average, centre, axis):
                continue
            if average is not None:
                source, centred, entries = draft.through(centre.inputs[0]), True, {centre, average}
        if draft.sizes(source) is None:
            continue
        entries |= _copies(draft, source, entries)
        gamma, beta, output = _affine(draft, node.outputs[0], axis)
        made = centre if centred else None
        return Norm(node, centred, source, output, axis, epsilon, gamma, beta, frozenset(entries), made)
    return None


def _is_mean(draft: GraphRewriter, average: ir.Node, centre: ir.Node, axis: int) -> bool:
    """Return whether ``centre`` takes the mean along the axis away, and nothing else reads that mean."""
    mean = average.outputs[0]
    alone = not mean.is_graph_output() and {use.node for use in mean.uses()} == {centre}
    return alone and _over(draft, average) == axis and _same(draft, average.inputs[0], centre.inputs[0])


def _quotients(draft: GraphRewriter, node: ir.Node) -> list[tuple[ir.Value, ir.Value | None]]:
    """Return pairs (x, v) for which the node may be x / sqrt(v)."""
    a, b = node.inputs[:2]
    if a is None or b is None:
        return []
    if node.op_type == "Div":
        root = draft.made_by(b, "Sqrt")
        return [] if root is None else [(a, root.inputs[0])]
    return [(x, power) for x, y in ((a, b), (b, a)) if (power := _inverse_root(draft, y)) is not None]


def _inverse_root(draft: GraphRewriter, value: ir.Value) -> ir.Value | None:
    """v of a value that is 1 / sqrt(v)."""
    made = draft.made_by(value, "Reciprocal", "Div", "Pow")
    if made is None:
        return None
    if made.op_type == "Pow":
        return made.inputs[0] if draft.scalar(made.inputs[1]) == -0.5 else None
    if made.op_type == "Div" and draft.scalar(made.inputs[0]) != 1.0:
        return None
    root = draft.made_by(made.inputs[-1], "Sqrt")
    return None if root is None else root.inputs[0]


def _mean_square(draft: GraphRewriter, x: ir.Value, power: ir.Value | None) -> tuple[int, float, ir.Node] | None:
    """Axis, epsilon, and the node that squares, where ``power`` is mean(x²) + epsilon."""
    total = draft.made_by(power, "Add")
    for value, epsilon in () if total is None else (total.inputs[:2], total.inputs[1::-1]):
        number, mean = draft.scalar(epsilon), draft.made_by(value, "ReduceMean")
        square = None if mean is None else draft.made_by(mean.inputs[0], "Pow", "Mul")
        if number is None or mean is None or square is None or not _same(draft, square.inputs[0], x):
            continue
        twice = square.op_type == "Mul" and _same(draft, square.inputs[1], x)
        axis = _over(draft, mean)
        if (twice or (square.op_type == "Pow" and draft.scalar(square.inputs[1]) == 2.0)) and axis is not None:
            return axis, number, square
    return None


def _over(draft: GraphRewriter, mean: ir.Node) -> int | None:
    """Return the one axis that a ReduceMean keeps at size 1."""
    axes = attribute(mean, "axes")
    if axes is None and len(mean.inputs) > 1:
        axes = draft.constant(mean.inputs[1])
    rank = draft.rank(mean.inputs[0])
    if axes is None or rank is None or np.size(axes) != 1 or not attribute(mean, "keepdims", 1):
        return None
    return int(np.reshape(axes, -1)[0]) % rank


def _same(draft: GraphRewriter, a: ir.Value | None, b: ir.Value | None) -> bool:
    return a is not None and b is not None and draft.through(a) is draft.through(b)


def _copies(draft: GraphRewriter, source: ir.Value, entries: set[ir.Node]) -> set[ir.Node]:
    """Return copies of x that only the normalization reads."""
    found: set[ir.Node] = set()
    for node in [use.node for use in source.uses()]:
        if node.op_type in ("Cast", "Identity") and node.graph is draft.graph:
            readers = {use.node for use in node.outputs[0].uses()}
            if readers <= entries and draft.through(node.outputs[0]) is draft.through(source):
                found.add(node)
    return found


def _affine(draft: GraphRewriter, value: ir.Value, axis: int) -> tuple[Weight | None, Weight | None, ir.Value]:
    gamma = _factor(draft, value, "Mul", axis)
    if gamma is not None:
        value = gamma.node.outputs[0]
    beta = _factor(draft, value, "Add", axis)
    return gamma, beta, value if beta is None else beta.node.outputs[0]


def _factor(draft: GraphRewriter, value: ir.Value, op: str, axis: int) -> Weight | None:
    """Return the vector along the axis that the only reader of a value multiplies it by, or adds."""
    sizes = draft.sizes(value)
    while len(value.uses()) == 1 and not value.is_graph_output():
        (use,) = value.uses()
        node = use.node
        if node.domain or node.graph is not draft.graph or sizes is None:
            return None
        if node.op_type in ("Identity", "Cast") and draft.through(node.outputs[0]) is draft.through(value):
            value = node.outputs[0]
            continue
        weight = draft.weight(node, 1 - use.idx) if node.op_type == op else None
        if weight is None or not aligned(weight.shape, len(sizes[0]), axis, sizes[0][axis]):
            return None
        return weight
    return None


def aligned(shape: tuple[int, ...], rank: int, axis: int, size: int) -> bool:
    """Return whether a constant of this shape, aligned from the right, varies along that axis only."""
    behind = rank - axis - 1
    place = len(shape) - 1 - behind
    if not 0 <= place <= axis or shape[place] != size:
        return False
    return all(n == 1 for k, n in enumerate(shape) if k != place)
