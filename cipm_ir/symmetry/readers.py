"""What reads the units of a space: products with weights, where a change of the units can be made up for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.ops.contraction import weight_axes
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.consumers import element_places
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True, eq=False)
class WeightConsumer:
    """A Conv, ConvTranspose, Gemm or MatMul that sums products of a space's units with a weight of its own.

    Attributes:
        node: position in the graph.
        op: the operator.
        source: name of the value that holds the units.
        output: name of the product.
        weight: name of the parameter; it may reach the node through a Transpose.
        leaf: the same, among the leaves of the walk.
        axis: the axis of the parameter that is summed.
        columns: (elements of the space, k): places along ``axis`` that each element owns; of a Conv in groups, places
            among all its input channels.
        bias: name of the parameter that Conv or Gemm adds, None where there is none.
        groups: of a Conv; of the recurrent weight of an LSTM, GRU or RNN, its directions.
        index: which input of the node the weight is: 2 for a recurrent one, whose ``source`` is the output of the node.
    """

    node: int
    op: str
    source: str
    output: str
    weight: str
    leaf: int
    axis: int
    columns: Labels
    bias: str | None
    groups: int = 1
    index: int = 1

    @property
    def key(self) -> int:
        """A number that only this use of a weight has: a recurrent layer has two."""
        return 2 * self.node + (self.index == 2)


def readers(program: Program, space: Space, *, every: bool = False) -> list[WeightConsumer]:
    """Return everything that sums products over the units of a space, in graph order.

    Of a space of blocks, products of activations with activations do not count: they go with their block.

    Args:
        program: the program.
        space: one of its spaces.
        every: also Conv in groups, ConvTranspose, and the weights of LSTM, GRU and RNN; without it they are refused.

    Raises:
        SymmetryError: something else than a product with a weight of its own sums over units.
    """
    analysis = program.analysis
    raw = analysis.spaces[program.index(space)]
    whole = raw.kind == "blocks" or raw.table.shape[1] > 1
    element = analysis.elements_of(program.index(space))
    found: dict[int, WeightConsumer] = {}
    for c in analysis.consumers.contractions(np.flatnonzero(element >= 0), refined=True):
        if 2 * c.node in found:
            continue
        one = _product(analysis, c.node, every)
        made = None if one is None else _with_columns(analysis, one, element, len(raw.table))
        if made is not None:
            found[made.key] = made
        elif not whole:
            node = analysis.walk.nodes[c.node]
            raise SymmetryError(
                f"{node.op_type} {node.name} reads @{space.name} otherwise than as a product with a weight of its own."
            )
    states = [] if not every else [_states_product(analysis, k) for k in range(len(analysis.walk.nodes))]
    for one in states:
        made = None if one is None else _with_columns(analysis, one, element, len(raw.table))
        if made is not None and made.columns.size:
            found[made.key] = made
    if not found:
        raise SymmetryError(f"No weight reads @{space.name}.")
    return [found[k] for k in sorted(found)]


def products(program: Program, *, every: bool = False) -> list[WeightConsumer]:
    """Return every Conv (group 1), Gemm and MatMul of a value with a weight, in graph order; ``columns`` are empty.

    With ``every`` also Conv in groups of two channels or more, ConvTranspose (group 1), and of LSTM, GRU and RNN the
    products with the input and with the states.
    """
    analysis = program.analysis
    found: list[WeightConsumer | None] = []
    for k in range(len(analysis.walk.nodes)):
        found += [_product(analysis, k, every), _states_product(analysis, k) if every else None]
    return [one for one in found if one is not None]


def summed_classes(program: Program, reader: WeightConsumer) -> Labels:
    """Return the class of each place along the axis of the weight that a reader sums."""
    factor = _summed(program.analysis, reader)
    if factor is None:  # the axis is fixed
        return np.full(reader.groups * program.analysis.walk.leaves[reader.leaf].shape[reader.axis], -1)
    return program.analysis.classes.of[factor.base : factor.base + factor.size]


def _summed(analysis: Analysis, reader: WeightConsumer) -> LeafFactor | None:
    """Return the labels of what a product sums over; None where they are fixed."""
    if reader.groups == 1:
        return analysis.consumers.axis(reader.leaf, reader.axis)
    factors = analysis.walk.leaves[reader.leaf].factors
    return next((f for f in factors if f.active and f.groups == reader.groups and f.axes[-1] == reader.axis), None)


def _with_columns(analysis: Analysis, made: WeightConsumer, element: Labels, count: int) -> WeightConsumer | None:
    """Return a product with the places of a space's elements; None where it sums over no units of known places."""
    factor = _summed(analysis, made)
    if factor is None:
        return None
    owner = element[analysis.classes.refined(slice(factor.base, factor.base + factor.size))]
    columns = element_places(owner, count)
    return None if columns is None else replace(made, columns=columns)


def _product(analysis: Analysis, position: int, every: bool) -> WeightConsumer | None:
    node = analysis.walk.nodes[position]
    where = _weight(analysis, position, node, every)
    if where is None or node.inputs[0] is None or (position, 0) in analysis.walk.use_leaf:
        return None
    leaf, axis = where
    recurrent = node.op_type in RECURRENT
    bias = node.inputs[2] if node.op_type != "MatMul" and not recurrent and len(node.inputs) > 2 else None
    return WeightConsumer(
        position,
        node.op_type,
        node.inputs[0].name or "",
        "" if recurrent else node.outputs[0].name or "",
        analysis.walk.leaves[leaf].name,
        leaf,
        axis,
        np.zeros((0, 0), np.int64),
        None if bias is None else bias.name,
        attribute(node, "group", 1),
    )


def _states_product(analysis: Analysis, position: int) -> WeightConsumer | None:
    """Return the product of a recurrent layer with its states, where these can be seen as its first output."""
    node = analysis.walk.nodes[position]
    if node.op_type not in RECURRENT or node.domain or attribute(node, "layout", 0) or not node.outputs[0].name:
        return None
    leaf = analysis.walk.use_leaf.get((position, 2))
    if leaf is None:
        return None
    one = analysis.walk.leaves[leaf]
    nothing = np.zeros((0, 0), np.int64)
    shown = node.outputs[0].name
    return WeightConsumer(position, node.op_type, shown, "", one.name, leaf, 2, nothing, None, one.shape[0], 2)


def _weight(analysis: Analysis, position: int, node: ir.Node, every: bool) -> tuple[int, int] | None:
    """Return the parameter that is input 1 of a product, and which of its axes is summed."""
    known = ("Conv", "ConvTranspose", "Gemm", "MatMul", *RECURRENT) if every else ("Conv", "Gemm", "MatMul")
    if node.domain or node.op_type not in known or len(node.inputs) < 2:
        return None
    found = analysis.consumers.weight(position, 1)
    if found is None or (found[1] and (node.op_type.startswith("Conv") or found[1] != (1, 0))):
        return None
    leaf, turned = found[0], bool(found[1])
    one = analysis.walk.leaves[leaf]
    if node.op_type in RECURRENT:
        return None if turned or attribute(node, "layout", 0) else (leaf, 2)
    if node.op_type.startswith("Conv"):
        together = attribute(node, "group", 1) == 1 or (node.op_type == "Conv" and every and one.shape[1] > 1)
        return (leaf, weight_axes(node, len(one.shape))[0]) if together else None
    if any(attribute(node, name, usual) != usual for name, usual in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))):
        return None
    if len(one.shape) != 2:
        return None
    return leaf, weight_axes(node, len(one.shape))[turned]


def weight_uses(program: Program) -> dict[str, int]:
    """Return how many things read each parameter; through a Transpose, everything that reads that."""
    walk = program.analysis.walk
    uses: dict[str, int] = {}
    for leaf in walk.leaves:
        nodes = [walk.nodes[position] for position, _ in leaf.uses]
        turned = [node.outputs[0] for node in nodes if node.op_type == "Transpose"]
        more = sum(len(value.uses()) + value.is_graph_output() - 1 for value in turned)
        uses[leaf.name] = uses.get(leaf.name, 0) + len(nodes) + more
    return uses
