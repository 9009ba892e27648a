"""Cases for recurrent layers, attention and quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.ops.sample import Sample, case

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


# ---------------------------------------------------------------- recurrent layers: inputs h (6), units u (5)
def recurrent(net: Sample, op: str, outputs: int, extra: tuple[str, ...] = (), **attributes: Any) -> list[str]:
    """(T 2, N 5, 6) -> hidden size 5; the layer's parameters are noted as producers and consumers of u."""
    directions, rows = (2 if attributes.get("direction") == "bidirectional" else 1), GATES[op] * 5
    w, r = net.weight((directions, rows, 6), 6), net.weight((directions, rows, 5), 5)
    b = net.const(net.normal((directions, 2 * rows), 0.3))
    net.taken("h", w, 2)
    for name, blocks in ((w, GATES[op]), (r, GATES[op]), (b, 2 * GATES[op])):
        net.made("u", name, 1, blocks)
    net.taken("u", r, 2)
    return net.multi(op, [net.sequence(), w, r, b, *extra], outputs, hidden_size=5, **attributes)


def _recurrent(op: str, name: str, coarse: dict[str, str] | None = None, **attributes: Any) -> None:
    @case(op, "R* wr S(6)", "S(5)", name=name, coarse=coarse)
    def write(net: Sample) -> None:
        for value in recurrent(net, op, 3 if op == "LSTM" else 2, **attributes):
            net.read(value, 5, "u")


_recurrent("LSTM", "plain")
_recurrent("LSTM", "bidirectional", direction="bidirectional")
_recurrent("LSTM", "coupled", input_forget=1, clip=1.0)
_recurrent("GRU", "plain")
_recurrent("GRU", "linear_before_reset", linear_before_reset=1, direction="reverse")
_recurrent("RNN", "tanh", coarse={"u:sign": "tanh is odd, but gates are not"})
_recurrent("RNN", "relu", coarse={"u:scale": "Relu is homogeneous, but gates are not"}, activations=["Relu"])


@case("LSTM", "R* wr S(6)", "S(5)")
def states_and_peepholes(net: Sample) -> None:
    first = [net.const(net.normal((1, 5, 5), 0.5)) for _ in range(2)]
    peepholes = net.const(net.normal((1, 15), 0.5))
    for name in first:
        net.made("u", name, 2)
    net.made("u", peepholes, 1, 3)
    net.read(recurrent(net, "LSTM", 1, ("", *first, peepholes))[0], 5, "u")


@case("GRU", "R* wr S(6)")
def state_from_outside(net: Sample) -> None:
    net.feeds["state"] = net.rng.standard_normal((1, 5, 5)).astype(np.float32)
    net.read(recurrent(net, "GRU", 1, ("", net.input("state", [1, 5, 5])))[0], 5, "u")


@case("RNN", "R* wr S(6)", "S(5)", coarse={"u:sign": "tanh is odd, but gates are not"})
def lengths(net: Sample) -> None:
    net.read(recurrent(net, "RNN", 1, (net.const(np.array([1, 2, 2, 1, 2], np.int32)),))[0], 5, "u")


# ---------------------------------------------------------------- attention: q and k share units, v and its readers
HEADS = ("R* wr S(3)",) * 4 + ("blocks S(2)",)


def _keys(net: Sample, n: int = 6, units: str = "q") -> str:
    """Keys: what they lose, the queries gain."""
    k = net.sequence(n, "keys")
    for side in net.makers.pop("keys"):
        net.taken(units, *side)
    return k


@case("Attention", *HEADS, opset=23)
def three_axes(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), _keys(net), net.sequence(units="v")
    net.read(net.op("Attention", q, k, v, q_num_heads=2, kv_num_heads=2), 6, "v")


@case("Attention", *HEADS, opset=24)
def causal_with_mask(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), _keys(net), net.sequence(units="v")
    mask = net.const(net.normal((5, 5), 1.0))
    heads: dict[str, Any] = {"q_num_heads": 2, "kv_num_heads": 2}
    net.read(net.op("Attention", q, k, v, mask, is_causal=1, scale=0.4, softcap=2.0, **heads), 6, "v")


@case("Attention", "R* wr S(3)", "R* wr S(3)", "R* wr S(3)", "R* wr S(3)", "blocks S(2)", opset=23)
def mask_per_head(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), _keys(net), net.sequence(units="v")
    mask = net.const(net.normal((1, 2, 5, 5), 1.0))  # a parameter: its head axis moves along
    net.read(net.op("Attention", q, k, v, mask, q_num_heads=2, kv_num_heads=2), 6, "v")


@case("Attention", *HEADS[:4], opset=23)
def mask_per_head_from_outside(net: Sample) -> None:
    q, k, v = net.sequence(units="q"), _keys(net), net.sequence(units="v")
    net.feeds["mask"] = net.rng.standard_normal((2, 2, 5, 5)).astype(np.float32)
    mask = net.input("mask", [2, 2, 5, 5])
    net.read(net.op("Attention", q, k, v, mask, q_num_heads=2, kv_num_heads=2), 6, "v")


@case("Attention", *("R* wr S(3)",) * 2, *("R* wr S(2)",) * 2, *("blocks S(2)",) * 3, opset=23)
def grouped_queries(net: Sample) -> None:
    q, k, v = net.sequence(12, "q"), net.sequence(6, "k"), net.sequence(4, "v")
    net.read(net.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=2), 8, "o")


def four_axes(net: Sample, value: str, heads: int, d: int) -> str:
    """(2, heads, 5, d) from (2, 5, heads d)."""
    return net.op("Transpose", net.op("Reshape", value, net.const([2, 5, heads, d])), perm=[0, 2, 1, 3])


@case("Attention", *HEADS, opset=23)
def four_axes_in_and_out(net: Sample) -> None:
    q, k, v = (four_axes(net, h, 2, 3) for h in (net.sequence(units="q"), _keys(net), net.sequence(units="v")))
    y = net.op("Transpose", net.op("Attention", q, k, v), perm=[0, 2, 1, 3])
    net.read(net.op("Reshape", y, net.const([2, 5, 6])), 6, "v")


@case("Attention", "S(2)", "S(3)", "S(3)", opset=23)  # heads cross positions
def one_key_head(net: Sample) -> None:
    q, k, v = net.sequence(6, "q"), net.sequence(3, "k"), net.sequence(3, "v")
    net.read(net.op("Attention", q, k, v, q_num_heads=2, kv_num_heads=1), 6, "o")


@case("Attention", opset=23)
def with_a_cache(net: Sample) -> None:
    q, k, v = (four_axes(net, net.sequence(units=u), 2, 3) for u in ("q", "k", "v"))
    past = []
    for name in ("past_key", "past_value"):
        net.feeds[name] = net.rng.standard_normal((2, 2, 4, 3)).astype(np.float32)
        past.append(net.input(name, [2, 2, 4, 3]))
    for value in net.multi("Attention", [q, k, v, "", *past], 3):
        net.result(value)


# ---------------------------------------------------------------- rotary embedding: two heads of two planes (8)
def tables(net: Sample, planes: int = 2) -> list[str]:
    """Cosines and sines (2, 5, planes) as parameters."""
    angle = net.rng.uniform(0, 3, (2, 5, planes)).astype(np.float32)
    return [net.const(np.cos(angle)), net.const(np.sin(angle))]


def _rotary(name: str, *spaces: str, **attributes: Any) -> None:
    @case("RotaryEmbedding", *spaces, name=name, opset=23)
    def write(net: Sample) -> None:
        half = attributes.get("rotary_embedding_dim", 4) // 2
        net.read(net.op("RotaryEmbedding", net.sequence(8), *tables(net, half), num_heads=2, **attributes), 8)


PLANES = ("R* wr S(2)", "R* wr S(2)", "blocks S(2)")  # heads change places in each plane, planes as wholes
_rotary("halves", *PLANES)
_rotary("interleaved", *PLANES, interleaved=1)
_rotary("partial", "R* wr S(2)", "R* wr S(4)", "blocks S(1)", rotary_embedding_dim=2)


@case("RotaryEmbedding", "R* wr S(2)", "R* wr S(2)", opset=23)
def angles_from_outside(net: Sample) -> None:
    x = four_axes(net, net.sequence(8), 2, 4)
    net.feeds["angle"] = net.rng.uniform(0, 3, (2, 5, 2)).astype(np.float32)
    angle = net.input("angle", [2, 5, 2])
    y = net.op("RotaryEmbedding", x, net.op("Cos", angle), net.op("Sin", angle))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const([2, 5, 8]))
    net.read(y, 8)


# ---------------------------------------------------------------- quantization
def number(net: Sample, value: float) -> str:
    """A float32 scalar."""
    return net.const(np.float32(value))


def _per_tensor(op: str) -> None:
    @case(op, "S(6)", name="per_tensor")
    def write(net: Sample) -> None:
        s, z = number(net, 0.02), net.const(np.uint8(20))
        net.read(net.op("DequantizeLinear", net.op("QuantizeLinear", net.vector(), s, z), s, z))

    @case(op, "R>0 wr S(6)", name="per_axis")
    def write_axis(net: Sample) -> None:
        s = net.const(net.rng.uniform(0.01, 0.03, 6).astype(np.float32))
        z = net.const(net.rng.integers(100, 150, 6).astype(np.uint8))
        y = net.op("QuantizeLinear", net.vector(), s, z, axis=1)
        net.read(net.op("DequantizeLinear", y, s, z, axis=1))

    @case(op, name="by_blocks", opset=21)
    def write_blocks(net: Sample) -> None:
        s = net.const(net.rng.uniform(0.01, 0.03, (3, 2)).astype(np.float32))
        z = net.const(net.rng.integers(100, 150, (3, 2)).astype(np.uint8))
        y = net.op("QuantizeLinear", net.vector(), s, z, axis=1, block_size=3)
        net.read(net.op("DequantizeLinear", y, s, z, axis=1, block_size=3))


_per_tensor("QuantizeLinear")
_per_tensor("DequantizeLinear")


@case("DynamicQuantizeLinear", "S(6)")
def dynamic(net: Sample) -> None:
    y, s, z = net.multi("DynamicQuantizeLinear", [net.vector(positive=True)], 3)
    net.read(net.op("DequantizeLinear", y, s, z))


@case("QLinearMatMul", "S(6)", "S(5)")
def quantized_matrix(net: Sample) -> None:
    q = net.op("QuantizeLinear", net.vector(), number(net, 0.02), net.const(np.uint8(120)))
    w = net.const(net.rng.integers(-60, 60, (6, 5)).astype(np.int8))
    s, z = net.const(net.rng.uniform(0.01, 0.03, 5).astype(np.float32)), net.const(np.zeros(5, np.int8))
    net.taken("h", w, 0)
    for name, axis in ((w, 1), (s, 0), (z, 0)):
        net.made("u", name, axis)
    given = [q, number(net, 0.02), net.const(np.uint8(120)), w, s, z, number(net, 0.03), net.const(np.uint8(20))]
    y = net.op("QLinearMatMul", *given)
    net.read(net.op("DequantizeLinear", y, number(net, 0.03), net.const(np.uint8(20))), 5, "u")


def _qlinear_conv(name: str, group: int, *spaces: str) -> None:
    @case("QLinearConv", *spaces, name=name)
    def write(net: Sample) -> None:
        q = net.op("QuantizeLinear", net.picture(), number(net, 0.02), net.const(np.uint8(120)))
        w = net.const(net.rng.integers(-60, 60, (8, 6 // group, 1, 1)).astype(np.int8))
        s, z = net.const(net.rng.uniform(0.01, 0.03, 8).astype(np.float32)), net.const(np.zeros(8, np.int8))
        b = net.const(net.rng.integers(-300, 300, 8).astype(np.int32))
        for parameter in (w, s, z, b):
            net.made("u", parameter, 0)
        given = [q, number(net, 0.02), net.const(np.uint8(120)), w, s, z, number(net, 0.03), net.const(np.uint8(128))]
        y = net.op("QLinearConv", *given, b, group=group)
        net.read(net.op("DequantizeLinear", y, number(net, 0.03), net.const(np.uint8(128))), 8, "u", image=True)


_qlinear_conv("dense", 1, "S(6)", "S(8)")
_qlinear_conv("grouped", 2, "S(3)", "S(3)", "S(4)", "S(4)", "blocks S(2)")
