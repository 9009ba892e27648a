"""Elementwise operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx, nn

from cipm_ir.backends.torch.emitter import Emitter, emits, refuse
from cipm_ir.backends.torch.tensors import torch_dtype
from cipm_ir.ir.constants import attribute

__all__ = ["arg", "ratio"]

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish,
    "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": F.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le,
}  # fmt: skip
_VARIADIC: dict[str, Callable[..., Any]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": operator.add,
    "Mean": operator.add,
}


def arg(node: ir.Node, k: int) -> ir.Value | None:
    """Input k of a node, None where it is not given."""
    return node.inputs[k] if k < len(node.inputs) else None


def ratio(e: Emitter, v: ir.Value | None, default: float | None = None) -> float | int | None:
    """A constant one-element input as a Python number, `default` where it is not given, None where it varies."""
    if v is None:
        return default
    found = e.constant(v)
    return None if found is None or found.size != 1 else found.reshape(()).astype(_widest(found)).item()


def _widest(array: Any) -> str:
    return "float64" if array.dtype.kind not in "iub" else array.dtype.str


def first(e: Emitter, node: ir.Node) -> fx.Node:
    """The first input."""
    v = node.inputs[0]
    if v is None:
        raise refuse(node, "its first input is missing")
    return e.value(v)


@emits(*_UNARY)
def _unary(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(_UNARY[node.op_type], first(e, node))


@emits("Identity")
def _identity(e: Emitter, node: ir.Node) -> fx.Node:
    return first(e, node)


def operands(e: Emitter, node: ir.Node) -> list[fx.Node]:
    """All inputs; the explicit broadcasting of operator sets before 7 is refused."""
    if "broadcast" in node.attributes or ("axis" in node.attributes and e.version < 7):
        raise refuse(node, "it broadcasts in the way of operator sets before 7; convert the model to opset 13 first")
    return [e.value(v) for v in node.inputs if v is not None]


@emits(*_BINARY)
def _binary(e: Emitter, node: ir.Node) -> fx.Node:
    a, b = operands(e, node)
    return e.call(_BINARY[node.op_type], a, b)


@emits(*_VARIADIC)
def _variadic(e: Emitter, node: ir.Node) -> fx.Node:
    out, *rest = operands(e, node)
    for other in rest:
        out = e.call(_VARIADIC[node.op_type], out, other)
    return e.call(operator.truediv, out, 1 + len(rest)) if node.op_type == "Mean" else out


@emits("Div")
def _divide(e: Emitter, node: ir.Node) -> fx.Node:
    """Integers are rounded towards zero."""
    a, b = operands(e, node)
    if e.dtype(node, node.inputs[0]).is_integer():
        return e.call(torch.div, a, b, rounding_mode="trunc")
    return e.call(operator.truediv, a, b)


@emits("Mod")
def _modulo(e: Emitter, node: ir.Node) -> fx.Node:
    a, b = operands(e, node)
    return e.call(torch.fmod if attribute(node, "fmod", 0) else torch.remainder, a, b)


@emits("Pow")
def _power(e: Emitter, node: ir.Node) -> fx.Node:
    """A constant exponent is a number: as a parameter its gradient is NaN at negative bases."""
    base, exponent = node.inputs
    assert base is not None
    number = ratio(e, exponent)
    kind, other = e.dtype(node, base), e.dtype(node, exponent)
    power: Any = number if number is not None else e.optional(exponent)
    if number is not None and kind.is_floating_point() and number == int(number):
        power = int(number)
    out = e.call(torch.pow, e.value(base), power)
    mixed = kind != other and not (kind.is_floating_point() and number is not None)
    return e.method("to", out, torch_dtype(kind)) if mixed else out


@emits("BitShift")
def _shift(e: Emitter, node: ir.Node) -> fx.Node:
    a, b = operands(e, node)
    left = attribute(node, "direction") == "LEFT"
    return e.call(torch.bitwise_left_shift if left else torch.bitwise_right_shift, a, b)


@emits("Where")
def _where(e: Emitter, node: ir.Node) -> fx.Node:
    condition, a, b = operands(e, node)
    return e.call(torch.where, condition, a, b)


@emits("Clip")
def _clip(e: Emitter, node: ir.Node) -> fx.Node:
    if e.version < 11:
        low, high = attribute(node, "min"), attribute(node, "max")
        bounds: dict[str, Any] = {"min": low, "max": high}
    else:
        bounds = {name: _bound(e, arg(node, k)) for name, k in (("min", 1), ("max", 2))}
        if len({isinstance(b, fx.Node) for b in bounds.values() if b is not None}) > 1:
            bounds = {name: e.optional(arg(node, k)) for name, k in (("min", 1), ("max", 2))}
    bounds = {name: b for name, b in bounds.items() if b is not None}
    return e.call(torch.clamp, first(e, node), **bounds) if bounds else first(e, node)


def _bound(e: Emitter, v: ir.Value | None) -> Any:
    number = ratio(e, v)
    return number if number is not None else e.optional(v)


@emits("Cast")
def _cast(e: Emitter, node: ir.Node) -> fx.Node:
    return e.method("to", first(e, node), torch_dtype(ir.DataType(attribute(node, "to"))))


@emits("CastLike")
def _cast_like(e: Emitter, node: ir.Node) -> fx.Node:
    return e.method("to", first(e, node), torch_dtype(e.dtype(node, node.inputs[1])))


@emits("IsInf")
def _is_infinite(e: Emitter, node: ir.Node) -> fx.Node:
    down, up = bool(attribute(node, "detect_negative", 1)), bool(attribute(node, "detect_positive", 1))
    if down and up:
        return e.call(torch.isinf, first(e, node))
    if not (down or up):
        return e.call(torch.zeros_like, first(e, node), dtype=torch.bool)
    return e.call(torch.isneginf if down else torch.isposinf, first(e, node))


@emits("Elu", "Celu")
def _elu(e: Emitter, node: ir.Node) -> fx.Node:
    function = F.elu if node.op_type == "Elu" else F.celu
    return e.call(function, first(e, node), attribute(node, "alpha", 1.0))


@emits("Selu")
def _selu(e: Emitter, node: ir.Node) -> fx.Node:
    alpha = attribute(node, "alpha", 1.67326319217681884765625)
    gamma = attribute(node, "gamma", 1.05070102214813232421875)
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return e.call(F.selu, first(e, node))
    return e.call(operator.mul, e.call(F.elu, first(e, node), alpha), gamma)


@emits("LeakyRelu")
def _leaky_relu(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(F.leaky_relu, first(e, node), attribute(node, "alpha", 0.01))


@emits("ThresholdedRelu")
def _thresholded_relu(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(F.threshold, first(e, node), attribute(node, "alpha", 1.0), 0.0)


@emits("PRelu")
def _prelu(e: Emitter, node: ir.Node) -> fx.Node:
    """Written out: torch's own slope lies along axis 1, ONNX's broadcasts from the right."""
    x, slope = operands(e, node)
    return e.call(torch.where, e.call(torch.lt, x, 0), e.call(operator.mul, slope, x), x)


@emits("HardSigmoid")
def _hard_sigmoid(e: Emitter, node: ir.Node) -> fx.Node:
    alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    x = first(e, node)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return e.call(F.hardsigmoid, x)
    line = e.call(operator.add, e.call(operator.mul, x, alpha), beta)
    return e.call(torch.clamp, line, min=0, max=1)


@emits("Gelu")
def _gelu(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(F.gelu, first(e, node), approximate=attribute(node, "approximate", "none"))


@emits("Swish")
def _swish(e: Emitter, node: ir.Node) -> fx.Node:
    alpha, x = attribute(node, "alpha", 1.0), first(e, node)
    if alpha == 1.0:
        return e.call(F.silu, x)
    return e.call(operator.mul, x, e.call(torch.sigmoid, e.call(operator.mul, x, alpha)))


@emits("Shrink")
def _shrink(e: Emitter, node: ir.Node) -> fx.Node:
    bias, lambd, x = attribute(node, "bias", 0.0), attribute(node, "lambd", 0.5), first(e, node)
    above = e.call(torch.where, e.call(torch.gt, x, lambd), e.call(operator.sub, x, bias), e.call(torch.zeros_like, x))
    return e.call(torch.where, e.call(torch.lt, x, -lambd), e.call(operator.add, x, bias), above)


@emits("Dropout")
def _dropout(e: Emitter, node: ir.Node) -> fx.Node:
    """A new nn.Dropout of the root: nothing in eval mode, at work when the emitted module is trained."""
    rate = attribute(node, "ratio", 0.5) if e.version < 12 else ratio(e, arg(node, 1), 0.5)
    if rate is None:
        raise refuse(node, "its ratio is not a constant; make it one")
    return e.module(node.name or "dropout", nn.Dropout(float(rate)), first(e, node))
