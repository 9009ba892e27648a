"""Lowering of arithmetic, comparison and choice between tensors, and between numbers that come from sizes."""

from __future__ import annotations

from typing import Any

import torch

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Lowering, Number, Operand, Tensor, known

_OF_TRUTH = {"Mul": "And", "Add": "Or", "Max": "Or", "Min": "And"}


def arithmetic(b: Lowering, op_type: str, a: Operand, c: Operand) -> Any:
    """Broadcasting arithmetic of tensors and numbers, in the type of the result."""
    if not isinstance(a, Tensor) and not isinstance(c, Tensor):
        return numbers(b, op_type, a, c)
    if b.dtype == torch.bool:
        if op_type not in _OF_TRUTH:
            raise UnsupportedPattern("arithmetic of truth values")
        op_type = _OF_TRUTH[op_type]
    return b.op(op_type, b.tensor(a, b.dtype), b.tensor(c, b.dtype), shape=b.shape)


def numbers(b: Lowering, op_type: str, a: Any, c: Any) -> Any:
    """Arithmetic of numbers that come from sizes."""
    if not isinstance(a, Number) and not isinstance(c, Number):
        return b.out
    hints = [x.hint if isinstance(x, Number) else x for x in (a, c)]
    hint = None if None in hints or not isinstance(b.out, int | float | bool) else b.out
    real = isinstance(b.out, float | torch.SymFloat) or op_type == "TrueDiv" or any(_is_float(x) for x in (a, c))
    logical = op_type in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    kind = torch.float32 if real else torch.int64

    def make() -> Any:
        if op_type == "FloorDiv" and not real and (_negative(a) or _negative(c)):
            return _rounded_down(b, a, c)
        left, right = b.tensor(a, kind), b.tensor(c, kind)
        made = b.op("Div" if op_type in ("TrueDiv", "FloorDiv") else op_type, left, right, shape=(),
                    dtype=torch.bool if logical else kind)  # fmt: skip
        return (b.op("Floor", made, shape=()) if real and op_type == "FloorDiv" else made).value

    return Number(make, hint, torch.bool if logical else kind)


def _negative(x: Any) -> bool:
    """Whether an integer is negative, or may be as far as can be seen."""
    if not isinstance(x, Number):
        return bool(x < 0)
    producer = x.value.producer() if x.hint is None else None
    return x.hint < 0 if x.hint is not None else producer is not None and producer.op_type in ("Neg", "Sub")


def _rounded_down(b: Lowering, a: Any, c: Any) -> Any:
    """a // c of a negative a (ONNX rounds towards zero): -((-a + c - 1) // c), as in the common -(-a // c)."""
    if _negative(c) or not _negative(a):
        raise UnsupportedPattern("an integer division by a negative number")
    left, right = b.tensor(a, torch.int64), b.tensor(c, torch.int64)
    raised = b.op("Add", b.op("Neg", left, shape=()), b.op("Sub", right, 1, shape=()), shape=())
    return b.op("Neg", b.op("Div", raised, right, shape=()), shape=()).value


def _is_float(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, Number) and x.dtype.is_floating_point)


@computes("add")
def add(b: Lowering, input: Any, other: Any, alpha: Any = 1) -> Any:
    if isinstance(input, list | tuple) and isinstance(other, list | tuple):
        return type(input)([*input, *other])
    if alpha != 1:
        other = b.op("Mul", b.tensor(other, b.dtype), alpha)
    return arithmetic(b, "Add", input, other)


@computes("sub", "subtract")
def sub(b: Lowering, input: Any, other: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        other = b.op("Mul", b.tensor(other, b.dtype), alpha)
    return arithmetic(b, "Sub", input, other)


@computes("rsub")
def rsub(b: Lowering, input: Any, other: Any, alpha: Any = 1) -> Any:
    return sub(b, other, input, alpha)


@computes("mul", "multiply")
def mul(b: Lowering, input: Any, other: Any) -> Any:
    if isinstance(input, list | tuple):
        return input * known(other)
    return arithmetic(b, "Mul", input, other)


@computes("div", "divide", "true_divide", "truediv")
def div(b: Lowering, input: Any, other: Any, rounding_mode: str | None = None) -> Any:
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        return numbers(b, "TrueDiv", input, other)
    if rounding_mode == "floor":
        return floordiv(b, input, other)
    if rounding_mode == "trunc":
        if not b.dtype.is_floating_point:
            return arithmetic(b, "Div", input, other)
        raise UnsupportedPattern("division of floats that truncates")
    return arithmetic(b, "Div", input, other)


@computes("floordiv", "floor_divide")
def floordiv(b: Lowering, input: Any, other: Any) -> Any:
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        return numbers(b, "FloorDiv", input, other)
    if b.dtype.is_floating_point:
        return b.op("Floor", arithmetic(b, "Div", input, other), shape=b.shape)
    # ONNX divides integers towards zero: subtract what is left over of a floored division first.
    rest = b.op("Mod", b.tensor(input, b.dtype), b.tensor(other, b.dtype))
    return b.op("Div", b.op("Sub", b.tensor(input, b.dtype), rest), b.tensor(other, b.dtype), shape=b.shape)


@computes("fmod")
def fmod(b: Lowering, input: Any, other: Any) -> Any:
    if b.dtype.is_floating_point:
        raise UnsupportedPattern("a remainder of floats")
    return b.op("Mod", b.tensor(input, b.dtype), b.tensor(other, b.dtype), fmod=1, shape=b.shape)


@computes("remainder", "mod")
def remainder(b: Lowering, input: Any, other: Any) -> Any:
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        return numbers(b, "Mod", input, other)
    if b.dtype.is_floating_point:
        raise UnsupportedPattern("a remainder of floats")
    return arithmetic(b, "Mod", input, other)


@computes("pow", "float_power")
def power(b: Lowering, input: Any, exponent: Any) -> Any:
    if not isinstance(input, Tensor) and not isinstance(exponent, Tensor):
        return numbers(b, "Pow", input, exponent)
    base = b.tensor(input, b.dtype)
    if exponent in (2, 2.0) and not isinstance(exponent, Tensor | Number):
        return b.op("Pow", base, b.const(2, b.dtype), shape=b.shape)
    return b.op("Pow", base, b.tensor(exponent, b.dtype), shape=b.shape)


@computes("maximum")
def maximum(b: Lowering, input: Any, other: Any) -> Any:
    return arithmetic(b, "Max", input, other)


@computes("minimum")
def minimum(b: Lowering, input: Any, other: Any) -> Any:
    return arithmetic(b, "Min", input, other)


def _comparison(op_type: str, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, input: Any, other: Any) -> Any:
        return compared(b, op_type, input, other)


def compared(b: Lowering, op_type: str, input: Any, other: Any) -> Any:
    """A comparison in the type that both sides promote to."""
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        return numbers(b, op_type, input, other)
    first, second = _promoting(input), _promoting(other)
    dtype = torch.result_type(first, second)
    return b.op(op_type, b.tensor(input, dtype), b.tensor(other, dtype), shape=b.shape, dtype=torch.bool)


for _op, _names in (
    ("Equal", ("eq",)),
    ("Less", ("lt", "less")),
    ("Greater", ("gt", "greater")),
    ("LessOrEqual", ("le", "less_equal")),
    ("GreaterOrEqual", ("ge", "greater_equal")),
):
    _comparison(_op, *_names)


@computes("ne", "not_equal")
def not_equal(b: Lowering, input: Any, other: Any) -> Any:
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        raise UnsupportedPattern("a comparison of numbers")
    return b.op("Not", compared(b, "Equal", input, other), shape=b.shape)


def _promoting(x: Any) -> Any:
    """A stand-in that takes part in type promotion as the operand does."""
    if isinstance(x, Tensor):
        return torch.empty([1] * x.rank, dtype=x.dtype, device="meta")
    return 0.5 if _is_float(x) else 1


def _logical(op_type: str, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, input: Any, other: Any) -> Any:
        if b.dtype != torch.bool:
            raise UnsupportedPattern("a bitwise operation on integers")
        return b.op(op_type, b.tensor(input, torch.bool), b.tensor(other, torch.bool), shape=b.shape)


for _op, _words in (
    ("And", ("logical_and", "and_", "__and__", "bitwise_and")),
    ("Or", ("logical_or", "or_", "__or__", "bitwise_or")),
    ("Xor", ("logical_xor", "xor", "__xor__", "bitwise_xor")),
):
    _logical(_op, *_words)


@computes("logical_not", "bitwise_not", "invert")
def logical_not(b: Lowering, input: Tensor) -> Tensor:
    if b.dtype != torch.bool:
        raise UnsupportedPattern("a bitwise operation on integers")
    return b.op("Not", b.cast(input, torch.bool), shape=input.shape)


@computes("where")
def where(b: Lowering, condition: Tensor, input: Operand, other: Operand) -> Tensor:
    a, c = b.tensor(input, b.dtype), b.tensor(other, b.dtype)
    return b.op("Where", b.cast(condition, torch.bool), a, c, shape=b.shape, dtype=b.dtype)


@computes("masked_fill")
def masked_fill(b: Lowering, input: Tensor, mask: Tensor, value: Operand) -> Tensor:
    return b.op("Where", b.cast(mask, torch.bool), b.tensor(value, b.dtype), b.tensor(input, b.dtype), shape=b.shape,
                dtype=b.dtype)  # fmt: skip


@computes("lerp")
def lerp(b: Lowering, input: Tensor, end: Tensor, weight: Operand) -> Tensor:
    step = b.op("Mul", b.op("Sub", end, input), b.tensor(weight, b.dtype))
    return b.op("Add", input, step, shape=b.shape)


@computes("addcmul")
def addcmul(b: Lowering, input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1) -> Tensor:
    product = b.op("Mul", b.tensor(tensor1, b.dtype), b.tensor(tensor2, b.dtype))
    if value != 1:
        product = b.op("Mul", product, value)
    return b.op("Add", input, product, shape=b.shape)


@computes("atan2", "logaddexp")
def pairwise(b: Lowering, input: Tensor, other: Tensor) -> Tensor:
    raise UnsupportedPattern("no ONNX operator")


@computes("diff")
def diff(
    b: Lowering, input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    """Each entry less the one before it, ``n`` times."""
    axis = b.axis(input, dim)
    parts = [x for x in (prepend, input, append) if x is not None]
    x = parts[0] if len(parts) == 1 else b.op("Concat", *(b.tensor(p, b.dtype) for p in parts), axis=axis)
    for _ in range(int(n)):
        later = b.op("Slice", x, b.ints([1]), b.ints([2**62]), b.ints([axis]))
        earlier = b.op("Slice", x, b.ints([0]), b.ints([-1]), b.ints([axis]))
        x = b.op("Sub", later, earlier)
    x.shape = b.shape
    return x
