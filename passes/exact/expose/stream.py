"""The stream that a layer normalization reads: all that is added up in it, who writes it and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ops.contraction import weight_axes
from cipm_ir.ops.registry import entry_of
from cipm_ir.passes.exact.expose.forms import Norm
from cipm_ir.passes.exact.expose.linear import bias_of
from cipm_ir.passes.exact.expose.moves import moved_axis, moved_outputs, source_axis
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter, Weight

_SUMS = ("Add", "Sub", "Sum")
Writer = tuple[Weight, int]
"""A constant, and its axis along which the units of the stream lie."""


@dataclass
class Stream:
    """Values that carry the units, each with its axis; the constants that write them; the normalizations behind."""

    axes: dict[ir.Value, int] = field(default_factory=dict)
    writers: dict[tuple[ir.Node, int], Writer] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)


def stream_of(draft: GraphRewriter, norm: Norm, norms: list[Norm]) -> Stream:
    """Return everything that is added to what a normalization reads, back to its writers and on to all other readers.

    Refuses (`UnsupportedPattern`) a stream that something reads otherwise than through a layer normalization, and one
    that is written by anything but products with a weight, biases and tables.
    """
    return _Search(draft, norms).run(norm)


class _Search:
    """Grows a stream from one value until nothing is left to look at."""

    def __init__(self, draft: GraphRewriter, norms: list[Norm]) -> None:
        self.draft = draft
        self.entry = {node: norm for norm in norms if norm.centred for node in norm.entries}
        self.stream = Stream()
        self.todo: list[ir.Value] = []

    def run(self, norm: Norm) -> Stream:
        sizes = self.draft.sizes(norm.source)
        assert sizes is not None
        self.size = sizes[0][norm.axis]
        self._add(norm.source, norm.axis)
        while self.todo:
            value = self.todo.pop()
            axis = self.stream.axes[value]
            if value.is_graph_output():
                raise UnsupportedPattern("a graph output shows the stream")
            self._writers(value, axis)
            for use in value.uses():
                self._reader(use.node, use.idx, value, axis)
        return self.stream

    def _add(self, value: ir.Value, axis: int) -> None:
        known = self.stream.axes.get(value)
        if known is None:
            self.stream.axes[value] = axis
            self.todo.append(value)
        elif known != axis:
            raise UnsupportedPattern("the stream meets itself along another axis")

    # ------------------------------------------------------------ behind a value
    def _writers(self, value: ir.Value, axis: int) -> None:
        node = value.producer()
        if node is None:
            raise UnsupportedPattern("a graph input writes the stream")
        if node.domain or node.graph is not self.draft.graph:
            raise UnsupportedPattern(f"{node.op_type} writes the stream")
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            self._product(node, axis)
            return
        for index, place in self._operands(node, axis):
            self._operand(node, index, place)

    def _operand(self, node: ir.Node, index: int, axis: int) -> None:
        weight = self.draft.weight(node, index)
        if weight is not None:
            self.stream.writers[node, index] = (weight, axis)
            return
        value = node.inputs[index]
        assert value is not None
        self._add(value, axis)

    def _operands(self, node: ir.Node, axis: int) -> Iterator[tuple[int, int]]:
        """Yield the inputs of a node that carry the units of its output, with their axes."""
        if node.op_type in _SUMS:
            yield from ((k, self._aligned(node, k, axis)) for k in range(len(node.inputs)))
        elif node.op_type in ("Mul", "Div"):
            yield self._scaled(node, axis)
        elif node.op_type == "Concat":
            rank = self.draft.rank(node.outputs[0])
            if rank is None or int(attribute(node, "axis", 0)) % rank == axis:
                raise UnsupportedPattern("Concat writes the stream")
            yield from ((k, axis) for k in range(len(node.inputs)))
        else:
            place = source_axis(self.draft, node, axis)
            if place is None:
                raise UnsupportedPattern(f"{node.op_type} writes the stream")
            yield 0, place

    def _aligned(self, node: ir.Node, index: int, axis: int) -> int:
        """Return the axis of an operand that meets this axis of the sum."""
        sizes, total = self.draft.sizes(node.inputs[index]), self.draft.rank(node.outputs[0])
        place = -1 if sizes is None or total is None else axis - total + len(sizes[0])
        if sizes is None or place < 0 or sizes[0][place] != self.size:
            raise UnsupportedPattern("something without the axis is added to the stream")
        return place

    def _scaled(self, node: ir.Node, axis: int) -> tuple[int, int]:
        """Return the operand of a product that has the units, where the other one is the same for all units."""
        total = self.draft.rank(node.outputs[0])
        found = []
        for index in range(2):
            sizes = self.draft.sizes(node.inputs[index])
            if sizes is None or total is None:
                raise UnsupportedPattern(f"{node.op_type} writes the stream")
            place = axis - total + len(sizes[0])
            if place >= 0 and sizes[0][place] != 1:
                found.append((index, place))
        if len(found) != 1 or (node.op_type == "Div" and found[0][0]):
            raise UnsupportedPattern(f"{node.op_type} scales the units of the stream one by one")
        return found[0]

    def _product(self, node: ir.Node, axis: int) -> None:
        weight, rank = self.draft.weight(node, 1), self.draft.rank(node.outputs[0])
        if weight is None or rank is None or len(weight.shape) < 2:
            raise UnsupportedPattern(f"{node.op_type} writes the stream without a float weight of its own")
        if node.op_type == "Conv" and attribute(node, "group", 1) != 1:
            # Its outputs are sums over different inputs, so that their mean is no product with a mean of weights.
            raise UnsupportedPattern("a grouped Conv writes the stream")
        _, out = weight_axes(node, len(weight.shape))
        if axis != (1 if node.op_type == "Conv" else rank - 1) or weight.shape[out] != self.size:
            raise UnsupportedPattern(f"{node.op_type} writes the stream along another axis")
        self.stream.writers[node, 1] = (weight, out)
        if node.op_type == "MatMul":
            return  # an Add behind it is part of the stream
        bias = bias_of(self.draft, node, self.size)
        if bias is None:
            return
        if not isinstance(bias, Weight) or not bias.shape or bias.shape[-1] != self.size:
            raise UnsupportedPattern(f"{node.op_type} adds a bias without the axis to the stream")
        self.stream.writers[node, 2] = (bias, len(bias.shape) - 1)

    # ------------------------------------------------------------ in front of a value
    def _reader(self, node: ir.Node, index: int, value: ir.Value, axis: int) -> None:
        if node.graph is not self.draft.graph:
            raise UnsupportedPattern("a subgraph reads the stream")
        norm = self.entry.get(node)
        if norm is not None and index == 0 and norm.source in (value, self.draft.through(value)):
            if norm.axis != axis:
                raise UnsupportedPattern("a normalization runs over another axis of the stream")
            if norm not in self.stream.norms:
                self.stream.norms.append(norm)
            return
        if entry_of(node).sizes_only:
            return
        if node.domain:
            raise UnsupportedPattern(f"{node.op_type} reads the stream")
        for out, place in self._results(node, index, axis):
            self._add(out, place)

    def _results(self, node: ir.Node, index: int, axis: int) -> Iterator[tuple[ir.Value, int]]:
        """Yield the outputs of a node that carry on the units, with their axes.

        What else they are made of is seen there.
        """
        if node.op_type in (*_SUMS, "Mul", "Div", "Concat"):
            rank, total = self.draft.rank(node.inputs[index]), self.draft.rank(node.outputs[0])
            if rank is None or total is None:
                raise UnsupportedPattern(f"{node.op_type} reads the stream")
            yield node.outputs[0], axis if node.op_type == "Concat" else axis + total - rank
            return
        place = moved_axis(self.draft, node, index, axis)
        if place is None:
            raise UnsupportedPattern(f"{node.op_type} reads the stream")
        yield from ((out, place) for out in moved_outputs(node))
