"""Lowering of matrix products: linear layers, matmul and similar operators, einsum, bilinear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Lowering, Tensor, Transparent


@computes("linear", modules=(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear))
def linear(b: Lowering, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b: a Gemm for matrices, otherwise a product with the transposed weight."""
    if input.rank == 2 and weight.rank == 2:
        return b.op("Gemm", input, weight, bias, transB=1, shape=b.shape)
    if weight.rank == 1:
        made = b.op("MatMul", input, weight, shape=b.shape)
    else:
        made = b.op("MatMul", input, b.transpose(weight, (1, 0)), shape=b.shape)
    return made if bias is None else b.op("Add", made, bias, shape=b.shape)


@computes("matmul", "__matmul__", "bmm", "mm", "mv", "dot", "vdot")
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


@computes("addmm")
def addmm(b: Lowering, input: Tensor, mat1: Tensor, mat2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return b.op("Gemm", mat1, mat2, input, alpha=float(alpha), beta=float(beta), shape=b.shape)


@computes("baddbmm")
def baddbmm(b: Lowering, input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _product_sum(b, input, b.op("MatMul", batch1, batch2, shape=b.shape), beta, alpha)


@computes("addbmm")
def addbmm(b: Lowering, input: Tensor, batch1: Tensor, batch2: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = b.op("ReduceSum", b.op("MatMul", batch1, batch2), b.ints([0]), keepdims=0, shape=b.shape)
    return _product_sum(b, input, product, beta, alpha)


@computes("inner")
def inner(b: Lowering, input: Tensor, other: Tensor) -> Tensor:
    """Sums over the last axis of both."""
    if not input.rank or not other.rank:
        return b.op("Mul", input, other, shape=b.shape)
    if other.rank <= 2:
        return b.op("MatMul", input, other if other.rank == 1 else b.transpose(other, (1, 0)), shape=b.shape)
    return _contracted(b, input, other, [input.rank - 1], [other.rank - 1])


@computes("linalg_multi_dot", "multi_dot")
def multi_dot(b: Lowering, tensors: Any) -> Tensor:
    """A chain of products in the order that torch takes: the one with the fewest multiplications."""
    return _chain(b, list(tensors))


@computes("chain_matmul")
def chain_matmul(b: Lowering, *matrices: Any) -> Tensor:
    return _chain(b, list(matrices[0]) if len(matrices) == 1 and isinstance(matrices[0], list | tuple) else [*matrices])


def _chain(b: Lowering, parts: list[Tensor]) -> Tensor:
    if len(parts) < 2 or any(p.rank != 2 for p in parts[1:-1]):
        raise UnsupportedPattern("a chain of products of something else than matrices")
    ends = parts[0].dims if parts[0].rank == 2 else (1, parts[0].dims[0])
    sizes = [*ends, *(p.dims[1] if p.rank == 2 else 1 for p in parts[1:])]
    known = [s for s in sizes if s is not None]
    if len(known) < len(sizes):
        raise UnsupportedPattern("a chain of products whose order depends on a dynamic size")
    return _multiplied(b, parts, _best_splits(known), 0, len(parts) - 1)


def _best_splits(sizes: Sequence[int]) -> dict[tuple[int, int], int]:
    """Where to split every run of a chain of matrices; sizes[k] by sizes[k + 1] is matrix k."""
    count = len(sizes) - 1
    cost, split = {(k, k): 0 for k in range(count)}, dict[tuple[int, int], int]()
    for length in range(1, count):
        for i in range(count - length):
            j = i + length
            costs = [cost[i, k] + cost[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1] for k in range(i, j)]
            cost[i, j] = min(costs)
            ties = [k for k, one in enumerate(costs) if one == cost[i, j]]
            split[i, j] = i + (ties[-1] if count == 3 else ties[0])  # three matrices: torch goes from the left
    return split


def _multiplied(b: Lowering, parts: list[Tensor], split: Mapping[tuple[int, int], int], i: int, j: int) -> Tensor:
    if i == j:
        return parts[i]
    left = _multiplied(b, parts, split, i, split[i, j])
    right = _multiplied(b, parts, split, split[i, j] + 1, j)
    shape = (*left.dims[:-1], *right.dims[1:])
    return b.op("MatMul", left, right, shape=shape)


@computes("_grouped_mm", "grouped_mm", "transformers.grouped_mm_fallback", "grouped_mm_fallback")
def grouped_mm(b: Lowering, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Rows times the matrix of their expert."""
    if input.rank != 2 or weight.rank != 3:
        raise UnsupportedPattern("a grouped product of other axes than (rows, in) and (experts, in, out)")
    raise Transparent("rows of experts that depend on data", stacked=1)


@computes("outer", "ger")
def outer(b: Lowering, input: Tensor, vec2: Tensor) -> Tensor:
    return b.op("Mul", b.reshape(input, [-1, 1]), b.reshape(vec2, [1, -1]), shape=b.shape)


@computes("einsum", view=True)
def einsum(b: Lowering, equation: str, *operands: Any, path: Any = None) -> Tensor:
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else list(operands)
    if not isinstance(equation, str) or "..." in equation:
        raise UnsupportedPattern("einsum with an ellipsis or with lists of axes")
    return b.op("Einsum", *tensors, equation=equation.replace(" ", ""), shape=b.shape)


@computes("bilinear", modules=(nn.Bilinear,), inputs=2)
def bilinear(b: Lowering, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x1' W_k x2 + b_k for each k."""
    if input1.rank != 2:
        raise UnsupportedPattern("a bilinear layer on more than two axes")
    made = b.op("Einsum", input1, weight, input2, equation="bi,kij,bj->bk", shape=b.shape)
    return made if bias is None else b.op("Add", made, bias, shape=b.shape)


@computes("tensordot")
def tensordot(b: Lowering, a: Tensor, other: Tensor, dims: Any = 2) -> Tensor:
    if isinstance(dims, int):
        left, right = list(range(a.rank - dims, a.rank)), list(range(dims))
    else:
        left, right = b.axes(a, dims[0]), b.axes(other, dims[1])
    return _contracted(b, a, other, left, right)


@computes("aten.tensordot")
def aten_tensordot(b: Lowering, a: Tensor, other: Tensor, dims_self: Any, dims_other: Any) -> Tensor:
    return _contracted(b, a, other, b.axes(a, dims_self), b.axes(other, dims_other))


def _contracted(b: Lowering, a: Tensor, other: Tensor, left: Sequence[int], right: Sequence[int]) -> Tensor:
    """Sum over pairs of axes."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in range(a.rank)]
    second = [next(letters) for _ in range(other.rank)]
    for p, q in zip(left, right, strict=True):
        second[q] = first[p]
    kept = [x for k, x in enumerate(first) if k not in left] + [x for k, x in enumerate(second) if k not in right]
    return b.op("Einsum", a, other, equation=f"{''.join(first)},{''.join(second)}->{''.join(kept)}", shape=b.shape)
