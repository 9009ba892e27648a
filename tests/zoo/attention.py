"""Attention blocks: layouts of a fused QKV, grouped queries, rotary embedding, the Attention operator.

All of them: (N, T, 4) -> stream of 10 -> layer norm -> attention -> residual -> (N, T, 3). A head of width d gives d
units between queries and keys and d units between values and the output projection; heads themselves are blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tests.zoo.net import Net
from tests.zoo.registry import synthetic

WIDTH, HEADS, DIM, TIME = 10, 3, 4, 5


def block(net: Net, attend: Callable[[Net, str], str], merged: int, time: int | str = "T") -> None:
    """Wrap `attend`, (N, T, WIDTH) -> (N, T, merged), into a pre-norm residual block."""
    stream = net.linear(net.input("x", ["N", time, 4]), 4, WIDTH)
    normed = net.op("LayerNormalization", stream, net.positive((WIDTH,)), net.bias(WIDTH), axis=-1)
    stream = net.op("Add", stream, net.linear(attend(net, normed), merged, WIDTH))
    net.output(net.linear(stream, WIDTH, 3), ["N", time, 3])


def heads(net: Net, x: str, count: int, dim: int = DIM) -> str:
    """(N, T, count * dim) -> (N, count, T, dim)."""
    return net.op("Transpose", net.op("Reshape", x, net.const([0, 0, count, dim])), perm=[0, 2, 1, 3])


def merge(net: Net, x: str, width: int) -> str:
    """(N, heads, T, dim) -> (N, T, heads * dim)."""
    return net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3]), net.const([0, 0, width]))


def softmax_attention(net: Net, q: str, k: str, v: str) -> str:
    """softmax(q kᵀ / sqrt(dim)) v on (N, heads, T, dim)."""
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    return net.op("MatMul", net.op("Softmax", net.op("Mul", scores, net.const(DIM**-0.5)), axis=-1), v)


def fused(net: Net, x: str, shape: list[int], perm: list[int], by_gather: bool) -> str:
    """Fused projection, split after Reshape and Transpose have brought the factor 3 to the front."""
    qkv = net.op("Reshape", net.linear(x, WIDTH, 3 * HEADS * DIM), net.const(shape))
    qkv = net.op("Transpose", qkv, perm=perm)
    if by_gather:
        parts = [net.op("Gather", qkv, net.const(i), axis=0) for i in range(3)]
    else:
        parts = [net.op("Squeeze", p, net.const([0])) for p in net.multi("Split", [qkv], 3, axis=0, num_outputs=3)]
    return merge(net, softmax_attention(net, *parts), HEADS * DIM)


@synthetic(34, "attention")  # 10 + 12 (q-k) + 12 (v-o)
def attention_separate(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        q, k, v = (heads(net, net.linear(x, WIDTH, HEADS * DIM), HEADS) for _ in range(3))
        return merge(net, softmax_attention(net, q, k, v), HEADS * DIM)

    block(net, attend, HEADS * DIM)


@synthetic(34, "attention")  # 10 + 12 + 12, columns ordered [3, h, d]
def attention_qkv_major(net: Net) -> None:
    block(net, lambda n, x: fused(n, x, [0, 0, 3, HEADS, DIM], [2, 0, 3, 1, 4], True), HEADS * DIM)


@synthetic(34, "attention")  # the same, cut by Split and Squeeze
def attention_qkv_major_split(net: Net) -> None:
    block(net, lambda n, x: fused(n, x, [0, 0, 3, HEADS, DIM], [2, 0, 3, 1, 4], False), HEADS * DIM)


@synthetic(34, "attention")  # 10 + 12 + 12, columns ordered [h, 3, d]
def attention_head_major(net: Net) -> None:
    block(net, lambda n, x: fused(n, x, [0, 0, HEADS, 3, DIM], [3, 0, 2, 1, 4], True), HEADS * DIM)


@synthetic(34, "attention")  # [h, 3 d], cut by Split on the last axis
def attention_head_major_split(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        joint = heads(net, net.linear(x, WIDTH, 3 * HEADS * DIM), HEADS, 3 * DIM)
        q, k, v = net.multi("Split", [joint, net.const([DIM] * 3)], 3, axis=-1)
        return merge(net, softmax_attention(net, q, k, v), HEADS * DIM)

    block(net, attend, HEADS * DIM)


@synthetic(34, "attention")  # Split of the flat axis before the heads are formed
def attention_flat_split(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        joint = net.linear(x, WIDTH, 3 * HEADS * DIM)
        parts = net.multi("Split", [joint, net.const([HEADS * DIM] * 3)], 3, axis=-1)
        q, k, v = (heads(net, part, HEADS) for part in parts)
        return merge(net, softmax_attention(net, q, k, v), HEADS * DIM)

    block(net, attend, HEADS * DIM)


# 10 for sure; a (heads, in, d) parameter with one label set per axis adds one d = 4 for q-k; 34 when refined
@synthetic(None, "attention", at_least=10, note="34 when each head has labels of its own")
def attention_einsum(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        weights = [net.weight((HEADS, WIDTH, DIM), WIDTH) for _ in range(3)]
        q, k, v = (net.op("Einsum", x, w, equation="btm,hmd->bhtd") for w in weights)
        scores = net.op("Softmax", net.op("Einsum", q, k, equation="bhqd,bhkd->bhqk"), axis=-1)
        return merge(net, net.op("Einsum", scores, v, equation="bhqk,bhkd->bhqd"), HEADS * DIM)

    block(net, attend, HEADS * DIM)


@synthetic(26, "attention")  # 10 + 2 * 4 (q-k of 4 query heads over 2 key heads) + 2 * 4 (v-o)
def attention_gqa(net: Net) -> None:
    def repeat(net: Net, x: str) -> str:
        wide = net.op("Expand", net.op("Unsqueeze", x, net.const([2])), net.const([1, 2, 2, TIME, DIM]))
        return net.op("Reshape", wide, net.const([0, 4, TIME, DIM]))

    def attend(net: Net, x: str) -> str:
        q = heads(net, net.linear(x, WIDTH, 4 * DIM), 4)
        k, v = (repeat(net, heads(net, net.linear(x, WIDTH, 2 * DIM), 2)) for _ in range(2))
        return merge(net, softmax_attention(net, q, k, v), 4 * DIM)

    block(net, attend, 4 * DIM, time=TIME)


def rotate(net: Net, x: str, cos: str, sin: str) -> str:
    """x cos + (-x2, x1) sin, the halves of the last axis being x1 and x2."""
    left, right = net.multi("Split", [x, net.const([DIM // 2] * 2)], 2, axis=-1)
    turned = net.op("Concat", net.op("Neg", right), left, axis=-1)
    return net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin))


def rotary_block(net: Net, cos: str, sin: str) -> None:
    """Multi-head attention with rotated queries and keys."""

    def attend(net: Net, x: str) -> str:
        q, k, v = (heads(net, net.linear(x, WIDTH, HEADS * DIM), HEADS) for _ in range(3))
        q, k = (rotate(net, value, cos, sin) for value in (q, k))
        return merge(net, softmax_attention(net, q, k, v), HEADS * DIM)

    block(net, attend, HEADS * DIM, time=TIME)


@synthetic(24, "attention")  # 10 + 2 planes (d/2, one table for all heads) + 12 (v-o)
def attention_rope_table(net: Net) -> None:
    angle = np.arange(TIME)[:, None] * np.tile(10.0 ** -np.arange(DIM // 2), 2)
    cos, sin = (net.const(table[None, None], stem) for table, stem in ((np.cos(angle), "cos"), (np.sin(angle), "sin")))
    rotary_block(net, cos, sin)


@synthetic(24, "attention")  # the same from inverse frequencies: the table of d/2 numbers moves along
def attention_rope_frequencies(net: Net) -> None:
    times = net.const(np.arange(TIME, dtype=float)[:, None], "times")
    angle = net.op("Mul", times, net.const(10.0 ** -np.arange(DIM // 2), "inv_freq"))
    angle = net.op("Concat", angle, angle, axis=-1)
    rotary_block(net, net.op("Cos", angle), net.op("Sin", angle))


@synthetic(34, "attention", opset=23)  # 10 + 12 + 12; heads given as attributes of the operator
def attention_op_3d(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        q, k, v = (net.linear(x, WIDTH, HEADS * DIM) for _ in range(3))
        return net.op("Attention", q, k, v, q_num_heads=HEADS, kv_num_heads=HEADS)

    block(net, attend, HEADS * DIM)


@synthetic(26, "attention", opset=23)  # 10 + 8 + 8: 4 query heads over 2 key heads
def attention_op_3d_gqa(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        q = net.linear(x, WIDTH, 4 * DIM)
        k, v = (net.linear(x, WIDTH, 2 * DIM) for _ in range(2))
        return net.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=2)

    block(net, attend, 4 * DIM)


@synthetic(34, "attention", opset=23)  # 10 + 12 + 12; heads as an axis
def attention_op_4d(net: Net) -> None:
    def attend(net: Net, x: str) -> str:
        q, k, v = (heads(net, net.linear(x, WIDTH, HEADS * DIM), HEADS) for _ in range(3))
        return merge(net, net.op("Attention", q, k, v, is_causal=1), HEADS * DIM)

    block(net, attend, HEADS * DIM)
