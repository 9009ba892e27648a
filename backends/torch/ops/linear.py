"""Matrix products."""

from __future__ import annotations

import operator

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, emits
from cipm_ir.backends.torch.ops.elementwise import arg, operands
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


@emits("MatMul")
def _matmul(e: Emitter, node: ir.Node) -> fx.Node:
    a, b = operands(e, node)
    return e.call(torch.matmul, a, b)


@emits("Gemm")
def _gemm(e: Emitter, node: ir.Node) -> fx.Node:
    """F.linear where the attributes are those of a Linear, else addmm."""
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    flip_a, flip_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    a, b, *_ = operands(e, node)
    bias = arg(node, 2)
    shape = None if bias is None else e.shape(bias)
    a = e.method("t", a) if flip_a else a
    # A bias of one entry for several outputs broadcasts in ONNX, but not in a Linear.
    weight = e.shape(node.inputs[1])
    width = None if weight is None else weight[0 if flip_b else 1]
    plain = bias is None or (shape is not None and len(shape) == 1 and shape[0] == width)
    if flip_b and alpha == 1 and plain and (beta == 1 or bias is None):
        return e.call(F.linear, a, b, e.optional(bias))
    b = e.method("t", b) if flip_b else b
    if bias is None:
        out = e.call(torch.mm, a, b)
        return out if alpha == 1 else e.call(operator.mul, out, alpha)
    scales = {k: v for k, v in (("beta", beta), ("alpha", alpha)) if v != 1}
    return e.call(torch.addmm, e.value(bias), a, b, **scales)


@emits("Einsum")
def _einsum(e: Emitter, node: ir.Node) -> fx.Node:
    equation = attribute(node, "equation").replace(" ", "")
    return e.call(torch.einsum, equation, *operands(e, node))
