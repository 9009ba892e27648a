"""Where a constant can be moved through a Relu: a bias, the Relu that alone reads it, and products that read that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.ir.parameters import is_parameter, parameter_tensor
from cipm_ir.ops.registry import entry_of
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.consumers import element_places
from cipm_ir.symmetry.leaves import Leaf
from cipm_ir.symmetry.program import Program

_BIAS_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "BatchNormalization": 2}
_PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class Place:
    """A space whose units come from one Relu: f(z) = f(z - c) + c wherever z >= c >= 0.

    Attributes:
        space: index of the space.
        before: name of z.
        bias: name of the parameter that is added to make z.
        positions: (units, k) where the bias holds each unit.
    """

    space: int
    before: str
    bias: str
    positions: Labels


def find_places(program: Program) -> tuple[list[Place], dict[str, str]]:
    """Return all places in graph order; and by the name of a space behind a Relu, why its constants stay."""
    found: list[Place] = []
    refused: dict[str, str] = {}
    search = _Search(program)
    for node in program.analysis.walk.nodes:
        if not _is_relu(node):
            continue
        for space in search.spaces_of(node.outputs[0].name or ""):
            try:
                found.append(search.place(node, space))
            except UnsupportedPattern as reason:
                refused[program.spaces[space].name] = str(reason)
    done = {program.spaces[p.space].name for p in found}
    return found, {name: why for name, why in refused.items() if name not in done}


def _is_relu(node: ir.Node) -> bool:
    """Functions that are x for x >= 0."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type != "Clip":
        return node.op_type in ("Relu", "LeakyRelu", "PRelu")
    low, high = (node.inputs[k] if len(node.inputs) > k else None for k in (1, 2))
    tensor = parameter_tensor(low)
    unbounded = high is None and "max" not in node.attributes and "min" not in node.attributes
    return unbounded and tensor is not None and not np.any(tensor.numpy())


class _Search:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.analysis: Analysis = program.analysis
        self.position = self.analysis.consumers.position
        self.space_of = np.full(self.analysis.classes.count, -1, np.int64)
        for k, raw in enumerate(self.analysis.spaces):
            if raw.kind == "units" and raw.table.shape[1] == 1:
                self.space_of[raw.table[:, 0]] = k

    def spaces_of(self, name: str) -> list[int]:
        """Return spaces of units that a value carries."""
        state = self.analysis.walk.states.get(name)
        labels = [f.labels.ravel() for f in state.factors] if state is not None else []
        spaces = self.space_of[self.analysis.classes.of[np.concatenate(labels)]] if labels else np.zeros(0, np.int64)
        return [int(k) for k in np.unique(spaces) if k >= 0]

    def place(self, relu: ir.Node, space: int) -> Place:
        """Return the place of one space behind one Relu."""
        before = relu.inputs[0]
        assert before is not None
        if before.is_graph_output() or len(before.uses()) != 1:
            raise UnsupportedPattern("what enters the Relu is read elsewhere, too")
        leaf, classes = self._bias(before)
        members = self.analysis.spaces[space].table[:, 0]
        unit = np.full(self.analysis.classes.count, -1, np.int64)
        unit[members] = np.arange(len(members))
        read = self._readers(relu.outputs[0], unit >= 0)
        every = {c.node for c in self.analysis.consumers.contractions(members)}
        if not read or read != every:
            raise UnsupportedPattern("its units are read in other places, too, which this Relu does not feed")
        positions = element_places(unit[classes], len(members))
        if positions is None or not positions.size:
            raise UnsupportedPattern("the bias does not hold every unit alike")
        return Place(space, before.name or "", leaf.name, positions)

    def _bias(self, before: ir.Value) -> tuple[Leaf, Labels]:
        """Return the parameter that is added last, and the class of each of its entries."""
        node = before.producer()
        if node is None or node not in self.position:
            raise UnsupportedPattern("no bias is added before the Relu")
        walk, here = self.analysis.walk, self.position[node]
        if node.op_type == "Add":
            given = [walk.use_leaf[here, k] for k in range(2) if (here, k) in walk.use_leaf]
        else:
            given = [walk.use_leaf[here, k] for k in [_BIAS_INPUT.get(node.op_type, -1)] if (here, k) in walk.use_leaf]
        if len(given) != 1 or attribute(node, "beta", 1.0) != 1.0:
            raise UnsupportedPattern("no bias is added before the Relu")
        leaf = walk.leaves[given[0]]
        factors = [f for f in leaf.factors if f.active]
        if len(factors) != 1 or factors[0].size != int(np.prod(leaf.shape)):
            raise UnsupportedPattern(f"{leaf.name} is no vector over the units")
        value = self.program.model.graph.initializers.get(leaf.name)
        if value is None or not is_parameter(value):
            raise UnsupportedPattern(f"{leaf.name} is computed, or may be overridden by the caller")
        if len(value.uses()) != 1:
            raise UnsupportedPattern(f"{leaf.name} is shared with other layers; untie it first")
        return leaf, self.analysis.classes.of[factors[0].base : factors[0].base + factors[0].size]

    def _readers(self, value: ir.Value, inside: np.ndarray) -> set[int]:
        """Return products that read a value, through operators that move it but do not change it."""
        found: set[int] = set()
        todo, seen = [value], set[str]()
        while todo:
            here = todo.pop()
            if here.is_graph_output():
                raise UnsupportedPattern("an output of the graph shows its units")
            for node, index in here.uses():
                entry = entry_of(node)
                if entry.sizes_only:
                    continue
                if node not in self.position:
                    raise UnsupportedPattern(f"{node.op_type} {node.name} reads its units")
                if entry.name in _PRODUCTS and not entry.domain and index == 0:
                    found.add(self.position[node])
                elif entry.shifts and self._only(node, here, inside):  # padding and means over units: see `absorb`
                    todo += [v for v in node.outputs if v.name not in seen]
                    seen |= {v.name or "" for v in node.outputs}
                else:
                    raise UnsupportedPattern(
                        f"{node.op_type} {node.name} reads its units, and is no product with a weight"
                    )
        return found

    def _only(self, node: ir.Node, value: ir.Value, inside: np.ndarray) -> bool:
        """Return whether no other input of a node carries the same units."""
        walk, of = self.analysis.walk, self.analysis.classes.of
        others = [v for v in node.inputs if v is not None and v is not value]
        states = [walk.states.get(v.name or "") for v in others]
        return not any(inside[of[f.labels]].any() for s in states if s is not None for f in s.factors)
