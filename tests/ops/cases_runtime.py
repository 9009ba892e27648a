"""Cases for onnxruntime's own operators (domain com.microsoft): fused products, normalizations and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.ops.sample import Sample, case

RUNTIME = "com.microsoft"
FULL = "R* wr S(6)"
POSITIVE, PLAIN, SIGNED = "R>0 wr S(6)", "S(6)", "B(6)"
RMS = "(R>0 x ±1^2) wr S(6)"


def own(net: Sample, op: str, *inputs: str, **attributes: Any) -> str:
    """A node of onnxruntime's domain with one output."""
    return net.op(op, *inputs, domain=RUNTIME, **attributes)


# ---------------------------------------------------------------- products
def _conv(name: str, group: str, activation: str, *numbers: float) -> None:
    @case(f"{RUNTIME}::FusedConv", FULL, group, name=name)
    def write(net: Sample) -> None:
        w, b = net.weight((6, 6, 3, 3), 54), net.bias(6)
        h = net.picture()
        net.taken("h", w, 1)
        net.made("c", w, 0)
        net.made("c", b, 0)
        attributes: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4, "activation": activation}
        if numbers:
            attributes["activation_params"] = list(numbers)
        net.read(own(net, "FusedConv", h, w, b, **attributes), units="c", image=True)


_conv("relu", POSITIVE, "Relu")
_conv("tanh", SIGNED, "Tanh")
_conv("sigmoid", PLAIN, "Sigmoid")
_conv("leaky", POSITIVE, "LeakyRelu", 0.1)
_conv("six", PLAIN, "Clip", 0.0, 6.0)
_conv("hard", PLAIN, "HardSigmoid", 0.2, 0.5)


@case(f"{RUNTIME}::FusedConv", FULL, POSITIVE)
def with_a_sum(net: Sample) -> None:
    h = net.picture()
    w, b = net.weight((6, 6, 1, 1), 6), net.bias(6)
    net.taken("h", w, 1)
    net.made("c", w, 0)
    net.made("c", b, 0)
    net.read(own(net, "FusedConv", h, w, b, net.picture(units="c"), activation="Relu"), units="c", image=True)


@case(f"{RUNTIME}::FusedConv", "R>0 wr S(2)", "R>0 wr S(2)", "R* wr S(3)", "R* wr S(3)", "blocks S(2)")
def in_groups(net: Sample) -> None:
    h = net.picture()
    w = net.weight((4, 3, 3, 3), 27)
    net.made("c", w, 0)
    net.read(own(net, "FusedConv", h, w, group=2, pads=[1] * 4, activation="Relu"), 4, "c", image=True)


@case(f"{RUNTIME}::FusedGemm", FULL, POSITIVE)
def gemm_relu(net: Sample) -> None:
    w, b = net.weight((6, 6), 6), net.bias(6)
    h = net.vector()
    net.taken("h", w, 1)
    net.made("c", w, 0)
    net.made("c", b, 0)
    net.read(own(net, "FusedGemm", h, w, b, transB=1, activation="Relu"), units="c")


@case(f"{RUNTIME}::FusedGemm", FULL, POSITIVE)
def gemm_leaky(net: Sample) -> None:
    w = net.weight((6, 6), 6)
    h = net.vector()
    net.taken("h", w, 0)
    net.made("c", w, 1)
    net.read(own(net, "FusedGemm", h, w, "", activation="LeakyRelu", activation_alpha=0.2), units="c")


def _keys(net: Sample, units: str) -> str:
    k = net.sequence(6, "keys")
    for side in net.makers.pop("keys"):
        net.taken(units, *side)
    return k


def reader(net: Sample, units: str) -> str:
    """A weight that consumes units."""
    w = net.weight((6, 3), 6)
    net.taken(units, w, 0)
    return w


for _name in ("FusedMatMul", "TransposeMatMul"):

    @case(f"{RUNTIME}::{_name}", FULL, name="scores")
    def scores(net: Sample, op: str = _name) -> None:
        net.result(own(net, op, net.sequence(), _keys(net, "h"), transB=1, alpha=0.5))

    @case(f"{RUNTIME}::{_name}", FULL, FULL, name="over_positions")
    def over_positions(net: Sample, op: str = _name) -> None:
        y = own(net, op, net.sequence(units="a"), net.sequence(units="b"), transA=1)
        net.read(net.op("Transpose", net.op("MatMul", y, reader(net, "b")), perm=[0, 2, 1]), units="a")


@case(f"{RUNTIME}::FusedMatMul", "R* wr S(3)", "R* wr S(3)", "blocks S(2)")
def heads_in_the_middle(net: Sample) -> None:
    q, k = (net.op("Reshape", h, net.const([2, 5, 2, 3])) for h in (net.sequence(units="q"), _keys(net, "q")))
    q, k = (
        net.op("Squeeze", net.op("Slice", x, net.const([0]), net.const([1]), net.const([0])), net.const([0]))
        for x in (q, k)
    )
    s = own(net, "FusedMatMul", q, k, transBatchA=1, transBatchB=1, transB=1)  # (positions, heads, d)
    net.result(net.op("ReduceSum", s, net.const([0]), keepdims=0))


# ---------------------------------------------------------------- activations
for _name in ("Gelu", "QuickGelu", "FastGelu"):

    @case(f"{RUNTIME}::{_name}", PLAIN, name="vector")
    def activation(net: Sample, op: str = _name) -> None:
        net.read(own(net, op, net.vector()))


for _name in ("FastGelu", "BiasGelu"):

    @case(f"{RUNTIME}::{_name}", PLAIN, name="bias")
    def with_bias(net: Sample, op: str = _name) -> None:
        h, b = net.sequence(), net.bias(6)
        net.made("h", b, 0)
        net.read(own(net, op, h, b))


# ---------------------------------------------------------------- normalizations
def _skip(name: str, stream: str, op: str, bias: bool, total: bool = False) -> None:
    @case(f"{RUNTIME}::{op}", stream, name=name)
    def write(net: Sample) -> None:
        x, y = net.sequence(), net.sequence()
        params = [net.positive((6,))] + ([net.bias(6)] if op == "SkipLayerNormalization" else [])
        for p in params:
            net.made("n", p, 0)
        if bias:
            params.append(net.bias(6))
            net.made("h", params[-1], 0)
        outs = net.multi(op, [x, y, *params], 4 if total else 1, domain=RUNTIME)
        if total:
            node = net.nodes[-1]
            node.output[1], node.output[2] = "", ""
            net.read(outs[3])
        net.read(outs[0])


_skip("plain", FULL, op="SkipLayerNormalization", bias=False)
_skip("bias_and_sum", FULL, op="SkipLayerNormalization", bias=True, total=True)
_skip("plain", RMS, op="SkipSimplifiedLayerNormalization", bias=False)
_skip("bias_and_sum", RMS, op="SkipSimplifiedLayerNormalization", bias=True, total=True)


@case(f"{RUNTIME}::EmbedLayerNormalization", "R* wr S(6)")
def tables(net: Sample) -> None:
    ids = net.input("ids", [2, 5], 6)
    segments = net.input("segments", [2, 5], 6)
    net.feeds["ids"] = np.arange(10, dtype=np.int32).reshape(2, 5) % 7
    net.feeds["segments"] = np.arange(10, dtype=np.int32).reshape(2, 5) % 2
    words, places, kinds = (net.const(net.normal((n, 6), 1.0)) for n in (7, 5, 2))
    gamma, beta = net.positive((6,)), net.bias(6)
    for table in (words, places, kinds):
        net.made("h", table, 1)
    out = net.multi("EmbedLayerNormalization", [ids, segments, words, places, kinds, gamma, beta], 2, domain=RUNTIME)
    net.read(out[0])


# ---------------------------------------------------------------- attention
HEADS = ("R* wr S(3)",) * 4 + ("blocks S(2)",)
PACKED = ("B(3)", "B(3)", "R* wr S(3)", "R* wr S(3)", "blocks S(2)")
"""One vector holds queries and keys next to each other: that one may be scaled against the other is not found."""


def packed(net: Sample, sizes: tuple[int, int, int], x: str, *, bias: bool = True) -> list[str]:
    """The weight and bias of three projections side by side."""
    w = net.weight((6, sum(sizes)), 6)
    net.taken("h", w, 0)
    return [x, w, *([net.bias(sum(sizes))] if bias else [])]


@case(f"{RUNTIME}::Attention", FULL, *PACKED)
def projections_inside(net: Sample) -> None:
    net.read(own(net, "Attention", *packed(net, (6, 6, 6), net.sequence()), num_heads=2), 6, "v")


@case(f"{RUNTIME}::Attention", FULL, "B(3)", "B(3)", *("R* wr S(2)",) * 2, "blocks S(2)")
def narrow_values(net: Sample) -> None:
    inputs = packed(net, (6, 6, 4), net.sequence())
    y = own(net, "Attention", *inputs, num_heads=2, qkv_hidden_sizes=[6, 6, 4], unidirectional=1, scale=0.4)
    net.read(y, 4, "v")


@case(f"{RUNTIME}::Attention", FULL, *PACKED)
def masks(net: Sample) -> None:
    mask = net.const(np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32))
    extra = net.const(net.normal((2, 1, 5, 5), 1.0))
    net.read(own(net, "Attention", *packed(net, (6, 6, 6), net.sequence()), mask, "", extra, num_heads=2), 6, "v")


@case(f"{RUNTIME}::Attention", FULL, *PACKED[:4])
def mask_of_each_head_from_outside(net: Sample) -> None:
    net.feeds["mask"] = net.rng.standard_normal((2, 2, 5, 5)).astype(np.float32)
    extra = net.input("mask", [2, 2, 5, 5])
    net.read(own(net, "Attention", *packed(net, (6, 6, 6), net.sequence()), "", "", extra, num_heads=2), 6, "v")


@case(f"{RUNTIME}::MultiHeadAttention", *HEADS)
def three_inputs(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), _keys(net, "q"), net.sequence(units="v")
    net.read(own(net, "MultiHeadAttention", q, k, v, num_heads=2), 6, "v")


@case(f"{RUNTIME}::MultiHeadAttention", *PACKED)
def biases_and_masks(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), _keys(net, "q"), net.sequence(units="v")
    mask = net.const(np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32))
    extra = net.const(net.normal((2, 1, 5, 5), 1.0))
    net.read(own(net, "MultiHeadAttention", q, k, v, net.bias(18), mask, extra, num_heads=2), 6, "o")


@case(f"{RUNTIME}::MultiHeadAttention", "R* wr S(3)", "R* wr S(3)", "R* wr S(3)", "R* wr S(3)", "blocks S(2)")
def keys_in_heads(net: Sample) -> None:
    q = net.sequence(units="q")
    k, v = (
        net.op("Transpose", net.op("Reshape", h, net.const([2, 5, 2, 3])), perm=[0, 2, 1, 3])
        for h in (_keys(net, "q"), net.sequence(units="v"))
    )
    net.read(own(net, "MultiHeadAttention", q, k, v, num_heads=2), 6, "v")


@case(f"{RUNTIME}::MultiHeadAttention")
def with_a_cache(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), net.sequence(units="k"), net.sequence(units="v")
    past = []
    for name in ("past_key", "past_value"):
        net.feeds[name] = net.rng.standard_normal((2, 2, 4, 3)).astype(np.float32)
        past.append(net.input(name, [2, 2, 4, 3]))
    inputs = [q, k, v, "", "", "", *past]
    for value in net.multi("MultiHeadAttention", inputs, 3, domain=RUNTIME, num_heads=2):
        net.result(value)


def group_query(net: Sample, heads: int, few: int, d: int, *, rotary: bool = False, joined: bool = False) -> str:
    """GroupQueryAttention without a past."""
    lengths, total = net.const(np.full(2, 4, np.int32)), net.const(np.array(5, np.int32))
    if joined:
        given = [net.sequence((heads + 2 * few) * d, "q"), "", ""]
    else:
        given = [net.sequence(heads * d, "q"), net.sequence(few * d, "k"), net.sequence(few * d, "v")]
    tables = [net.const(np.cos(net.normal((8, d // 2), 1.0))), net.const(np.sin(net.normal((8, d // 2), 1.0)))]
    inputs = [*given, "", "", lengths, total, *(tables if rotary else [])]
    attributes = {"num_heads": heads, "kv_num_heads": few, "do_rotary": int(rotary)}
    return net.multi("GroupQueryAttention", inputs, 3, domain=RUNTIME, **attributes)[0]


GROUPS = ("blocks S(2)",) * 3
"""Two key heads, and the two query heads of each."""


@case(f"{RUNTIME}::GroupQueryAttention", *("R* wr S(8)",) * 4, *GROUPS)
def grouped(net: Sample) -> None:
    net.read(group_query(net, 4, 2, 8), 32, "o")


@case(f"{RUNTIME}::GroupQueryAttention", *("B(8)",) * 2, *("R* wr S(8)",) * 2, *GROUPS)
def packed_in_one(net: Sample) -> None:
    net.read(group_query(net, 4, 2, 8, joined=True), 32, "o")


@case(f"{RUNTIME}::GroupQueryAttention", *("R* wr S(16)",) * 2, "S(8)", *GROUPS, "cells R*^16")
def rotary_inside(net: Sample) -> None:
    net.read(group_query(net, 4, 2, 16, rotary=True), 64, "o")


def tables_of(net: Sample, planes: int) -> list[str]:
    """Cosines and sines of 7 positions, and which positions the 5 of each of 2 sequences have."""
    angles = net.normal((7, planes), 1.0)
    places = net.const(np.stack([np.arange(5), np.arange(5) + 2]))
    return [places, net.const(np.cos(angles)), net.const(np.sin(angles))]


@case(f"{RUNTIME}::RotaryEmbedding", "R* wr S(2)", "R* wr S(2)", "blocks S(2)")
def halves(net: Sample) -> None:
    net.read(own(net, "RotaryEmbedding", net.sequence(8), *tables_of(net, 2)), 8)


@case(f"{RUNTIME}::RotaryEmbedding", "R* wr S(2)", "R* wr S(2)", "blocks S(2)")
def neighbours(net: Sample) -> None:
    y = own(net, "RotaryEmbedding", net.sequence(8), *tables_of(net, 2), interleaved=1, num_heads=2)
    net.read(y, 8)
