"""Products with a weight: how one takes up a scaling and a shift of its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array
from cipm_ir.ops.contraction import weight_axes
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter, Weight, Write


@dataclass(frozen=True)
class NewBias:
    """A product that gets a bias: an input of its own, or an Add behind a MatMul."""

    node: ir.Node
    vector: Array
    weight: Weight

    def write(self, draft: GraphRewriter) -> None:
        """Add it; the last value keeps the name of the product."""
        stem = self.weight.name.removesuffix(".weight").removesuffix("_weight")
        bias = draft.initializer(f"{stem}.bias", self.vector, self.weight.tensor.dtype)
        if self.node.op_type != "MatMul":
            self.node.resize_inputs(3)
            self.node.replace_input_with(2, bias)
            return
        product = self.node.outputs[0]
        successor = draft.take_over(product, f"{product.name}_product")
        self.node.append(draft.new_node(self.node, "Add", [product, bias], successor))


Step = Write | NewBias


def carry_out(draft: GraphRewriter, steps: list[Step]) -> None:
    """Write what was decided."""
    for step in steps:
        if isinstance(step, Write):
            draft.write(step)
        else:
            step.write(draft)


def absorb_input(draft: GraphRewriter, node: ir.Node, index: int, axis: int, scale: Array, shift: Array) -> list[Step]:
    """Return what makes ``node`` compute from x what it computed from ``scale * x + shift`` along the axis of its
    input.

    Refuses (`UnsupportedPattern`) anything but a MatMul, Gemm or Conv that sums over the axis with a weight of its own.
    """
    weight = draft.weight(node, 1) if not node.domain and index == 0 else None
    summed = None if weight is None else _summed_axis(draft, node, weight, axis)
    if weight is None or summed is None or weight.shape[summed] != len(scale):
        product = not node.domain and node.op_type in ("MatMul", "Gemm", "Conv")
        raise UnsupportedPattern(f"{node.op_type} reads it" + (" without a float weight of its own" if product else ""))
    factor = scale.reshape([-1 if k == summed else 1 for k in range(len(weight.shape))])
    steps: list[Step] = [draft.change(weight, lambda array: array * factor)]
    if shift.any():
        moved = np.moveaxis(weight.array, summed, -1) @ shift
        vector = moved.reshape(moved.shape[0], -1).sum(axis=1) if node.op_type == "Conv" else moved
        steps.append(_shifted(draft, node, weight, vector))
    return steps


def _summed_axis(draft: GraphRewriter, node: ir.Node, weight: Weight, axis: int) -> int | None:
    """Return the axis of the weight that is summed, where it meets this axis of the input."""
    rank = draft.rank(node.inputs[0])
    if node.op_type == "MatMul":
        fits = rank is not None and axis == rank - 1 and len(weight.shape) == 2
    elif node.op_type == "Gemm":
        fits = axis == int(not attribute(node, "transA", 0))
    else:
        fits = node.op_type == "Conv" and axis == 1 and attribute(node, "group", 1) == 1
    return weight_axes(node, len(weight.shape))[0] if fits else None


def _shifted(draft: GraphRewriter, node: ir.Node, weight: Weight, vector: Array) -> Step:
    if node.op_type == "Conv" and (
        any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    ):
        raise UnsupportedPattern("a Conv that pads with zeros cannot take up beta")
    if node.op_type == "Gemm":
        share = float(attribute(node, "beta", 1.0))
        if not share:
            raise UnsupportedPattern("a Gemm that ignores its bias cannot take up beta")
        vector = vector * float(attribute(node, "alpha", 1.0)) / share
    bias = bias_of(draft, node, len(vector))
    if isinstance(bias, Weight):
        added = vector if node.op_type != "Conv" else vector.reshape(bias.shape)
        return draft.change(bias, lambda array: array + added)
    if bias is not None:
        raise UnsupportedPattern(f"the bias of {node.op_type} {node.name or node.outputs[0].name} is computed")
    return NewBias(node, draft.rounded(vector, weight.tensor.dtype, "a new bias"), weight)


def bias_of(draft: GraphRewriter, node: ir.Node, width: int) -> Weight | ir.Value | None:
    """Return the constant that a product adds along its last axis (Conv: its channels), a value where it is computed,
    or None.

    Behind a MatMul, an Add of a constant counts if it is the only reader.
    """
    if node.op_type != "MatMul":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        return None if value is None else draft.weight(node, 2) or value
    product = node.outputs[0]
    if len(product.uses()) != 1 or product.is_graph_output():
        return None
    (use,) = product.uses()
    if use.node.op_type != "Add" or use.node.domain or use.node.graph is not draft.graph:
        return None
    weight = draft.weight(use.node, 1 - use.idx)
    if weight is None or not weight.shape or weight.shape[-1] != width:
        return None
    return weight
