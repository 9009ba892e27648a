"""Attention and rotary embedding as operators (operator set 23)."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.backends.torch.ops.sizes import compute
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


@dataclass(frozen=True)
class _Heads:
    """Queries, keys and values as (batch, heads, sequence, size), the cache joined; sizes of the sequences."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    queries: Int
    keys: Int
    past: Int
    groups: int


def _split_heads(e: Emitter, node: ir.Node, which: int, count: int | None) -> fx.Node:
    v = node.inputs[which]
    assert v is not None
    if e.rank(node, v) == 4:
        return e.value(v)
    if count is None:
        raise refuse(node, "inputs of rank 3 need q_num_heads and kv_num_heads; set them")
    sizes = [e.size(v, 0), e.size(v, 1), count, -1]
    return e.call(torch.permute, e.call(torch.reshape, e.value(v), sizes), [0, 2, 1, 3])


def _count(e: Emitter, node: ir.Node, which: int, name: str) -> int | None:
    given = attribute(node, name)
    shape = e.shape(node.inputs[which])
    return given if given or shape is None or len(shape) != 4 else shape[1]


def _heads(e: Emitter, node: ir.Node) -> _Heads:
    q_count, kv_count = _count(e, node, 0, "q_num_heads"), _count(e, node, 1, "kv_num_heads")
    if q_count is None or kv_count is None:
        raise refuse(node, "the numbers of heads are unknown; set q_num_heads and kv_num_heads")
    parts = [_split_heads(e, node, k, q_count if k == 0 else kv_count) for k in range(3)]
    lengths = [_length(e, node, k) for k in range(2)]
    past: Int = 0
    if arg(node, 4) is not None and arg(node, 5) is not None:
        cache = [node.inputs[4], node.inputs[5]]
        parts[1:] = [e.call(torch.cat, [e.optional(c), p], dim=2) for c, p in zip(cache, parts[1:], strict=True)]
        past = e.size(cache[0], 2) if cache[0] is not None else 0
    q, k, v = parts
    return _Heads(q, k, v, lengths[0], compute(e, operator.add, past, lengths[1]), past, q_count // kv_count)


def _length(e: Emitter, node: ir.Node, which: int) -> Int:
    v = node.inputs[which]
    assert v is not None
    return e.size(v, e.rank(node, v) - 2)


def _mask(e: Emitter, node: ir.Node, heads: _Heads) -> fx.Node | None:
    """The given mask with the causal one in it, unless torch's own causal mask will do."""
    given = arg(node, 3)
    mask = e.optional(given)
    shape = e.shape(given)
    if given is not None and shape is not None and isinstance(heads.keys, int) and shape[-1] not in (None, heads.keys):
        kind = e.dtype(node, given)
        fill = False if kind == ir.DataType.BOOL else -math.inf
        mask = e.call(F.pad, mask, [0, heads.keys - (shape[-1] or 0)], value=fill)
    if not attribute(node, "is_causal", 0) or (mask is None and heads.past == 0):
        return mask
    ones = e.call(torch.ones, [heads.queries, heads.keys], dtype=torch.bool, **e.device())
    causal = e.call(torch.tril, ones, heads.past)
    if mask is None:
        return causal
    if e.dtype(node, given) == ir.DataType.BOOL:
        return e.call(torch.logical_and, causal, mask)
    return e.call(torch.where, causal, mask, -math.inf)


@emits("Attention")
def _attention(e: Emitter, node: ir.Node) -> list[fx.Node | None]:
    """Scaled dot-product attention; written out where the scores are capped."""
    windows = (attribute(node, "left_window_size", -1), attribute(node, "right_window_size", -1))
    if arg(node, 6) is not None or windows != (-1, -1):
        raise refuse(node, "padding lengths and sliding windows are not written; pass an attn_mask instead")
    heads = _heads(e, node)
    mask = _mask(e, node, heads)
    causal = bool(attribute(node, "is_causal", 0)) and mask is None
    scale, cap = attribute(node, "scale"), attribute(node, "softcap", 0.0)
    if cap:
        out = _capped(e, node, heads, mask, causal)
    else:
        options = {"enable_gqa": True} if heads.groups > 1 else {}
        attend = F.scaled_dot_product_attention
        out = e.call(attend, heads.q, heads.k, heads.v, attn_mask=mask, is_causal=causal, scale=scale, **options)
    if e.rank(node, node.inputs[0]) == 3:
        out = e.call(torch.flatten, e.call(torch.permute, out, [0, 2, 1, 3]), 2)
    return [out, heads.k, heads.v, None]


def _capped(e: Emitter, node: ir.Node, heads: _Heads, mask: fx.Node | None, causal: bool) -> fx.Node:
    """softmax(cap · tanh(scores / cap) + mask) · values."""
    cap, scale = attribute(node, "softcap"), attribute(node, "scale")
    k, v = heads.k, heads.v
    if heads.groups > 1:
        k, v = (e.call(torch.repeat_interleave, x, heads.groups, dim=1) for x in (k, v))
    if scale is None:
        width = e.call(operator.getitem, e.call(getattr, heads.q, "shape"), 3)
        scale = e.call(operator.pow, width, -0.5)
    scores = e.call(operator.mul, e.call(torch.matmul, heads.q, e.call(torch.transpose, k, -1, -2)), scale)
    scores = e.call(operator.mul, e.call(torch.tanh, e.call(operator.truediv, scores, cap)), cap)
    if causal:
        ones = e.call(torch.ones, [heads.queries, heads.keys], dtype=torch.bool, **e.device())
        scores = e.call(torch.where, e.call(torch.tril, ones), scores, -math.inf)
    if mask is not None:
        given = arg(node, 3)
        boolean = given is None or e.dtype(node, given) == ir.DataType.BOOL
        scores = e.call(torch.where, mask, scores, -math.inf) if boolean else e.call(operator.add, scores, mask)
    return e.call(torch.matmul, e.call(F.softmax, scores, dim=-1), v)


@emits("RotaryEmbedding")
def _rotary(e: Emitter, node: ir.Node) -> fx.Node:
    """Rotates the planes of the first `rotary_embedding_dim` entries of each head, halves or neighbours as pairs."""
    v = node.inputs[0]
    assert v is not None
    flat = e.rank(node, v) == 3
    x = first(e, node)
    if flat:
        count = attribute(node, "num_heads")
        if not count:
            raise refuse(node, "an input of rank 3 needs num_heads; set it")
        x = e.call(torch.reshape, x, [e.size(v, 0), e.size(v, 1), count, -1])
    tables = [_table(e, node, k, heads_axis=2 if flat else 1) for k in (1, 2)]
    part = attribute(node, "rotary_embedding_dim", 0)
    turned, rest = x, None
    if part:
        turned, rest = (e.call(operator.getitem, x, (..., s)) for s in (slice(None, part), slice(part, None)))
    out = _turned(e, turned, tables[0], tables[1], bool(attribute(node, "interleaved", 0)))
    if rest is not None:
        out = e.call(torch.cat, [out, rest], dim=-1)
    return e.call(torch.flatten, out, 2) if flat else out


def _table(e: Emitter, node: ir.Node, which: int, heads_axis: int) -> fx.Node:
    table, positions = e.optional(node.inputs[which]), arg(node, 3)
    if positions is not None:
        table = e.call(operator.getitem, table, (e.value(positions),))
    return e.call(torch.unsqueeze, table, heads_axis)


def _turned(e: Emitter, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool) -> fx.Node:
    if interleaved:
        a, b = (e.call(operator.getitem, x, (..., slice(k, None, 2))) for k in (0, 1))
    else:
        halves = e.call(torch.chunk, x, 2, dim=-1)
        a, b = (e.call(operator.getitem, halves, k) for k in (0, 1))

    def product(p: fx.Node, q: fx.Node) -> fx.Node:
        return e.call(operator.mul, p, q)

    real = e.call(operator.sub, product(cos, a), product(sin, b))
    imag = e.call(operator.add, product(sin, a), product(cos, b))
    if interleaved:
        return e.call(torch.flatten, e.call(torch.stack, [real, imag], dim=-1), -2)
    return e.call(torch.cat, [real, imag], dim=-1)
