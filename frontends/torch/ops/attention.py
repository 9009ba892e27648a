"""Lowering of attention: scaled_dot_product_attention and multi-head attention layers.

Everything is lowered as in evaluation: the dropout of attention weights is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Dims, Lowering, Number, Tensor

_MERGED = np.array([0, 0, -1], np.int64)


# ---------------------------------------------------------------- scaled dot product
@computes("scaled_dot_product_attention")
def scaled_dot_product_attention(
    b: Lowering, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: Any = 0.0,
    is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
) -> Tensor:  # fmt: skip
    """softmax(q k' scale + mask) v (ONNX Attention 23); rows of which everything is masked give zeros.

    Operands of other ranks get axes in front (heads may be the first of three axes); what ONNX does not broadcast is
    written out. A scale that is not given stays so: it follows the size of the head.
    """
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise UnsupportedPattern("a mask that is no tensor")
    if attn_mask is not None and attn_mask.dtype != torch.bool and attn_mask.dtype != query.dtype:
        raise UnsupportedPattern("a mask of another type than the query")
    if isinstance(scale, Number):
        query, scale = b.op("Mul", query, b.tensor(scale, query.dtype), shape=query.shape), 1.0
    if scale is not None and not float(scale):
        raise UnsupportedPattern("attention of scale zero")
    if query.rank > 4 or not _fits(query, key, value):
        return _written_out(b, query, key, value, attn_mask, is_causal, scale)
    return _attention(b, query, key, value, attn_mask, bool(is_causal), scale)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the operands need no broadcasting but that of key heads."""
    if query.rank != key.rank or query.rank != value.rank:
        return False
    if query.rank < 3:
        return True
    heads, own = query.dims[-3], key.dims[-3]
    shared = heads == own or (heads is not None and own is not None and heads % own == 0)
    return shared and own == value.dims[-3] and query.dims[:-3] == key.dims[:-3] == value.dims[:-3]


def _with(added: list[int], dims: Dims) -> Dims:
    """Sizes with axes of size 1 put in."""
    made = list(dims)
    for axis in added:
        made.insert(axis, 1)
    return tuple(made)


def _attention(
    b: Lowering, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """One Attention node, operands of two to four axes."""
    # Of three axes the first counts as heads; where it is the same for all, it may as well be the (dynamic) batch.
    added = {2: [0, 1], 3: [1] if q.dims[0] == k.dims[0] else [0]}.get(q.rank, [])
    shape = (*q.dims[:-1], v.dims[-1])
    if added:
        q, k, v = (b.op("Unsqueeze", t, np.array(added), shape=_with(added, t.dims)) for t in (q, k, v))
        if mask is not None and mask.rank == 3 and added == [1]:
            mask = b.op("Unsqueeze", mask, np.array(added), shape=_with(added, mask.dims))
    if mask is not None:
        mask = _whole_mask(b, q, k, mask)
    made = b.op("Attention", q, k, v, mask, scale=None if scale is None else float(scale),
                is_causal=1 if is_causal else None, shape=_with(added, shape))  # fmt: skip
    return b.op("Squeeze", made, np.array(added), shape=shape) if added else made


def _whole_mask(b: Lowering, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The mask with both of its last axes at full size: ONNX broadcasts the others only."""
    wanted = (q.dims[-2], k.dims[-2])
    if mask.dims[-2:] == wanted:
        return mask
    sizes: list[int | Number] = [*[1] * (mask.rank - 2), b.size(q, -2), b.size(k, -2)]
    return b.op("Expand", mask, b.ints(sizes), shape=(*mask.dims[:-2], *wanted))


def _written_out(
    b: Lowering, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: Any, scale: Any
) -> Tensor:
    if is_causal:
        raise UnsupportedPattern("causal attention that broadcasts, or on more than four axes")
    scores = _scores(b, q, k, scale)
    if mask is None:
        weights = b.op("Softmax", scores, axis=-1, shape=scores.shape)
    elif mask.dtype == torch.bool:
        low = b.const(torch.finfo(q.dtype).min, q.dtype)
        shown = b.op("Where", mask, scores, low, shape=scores.shape, dtype=q.dtype)
        weights = b.op("Softmax", shown, axis=-1, shape=scores.shape)
        weights = b.op("Where", mask, weights, b.const(0.0, q.dtype), shape=scores.shape, dtype=q.dtype)
    else:
        weights = b.op("Softmax", b.op("Add", scores, mask, shape=scores.shape), axis=-1, shape=scores.shape)
    return b.op("MatMul", weights, v, shape=b.shape)


def _scores(b: Lowering, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """q k' times the scale, by default one over the root of the size of the head."""
    turned = b.transpose(k, [*range(k.rank - 2), k.rank - 1, k.rank - 2])
    shape = (*_broadcast(q.dims[:-2], k.dims[:-2]), q.dims[-2], k.dims[-2])
    scores = b.op("MatMul", q, turned, shape=shape)
    if scale is not None:
        return b.op("Mul", scores, float(scale), shape=shape)
    size = b.op("Sqrt", b.cast(b.tensor(b.size(q, -1)), q.dtype), shape=())
    return b.op("Div", scores, size, shape=shape)


def _broadcast(one: Dims, two: Dims) -> Dims:
    rank = max(len(one), len(two))
    first, second = ((*[1] * (rank - len(dims)), *dims) for dims in (one, two))
    return tuple(c if a == 1 else a for a, c in zip(first, second, strict=True))


# ---------------------------------------------------------------- multi-head attention
@dataclass
class _Heads:
    """The parameters of a multi-head attention layer."""

    count: int
    weights: list[Tensor]
    """Of query, key and value, each (width, inputs)."""
    biases: list[Tensor | None]
    out_weight: Tensor
    out_bias: Tensor | None
    extra: tuple[Tensor, Tensor] | None = None
    """A key and a value that every sequence gets."""
    zero: bool = False
    """Every sequence gets a key and a value of zeros."""


@computes(modules=(nn.MultiheadAttention,), inputs=8)
def multihead_attention(
    b: Lowering, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False, *, module: Any, path: str,
) -> Any:  # fmt: skip
    def own(name: str) -> Tensor | None:
        return None if getattr(module, name) is None else b.parameter(f"{path}.{name}")

    separate = [own(f"{k}_proj_weight") for k in "qkv"] if module.in_proj_weight is None else None
    bias = None if module.out_proj.bias is None else b.parameter(f"{path}.out_proj.bias")
    heads = _heads(b, module.num_heads, own("in_proj_weight"), separate, own("in_proj_bias"),
                   b.parameter(f"{path}.out_proj.weight"), bias, own("bias_k"), own("bias_v"),
                   module.add_zero_attn)  # fmt: skip
    masks = _Masks(attn_mask, key_padding_mask, is_causal)
    return _multihead(b, (query, key, value), heads, masks, need_weights, average_attn_weights, module.batch_first)


@computes("multi_head_attention_forward")
def multi_head_attention_forward(
    b: Lowering, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: Any,
    out_proj_weight: Tensor, out_proj_bias: Any, training: Any = True, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None, k_proj_weight: Any = None, v_proj_weight: Any = None, static_k: Any = None,
    static_v: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    if static_k is not None or static_v is not None:
        raise UnsupportedPattern("multi-head attention with static keys or values")
    separate = [q_proj_weight, k_proj_weight, v_proj_weight] if use_separate_proj_weight else None
    heads = _heads(b, num_heads, in_proj_weight, separate, in_proj_bias, out_proj_weight, out_proj_bias,
                   bias_k, bias_v, add_zero_attn)  # fmt: skip
    masks = _Masks(attn_mask, key_padding_mask, is_causal)
    return _multihead(b, (query, key, value), heads, masks, need_weights, average_attn_weights, False)


def _heads(
    b: Lowering, count: int, packed: Any, separate: Any, bias: Any, out_weight: Tensor, out_bias: Any,
    bias_k: Any, bias_v: Any, zero: bool,
) -> _Heads:  # fmt: skip
    weights = separate or _thirds(b, packed)
    if any(not isinstance(w, Tensor) for w in weights):
        raise UnsupportedPattern("a projection without a weight")
    biases: list[Tensor | None] = [None] * 3 if bias is None else [*_thirds(b, bias)]
    extra = None if bias_k is None or bias_v is None else (bias_k, bias_v)
    return _Heads(count, weights, biases, out_weight, out_bias, extra, bool(zero))


def _thirds(b: Lowering, packed: Tensor) -> list[Tensor]:
    """The rows of query, key and value."""
    rows = packed.dims[0]
    shape = (None if rows is None else rows // 3, *packed.dims[1:])
    return b.multi("Split", [packed], [shape] * 3, axis=0, num_outputs=3)


@dataclass
class _Masks:
    """What is hidden: of positions from positions, of whole keys; True or -inf hides."""

    attention: Tensor | None
    padding: Tensor | None
    is_causal: bool

    def causal(self, need_weights: bool) -> bool:
        """Torch trusts the hint where it needs no mask of numbers."""
        return bool(self.is_causal) and self.padding is None and not need_weights

    def combined(self, b: Lowering, heads: int, dtype: torch.dtype, added: int) -> Tensor | None:
        """One mask of numbers that broadcasts to (batch, heads, queries, keys); ``added`` keys follow, not hidden."""
        parts: list[Tensor] = []
        if self.attention is not None:
            mask = self.attention
            if mask.rank == 3 and mask.dims[0] != 1:
                batch = None if mask.dims[0] is None else mask.dims[0] // heads
                mask = b.op("Reshape", mask, b.ints([-1, heads, b.size(mask, 1), b.size(mask, 2)]),
                            shape=(batch, heads, *mask.dims[1:]))  # fmt: skip
            parts.append(_numbers(b, mask, dtype))
        if self.padding is not None:
            numbers = _numbers(b, self.padding, dtype)
            batch, keys = numbers.dims
            parts.append(b.op("Unsqueeze", numbers, np.array([1, 2]), shape=(batch, 1, 1, keys)))
        if not parts:
            return None
        shape = _broadcast(parts[0].dims, parts[-1].dims)
        made = parts[0] if len(parts) == 1 else b.op("Add", *parts, shape=shape)
        return _longer(b, made, made.rank - 1, added)


def _numbers(b: Lowering, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a mask of truth values is True."""
    if mask.dtype != torch.bool:
        return b.cast(mask, dtype)
    low, zero = b.const(-math.inf, dtype), b.const(0.0, dtype)
    return b.op("Where", mask, low, zero, shape=mask.shape, dtype=dtype)


def _longer(b: Lowering, x: Tensor, axis: int, count: int) -> Tensor:
    """Zeros behind an axis."""
    if not count:
        return x
    size = x.dims[axis]
    shape = [*x.dims[:axis], None if size is None else size + count, *x.dims[axis + 1 :]]
    pads = np.zeros(2 * x.rank, np.int64)
    pads[x.rank + axis] = count
    return b.op("Pad", x, pads, b.const(0.0, x.dtype), shape=shape)


def _multihead(
    b: Lowering, inputs: tuple[Tensor, Tensor, Tensor], heads: _Heads, masks: _Masks, need_weights: bool,
    average: bool, batch_first: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output and the weights (None where they are not asked for)."""
    if any(not isinstance(x, Tensor) or x.rank != 3 for x in inputs):
        raise UnsupportedPattern("multi-head attention without a batch axis")
    turn = (0, 1, 2) if batch_first else (1, 0, 2)
    projected = [
        _projected(b, b.transpose(x, turn), w, c)
        for x, w, c in zip(inputs, heads.weights, heads.biases, strict=True)
    ]  # fmt: skip
    added = 0
    if heads.extra is not None:
        projected[1:] = [_appended(b, x, e) for x, e in zip(projected[1:], heads.extra, strict=True)]
        added += 1
    if heads.zero:
        projected[1:] = [_longer(b, x, 1, 1) for x in projected[1:]]
        added += 1
    q, k, v = (_split(b, x, heads.count) for x in projected)
    causal = masks.causal(bool(need_weights))
    mask = None if causal else masks.combined(b, heads.count, q.dtype, added)
    if need_weights:
        scores = _scores(b, q, k, None)
        if mask is not None:
            scores = b.op("Add", scores, mask, shape=scores.shape)
        weights: Tensor | None = b.op("Softmax", scores, axis=-1, shape=scores.shape)
        made = b.op("MatMul", weights, v, shape=q.shape)
    else:
        weights, made = None, _attention(b, q, k, v, mask, causal, None)
    merged = b.op("Reshape", b.transpose(made, (0, 2, 1, 3)), _MERGED, shape=projected[0].dims)
    out = b.transpose(_projected(b, merged, heads.out_weight, heads.out_bias), turn)
    if weights is not None and average:
        batch, _, length, keys = weights.dims
        weights = b.op("ReduceMean", weights, b.ints([1]), keepdims=0, shape=(batch, length, keys))
    return out, weights


def _projected(b: Lowering, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (*x.dims[:-1], weight.dims[0])
    made = b.op("MatMul", x, b.transpose(weight, (1, 0)), shape=shape)
    return made if bias is None else b.op("Add", made, bias, shape=shape)


def _split(b: Lowering, x: Tensor, heads: int) -> Tensor:
    """(batch, sequence, width) to (batch, heads, sequence, size of a head)."""
    batch, length, width = x.dims
    size = None if width is None else width // heads
    made = b.op("Reshape", x, np.array([0, 0, heads, -1]), shape=(batch, length, heads, size))
    return b.transpose(made, (0, 2, 1, 3))


def _appended(b: Lowering, x: Tensor, extra: Tensor) -> Tensor:
    """One more position, the same in every sequence."""
    batch, length, width = x.dims
    repeated = b.op("Expand", extra, b.ints([b.size(x, 0), 1, 1]), shape=(batch, 1, width))
    total = None if length is None else length + 1
    return b.op("Concat", x, repeated, axis=1, shape=(batch, total, width))
