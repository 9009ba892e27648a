"""Lowering of matrix products: linear layers, matmul and its kin, einsum, bilinear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from cipm_ir.frontends.from_torch_table import lowers
from cipm_ir.frontends.from_torch_values import Lowering, Refused, Tensor


@lowers("linear", modules=(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear))
def linear(b: Lowering, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b: a Gemm for matrices, otherwise a product with the transposed weight."""
    if input.rank == 2 and weight.rank == 2:
        return b.op("Gemm", input, weight, bias, transB=1, shape=b.shape)
    if weight.rank == 1:
        made = b.op("MatMul", input, weight, shape=b.shape)
    else:
        made = b.op("MatMul", input, b.transpose(weight, (1, 0)), shape=b.shape)
    return made if bias is None else b.op("Add", made, bias, shape=b.shape)


@lowers("matmul", "__matmul__", "bmm", "mm", "mv", "dot")
def matmul(b: Lowering, input: Tensor, other: Tensor) -> Tensor:
    return b.op("MatMul", input, other, shape=b.shape)


def _product_sum(b: Lowering, base: Tensor, product: Tensor, beta: Any, alpha: Any) -> Tensor:
    if alpha != 1:
        product = b.op("Mul", product, alpha, shape=product.shape)
    if beta == 0:
        return product
    if beta != 1:
        base = b.op("Mul", base, beta, shape=base.shape)
    return b.op("Add", base, product, shape=b.shape)


@lowers("addmm")
def addmm(b: Lowering, input: Tensor, mat1: Tensor, mat2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return b.op("Gemm", mat1, mat2, input, alpha=float(alpha), beta=float(beta), shape=b.shape)


@lowers("baddbmm")
def baddbmm(b: Lowering, input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _product_sum(b, input, b.op("MatMul", batch1, batch2, shape=b.shape), beta, alpha)


@lowers("addbmm")
def addbmm(b: Lowering, input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = b.op("ReduceSum", b.op("MatMul", batch1, batch2), b.ints([0]), keepdims=0, shape=b.shape)
    return _product_sum(b, input, product, beta, alpha)


@lowers("outer", "ger")
def outer(b: Lowering, input: Tensor, vec2: Tensor) -> Tensor:
    return b.op("Mul", b.reshape(input, [-1, 1]), b.reshape(vec2, [1, -1]), shape=b.shape)


@lowers("einsum", view=True)
def einsum(b: Lowering, equation: str, *operands: Any, path: Any = None) -> Tensor:
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else list(operands)
    if not isinstance(equation, str) or "..." in equation:
        raise Refused("einsum with an ellipsis or with lists of axes")
    return b.op("Einsum", *tensors, equation=equation.replace(" ", ""), shape=b.shape)


@lowers("bilinear", modules=(nn.Bilinear,), inputs=2)
def bilinear(b: Lowering, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x1' W_k x2 + b_k for each k."""
    if input1.rank != 2:
        raise Refused("a bilinear layer on more than two axes")
    made = b.op("Einsum", input1, weight, input2, equation="bi,kij,bj->bk", shape=b.shape)
    return made if bias is None else b.op("Add", made, bias, shape=b.shape)


@lowers("tensordot")
def tensordot(b: Lowering, a: Tensor, other: Tensor, dims: Any = 2) -> Tensor:
    if isinstance(dims, int):
        left, right = list(range(a.rank - dims, a.rank)), list(range(dims))
    else:
        left, right = b.axes(a, dims[0]), b.axes(other, dims[1])
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in range(a.rank)]
    second = [next(letters) for _ in range(other.rank)]
    for p, q in zip(left, right, strict=True):
        second[q] = first[p]
    kept = [x for k, x in enumerate(first) if k not in left] + [x for k, x in enumerate(second) if k not in right]
    return b.op("Einsum", a, other, equation=f"{''.join(first)},{''.join(second)}->{''.join(kept)}", shape=b.shape)
