"""Cases for the elementwise operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from tests.ops.sample import Sample, case

S, SIGNED, SCALED, FULL = "S(6)", "B(6)", "R>0 wr S(6)", "R* wr S(6)"

ACTIVATIONS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Identity": (FULL, 20, {}),
    "Dropout": (FULL, 20, {}),
    "Neg": (FULL, 20, {}),
    "Abs": (FULL, 20, {}),
    "Relu": (SCALED, 20, {}),
    "LeakyRelu": (SCALED, 20, {"alpha": 0.2}),
    "Tanh": (SIGNED, 20, {}),
    "Sin": (SIGNED, 20, {}),
    "Erf": (SIGNED, 20, {}),
    "Softsign": (SIGNED, 20, {}),
    "Asinh": (SIGNED, 20, {}),
    "Atan": (SIGNED, 20, {}),
    "Sinh": (SIGNED, 20, {}),
    "Tan": (SIGNED, 20, {}),
    "Sign": (FULL, 20, {}),  # scalings end here
    "Round": (SIGNED, 20, {}),
    "Shrink": (SIGNED, 20, {"lambd": 0.3, "bias": 0.2}),
    "Cos": (SIGNED, 20, {}),
    "Cosh": (SIGNED, 20, {}),
    "Sigmoid": (S, 20, {}),
    "Gelu": (S, 20, {}),
    "Swish": (S, 24, {"alpha": 1.5}),
    "Elu": (S, 20, {}),
    "Selu": (S, 20, {}),
    "Celu": (S, 20, {"alpha": 2.0}),
    "Softplus": (S, 20, {}),
    "HardSigmoid": (S, 20, {}),
    "HardSwish": (S, 20, {}),
    "Mish": (S, 20, {}),
    "Exp": (S, 20, {}),
    "ThresholdedRelu": (S, 20, {"alpha": 0.5}),
    "Floor": (S, 20, {}),
    "Ceil": (S, 20, {}),
}


def _activation(op: str, group: str, opset: int, attributes: dict[str, Any]) -> None:
    @case(op, group, name="vector", opset=opset)
    def write(net: Sample) -> None:
        net.read(net.op(op, net.vector(), **attributes))


for _op, (_group, _opset, _attributes) in ACTIVATIONS.items():
    _activation(_op, _group, _opset, _attributes)


# Functions of a limited domain: small values, positive values, or values above one.
def _narrow(op: str, group: str) -> None:
    @case(op, group, name="narrow")
    def write(net: Sample) -> None:
        net.read(net.op(op, net.vector(spread=0.1)))


for _op, _group in {"Asin": SIGNED, "Atanh": SIGNED, "Acos": S}.items():
    _narrow(_op, _group)


@case("Acosh", S)
def above_one(net: Sample) -> None:
    net.read(net.op("Acosh", net.op("Add", net.vector(positive=True), net.const(1.0))))


@case("Log", S)
def log_of_positive(net: Sample) -> None:
    net.read(net.op("Log", net.vector(positive=True)))


@case("Reciprocal", FULL)
def reciprocal_of_positive(net: Sample) -> None:
    net.read(net.op("Reciprocal", net.vector(positive=True)))


@case("Sqrt", SCALED)  # the input by s^2, the output by s
def square_root(net: Sample) -> None:
    net.read(net.op("Sqrt", net.vector(positive=True)))


@case("IsNaN", S)
def is_nan(net: Sample) -> None:
    net.read_cast(net.op("IsNaN", net.op("Sqrt", net.vector())))


@case("IsInf", S)
def is_inf(net: Sample) -> None:
    net.read_cast(net.op("IsInf", net.op("Reciprocal", net.op("Relu", net.vector()))))


@case("Not", S)
def negated_condition(net: Sample) -> None:
    net.read_cast(net.op("Not", net.op("Greater", net.vector(), net.const(0.3))))


# ---------------------------------------------------------------- conversions
@case("Cast", FULL)
def to_double(net: Sample) -> None:
    wide = net.op("Cast", net.vector(), to=TensorProto.DOUBLE)
    net.read(net.op("Cast", wide, to=TensorProto.FLOAT))


@case("Cast", S, coarse={"h:sign": "truncation is odd for signed integers, not for unsigned ones"})
def to_integer(net: Sample) -> None:
    net.read_cast(net.op("Cast", net.op("Mul", net.vector(), net.const(3.0)), to=TensorProto.INT32))


@case("CastLike", FULL)
def like_float(net: Sample) -> None:
    net.read(net.op("CastLike", net.vector(), net.const(1.0)))


@case("CastLike", S, coarse={"h:sign": "truncation is odd for signed integers, not for unsigned ones"})
def like_integer(net: Sample) -> None:
    net.read_cast(net.op("CastLike", net.op("Mul", net.vector(), net.const(3.0)), net.const([1], dtype=np.int32)))


# ---------------------------------------------------------------- bounds and slopes
def _clip(name: str, group: str, low: float | None, high: float | None) -> None:
    @case("Clip", group, name=name)
    def write(net: Sample) -> None:
        bounds = ["" if b is None else net.const(b) for b in (low, high)]
        net.read(net.op("Clip", net.vector(), *bounds))


_clip("six", S, 0.0, 1.5)
_clip("symmetric", SIGNED, -0.5, 0.5)
_clip("zero", SCALED, 0.0, None)
_clip("none", FULL, None, None)


@case("PRelu", SCALED)
def slope_per_unit(net: Sample) -> None:
    net.read(net.op("PRelu", net.vector(), net.positive((6,))))


@case("PRelu", SCALED)
def slope_per_channel(net: Sample) -> None:
    net.read(net.op("PRelu", net.picture(), net.positive((6, 1, 1))), image=True)


# ---------------------------------------------------------------- several inputs
def _two(
    op: str, *groups: str, positive: bool = False, coarse: dict[str, str] | None = None, **attributes: Any
) -> None:
    @case(op, *groups, name="two_branches", coarse=coarse)
    def write(net: Sample) -> None:
        a, b = (net.vector(positive=positive) for _ in range(2))
        net.read(net.op(op, a, b, **attributes))


for _op in ("Add", "Sub", "Sum", "Mean"):
    _two(_op, FULL)
for _op in ("Max", "Min"):
    _two(_op, SCALED)
_two("Mul", "(R>0^2 x ±1^2) wr S(6)")
_two("Div", "(R>0^2 x ±1^2) wr S(6)")
_two("Mod", S, fmod=1, coarse=dict.fromkeys(("h:scale", "h:sign"), "fmod is homogeneous, Mod of integers is not"))
_two("Pow", S, positive=True)


def _comparison(op: str) -> None:
    @case(op, SCALED, name="two_branches")  # scaled alike, which ends here
    def write(net: Sample) -> None:
        net.read_cast(net.op(op, net.vector(), net.vector()))

    @case(op, SCALED, name="with_zero")
    def with_zero(net: Sample) -> None:
        net.read_cast(net.op(op, net.vector(), net.const(0.0)))


for _op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
    _comparison(_op)


@case("Equal", "(R>0^2 x ±1) wr S(6)")  # each side scaled on its own, both flipped
def equal_signs(net: Sample) -> None:
    net.read_cast(net.op("Equal", net.op("Sign", net.vector()), net.op("Sign", net.vector())))


def _logical(op: str) -> None:
    @case(op, S, name="two_conditions")
    def write(net: Sample) -> None:
        parts = [net.op("Greater", net.vector(), net.const(0.2)) for _ in range(2)]
        net.read_cast(net.op(op, *parts))


for _op in ("And", "Or", "Xor"):
    _logical(_op)


def _bits(op: str, count: int, **attributes: Any) -> None:
    @case(op, SIGNED if count == 1 else "(±1^2) wr S(6)", name="integers")  # the signs end at Abs
    def write(net: Sample) -> None:
        kind = TensorProto.UINT8 if op == "BitShift" else TensorProto.INT32
        parts = [
            net.op("Cast", net.op("Mul", net.op("Abs", net.vector()), net.const(3.0)), to=kind) for _ in range(count)
        ]
        net.read_cast(net.op(op, *parts, **attributes))


_bits("BitwiseNot", 1)
_bits("BitwiseAnd", 2)
_bits("BitwiseOr", 2)
_bits("BitwiseXor", 2)
_bits("BitShift", 2, direction="LEFT")


@case("Add", S)
def bias_for_all(net: Sample) -> None:
    net.read(net.op("Add", net.vector(), net.const(0.7)))


@case("Add")
def fixed_vector(net: Sample) -> None:
    net.read(net.op("Add", net.vector(), net.op("CumSum", net.const(np.ones(6)), net.const(0))))


@case("Mul", FULL)
def factor_for_all(net: Sample) -> None:
    net.read(net.op("Mul", net.vector(), net.const(0.7)))


@case("Max", SCALED)
def max_with_zero(net: Sample) -> None:
    net.read(net.op("Max", net.vector(), net.const(0.0)))


@case("Max", S)
def max_with_number(net: Sample) -> None:
    net.read(net.op("Max", net.vector(), net.const(0.3)))


@case("Where", "S(6)")
def condition_from_one(net: Sample) -> None:
    x = net.vector()
    net.read(net.op("Where", net.op("Greater", x, net.const(0.6)), x, net.const(0.0)))


@case("Where", FULL)
def condition_from_outside(net: Sample) -> None:
    net.feeds["mask"] = np.array([[True], [False], [True]])
    net.input("mask", [3, 1], TensorProto.BOOL)
    net.read(net.op("Where", "mask", net.vector(), net.const(0.0)))


def _power(name: str, group: str, exponent: Any) -> None:
    @case("Pow", group, name=name)
    def write(net: Sample) -> None:
        net.read(net.op("Squeeze", net.op("Pow", net.vector(), net.const(exponent)), net.const([0])))


_power("square", FULL, np.array([[[2.0]]]))
_power("cube", FULL, np.array([[[3.0]]]))
_power("cube_of_integer_type", FULL, np.array([[[3]]]))
