"""Lowering of elementwise operations of one tensor: activations, functions, casts, dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Lowering, Number, Operand, Tensor


# ---------------------------------------------------------------- one input
def _unary(op_type: str, *names: str, modules: tuple[type[nn.Module], ...] = ()) -> None:
    @computes(*names, modules=modules)
    def entry(b: Lowering, input: Operand) -> Any:
        if not isinstance(input, Tensor):
            return _of_number(b, op_type, input)
        x = _float_like(b, input)
        return b.op(op_type, x, shape=x.shape)


def _of_number(b: Lowering, op_type: str, x: Any) -> Any:
    """A function of a number that comes from sizes (math.sqrt, -n)."""
    if not isinstance(x, Number):
        return b.out
    whole = isinstance(b.out, int | torch.SymInt)  # asked now: the number is built while another node is lowered
    kind = torch.int64 if whole and x.dtype == torch.int64 and op_type in ("Neg", "Abs") else torch.float32
    hint = b.out if x.hint is not None and isinstance(b.out, int | float) else None

    def make() -> Any:
        made = b.op(op_type, b.cast(b.tensor(x), kind), shape=())
        return (b.cast(made, torch.int64) if whole else made).value

    return Number(make, hint, torch.int64 if whole else kind)


def _float_like(b: Lowering, x: Operand) -> Tensor:
    """The operand in the type of the result: torch computes sqrt of integers in floats."""
    return b.tensor(x, b.dtype)


for _op, _names, _modules in (
    ("Relu", ("relu",), (nn.ReLU,)),
    ("Sigmoid", ("sigmoid",), (nn.Sigmoid,)),
    ("Tanh", ("tanh",), (nn.Tanh,)),
    ("Softsign", ("softsign",), (nn.Softsign,)),
    ("Mish", ("mish",), (nn.Mish,)),
    ("HardSwish", ("hardswish",), (nn.Hardswish,)),
    ("Exp", ("exp",), ()),
    ("Log", ("log",), ()),
    ("Abs", ("abs", "absolute"), ()),
    ("Neg", ("neg", "negative"), ()),
    ("Sqrt", ("sqrt",), ()),
    ("Sin", ("sin",), ()),
    ("Cos", ("cos",), ()),
    ("Tan", ("tan",), ()),
    ("Asin", ("asin", "arcsin"), ()),
    ("Acos", ("acos", "arccos"), ()),
    ("Atan", ("atan", "arctan"), ()),
    ("Sinh", ("sinh",), ()),
    ("Cosh", ("cosh",), ()),
    ("Erf", ("erf",), ()),
    ("Floor", ("floor",), ()),
    ("Ceil", ("ceil",), ()),
    ("Round", ("round",), ()),
    ("Sign", ("sign", "sgn"), ()),
    ("Reciprocal", ("reciprocal",), ()),
    ("IsNaN", ("isnan",), ()),
    ("IsInf", ("isinf",), ()),
):
    if _op not in ("IsNaN", "IsInf"):
        _unary(_op, *_names, modules=_modules)


@computes("isnan")
def isnan(b: Lowering, input: Tensor) -> Tensor:
    return b.op("IsNaN", input, shape=input.shape, dtype=torch.bool)


@computes("isinf")
def isinf(b: Lowering, input: Tensor) -> Tensor:
    return b.op("IsInf", input, shape=input.shape, dtype=torch.bool)


@computes("rsqrt")
def rsqrt(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Reciprocal", b.op("Sqrt", _float_like(b, input), shape=input.shape), shape=input.shape)


@computes("square")
def square(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Mul", input, input, shape=input.shape)


@computes("expm1")
def expm1(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Sub", b.op("Exp", input, shape=input.shape), 1.0, shape=input.shape)


@computes("log1p")
def log1p(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Log", b.op("Add", input, 1.0, shape=input.shape), shape=input.shape)


@computes("gelu", modules=(nn.GELU,))
def gelu(b: Lowering, input: Tensor, approximate: str = "none") -> Tensor:
    return b.op("Gelu", input, approximate=None if approximate == "none" else approximate, shape=input.shape)


@computes("silu", modules=(nn.SiLU,))
def silu(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Mul", input, b.op("Sigmoid", input, shape=input.shape), shape=input.shape)


@computes("leaky_relu", modules=(nn.LeakyReLU,))
def leaky_relu(b: Lowering, input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return b.op("LeakyRelu", input, alpha=float(negative_slope), shape=input.shape)


@computes("rrelu", modules=(nn.RReLU,))
def rrelu(b: Lowering, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *rest: Any) -> Tensor:
    """Evaluation: the mean slope."""
    return b.op("LeakyRelu", input, alpha=(float(lower) + float(upper)) / 2, shape=input.shape)


@computes("prelu", "_prelu_kernel", modules=(nn.PReLU,))
def prelu(b: Lowering, input: Tensor, weight: Tensor) -> Tensor:
    slope = weight
    if weight.rank == 1 and input.rank > 1:
        slope = b.reshape(weight, [-1, *[1] * (input.rank - 2)])
    return b.op("PRelu", input, slope, shape=input.shape)


@computes("elu", modules=(nn.ELU,))
def elu(b: Lowering, input: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    if (scale, input_scale) != (1.0, 1.0):
        raise UnsupportedPattern("elu with scales")
    return b.op("Elu", input, alpha=float(alpha), shape=input.shape)


@computes("celu", modules=(nn.CELU,))
def celu(b: Lowering, input: Tensor, alpha: float = 1.0) -> Tensor:
    if input.dtype == torch.float32:
        return b.op("Celu", input, alpha=float(alpha), shape=input.shape)
    inner = b.op("Elu", b.op("Div", input, float(alpha), shape=input.shape), alpha=1.0, shape=input.shape)
    return b.op("Mul", inner, float(alpha), shape=input.shape)  # ONNX has Celu for float32 only


@computes("selu", modules=(nn.SELU,))
def selu(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Selu", input, shape=input.shape)


@computes("softplus", modules=(nn.Softplus,))
def softplus(b: Lowering, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Above ``threshold`` torch returns the input, which is the same up to e^-threshold."""
    if threshold < 15:
        raise UnsupportedPattern("a softplus that turns linear where that shows")
    if beta == 1:
        return b.op("Softplus", input, shape=input.shape)
    scaled = b.op("Mul", input, float(beta), shape=input.shape)
    return b.op("Div", b.op("Softplus", scaled, shape=input.shape), float(beta), shape=input.shape)


@computes("log_sigmoid", "logsigmoid", modules=(nn.LogSigmoid,))
def logsigmoid(b: Lowering, input: Tensor) -> Tensor:
    minus = b.op("Neg", input, shape=input.shape)
    return b.op("Neg", b.op("Softplus", minus, shape=input.shape), shape=input.shape)


@computes("softshrink", modules=(nn.Softshrink,))
def softshrink(b: Lowering, input: Tensor, lambd: float = 0.5) -> Tensor:
    return b.op("Shrink", input, lambd=float(lambd), bias=float(lambd), shape=input.shape)


@computes("hardshrink", modules=(nn.Hardshrink,))
def hardshrink(b: Lowering, input: Tensor, lambd: float = 0.5) -> Tensor:
    return b.op("Shrink", input, lambd=float(lambd), bias=0.0, shape=input.shape)


@computes("tanhshrink", modules=(nn.Tanhshrink,))
def tanhshrink(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Sub", input, b.op("Tanh", input, shape=input.shape), shape=input.shape)


@computes("hardsigmoid", modules=(nn.Hardsigmoid,))
def hardsigmoid(b: Lowering, input: Tensor) -> Tensor:
    return b.op("HardSigmoid", input, alpha=1 / 6, beta=0.5, shape=input.shape)


@computes("threshold", modules=(nn.Threshold,))
def threshold(b: Lowering, input: Tensor, threshold: float, value: float) -> Tensor:
    keep = b.op("Greater", input, float(threshold), shape=input.shape, dtype=torch.bool)
    return b.op("Where", keep, input, b.const(float(value), input.dtype), shape=input.shape, dtype=input.dtype)


@computes("hardtanh", modules=(nn.Hardtanh,))
def hardtanh(b: Lowering, input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return clamp(b, input, min_val, max_val)


@computes("relu6", modules=(nn.ReLU6,))
def relu6(b: Lowering, input: Tensor) -> Tensor:
    return clamp(b, input, 0.0, 6.0)


@computes("clamp", "clip")
def clamp(b: Lowering, input: Tensor, min: Operand = None, max: Operand = None) -> Tensor:
    x = b.tensor(input, b.dtype)
    if any(isinstance(m, Tensor) and m.shape != () for m in (min, max)):
        if min is not None:
            x = b.op("Max", x, b.tensor(min, b.dtype))
        return x if max is None else b.op("Min", x, b.tensor(max, b.dtype), shape=b.shape)
    low, high = (None if m is None else b.tensor(m, b.dtype) for m in (min, max))
    return b.op("Clip", x, low, high, shape=x.shape)


@computes("clamp_min")
def clamp_min(b: Lowering, input: Tensor, min: Operand) -> Tensor:
    return clamp(b, input, min)


@computes("clamp_max")
def clamp_max(b: Lowering, input: Tensor, max: Operand) -> Tensor:
    return clamp(b, input, None, max)


@computes("glu", modules=(nn.GLU,))
def glu(b: Lowering, input: Tensor, dim: int = -1) -> Tensor:
    axis = b.axis(input, dim)
    half = [None if d is None else d // 2 if a == axis else d for a, d in enumerate(input.dims)]
    value, gate = b.multi("Split", [input], [half, half], axis=axis, num_outputs=2)
    return b.op("Mul", value, b.op("Sigmoid", gate, shape=half), shape=half)


# ---------------------------------------------------------------- nothing changes
@computes("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
        "native_dropout", view=True,
        modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
                 nn.FeatureAlphaDropout))  # fmt: skip
def dropout(b: Lowering, input: Tensor, p: float = 0.5, training: Any = True) -> Tensor:
    """Evaluation: the identity; a node of its own, so that the emitted program still trains with it."""
    if isinstance(b.out, tuple | list):
        raise UnsupportedPattern("dropout with its mask")
    return b.op("Dropout", input, shape=input.shape)


@computes("contiguous", "clone", "requires_grad", "alias", "lift_fresh_copy", "cpu", "cuda", "positive", view=True,
        modules=(nn.Identity,))  # fmt: skip
def unchanged(b: Lowering, input: Any, *args: Any, **kwargs: Any) -> Any:
    return input


@computes("detach", "detach_copy", "lift_fresh", view=True)
def detach(b: Lowering, input: Tensor) -> Tensor:
    return b.op("Identity", input, shape=input.shape)


# ---------------------------------------------------------------- casts
@computes("to", "type", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "long", "int", "bool", view=True)
def cast(b: Lowering, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Every conversion: torch says the type of the result."""
    if isinstance(input, Number):
        return number_cast(b, input)
    return b.cast(input, b.dtype)


def number_cast(b: Lowering, x: Number) -> Number:
    dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}.get(type(b.out), x.dtype)
    return Number(lambda: b.cast(b.tensor(x), dtype).value, None if x.hint is None else b.out, dtype)
