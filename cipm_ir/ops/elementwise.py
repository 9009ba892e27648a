"""Elementwise operators: labels pass, inputs that meet are tied, each activation says which scalings it admits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import ZERO, Array, Factor, State, alike
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.registry import operator


# ---------------------------------------------------------------- one input
@operator("Identity", elementwise=True, moves=True)
@operator("Dropout", elementwise=True, shifts=True)
@operator("Neg", elementwise=True, linear=True)
def linear(op: OpContext) -> None:
    """f(-x) = -f(x), f(ax) = a f(x): every scaling and sign passes. Dropout in training draws per position."""
    if op.node.op_type == "Dropout" and op.has(2):
        training = op.const(2)
        if training is None or training.any():
            raise UnsupportedPattern("Dropout in training mode")
    op.like(0, op.state(0))
    if len(op.node.outputs) > 1:
        op.like(1, State(op.state(0).shape, tuple(fixed(f) for f in op.state(0).factors)))


_REAL = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@operator("Cast", "CastLike", elementwise=True)
def cast(op: OpContext) -> None:
    """To a wide floating type linear (up to rounding); to integers, booleans and 8-bit floats nothing but permutations.

    Whether the source is a floating type does not matter: integers are never scaled in the first place.
    """
    state = op.state(0)
    target = op.attr("to")
    if target is None:  # CastLike
        known = [v.dtype for v in (op.node.outputs[0], op.node.inputs[1]) if v is not None and v.dtype is not None]
        target = known[0] if known else ir.DataType.UNDEFINED
    if ir.DataType(target) not in _REAL:
        op.freeze(state)
    op.like(0, state)


@operator("Relu", "LeakyRelu", elementwise=True)
def homogeneous(op: OpContext) -> None:
    """f(ax) = a f(x) for a > 0 only."""
    op.freeze(op.state(0), scale=False)
    op.like(0, op.state(0))


@operator(
    "Tanh", "Sin", "Erf", "Softsign", "Asinh", "Atan", "Sinh", "Tan", "Asin", "Atanh", "Round", "Shrink",
    elementwise=True,
)  # fmt: skip
def odd(op: OpContext) -> None:
    """f(-x) = -f(x): signs pass, scalings do not. (Round is to even, hence odd.)"""
    op.freeze(op.state(0), sign=False)
    op.like(0, op.state(0))


@operator("Sign", elementwise=True)
def sign_of(op: OpContext) -> None:
    """sign(ax) = sign(x) for a > 0: scalings end, signs pass."""
    state = op.state(0)
    factors = []
    for f in state.factors:
        var = op.rec.variable()
        op.rec.zero(f.labels, var, sign=False)
        op.rec.equate(f.labels, ((var, 1), (f.scale_var, 1)), scale=False)
        factors.append(Factor(f.axes, f.labels, var, f.repeats))
    op.like(0, State(state.shape, tuple(factors)))


@operator("Abs", elementwise=True)
def absolute(op: OpContext) -> None:
    """|ax| = |a||x|: scalings pass, signs end."""
    state = op.state(0)
    op.like(0, State(state.shape, tuple(op.scaled(f, 1, sign=False) for f in state.factors)))


@operator("Cos", "Cosh", elementwise=True)
def even(op: OpContext) -> None:
    """f(-x) = f(x): signs end, scalings do not pass."""
    state = op.state(0)
    op.freeze(state, sign=False)
    op.like(0, State(state.shape, tuple(fixed(f) for f in state.factors)))


@operator("Reciprocal", elementwise=True)
def reciprocal(op: OpContext) -> None:
    """1/(ax) = (1/a)(1/x)."""
    state = op.state(0)
    op.like(0, State(state.shape, tuple(op.scaled(f, -1, sign=True) for f in state.factors)))


@operator("Sqrt", elementwise=True)
def square_root(op: OpContext) -> None:
    """sqrt(a^2 x) = a sqrt(x): the input's log-scale is twice the output's."""
    state = op.state(0)
    factors = []
    for f in state.factors:
        var = op.rec.variable()
        op.rec.equate(f.labels, ((f.scale_var, 1), (var, -2)), sign=False)
        op.freeze_factor(f, scale=False)
        op.rec.zero(f.labels, var, scale=False)
        factors.append(Factor(f.axes, f.labels, var, f.repeats))
    op.like(0, State(state.shape, tuple(factors)))


@operator(
    "Sigmoid", "Gelu", "Swish", "Elu", "Selu", "Celu", "Softplus", "HardSigmoid", "HardSwish", "Mish", "Exp", "Log",
    "ThresholdedRelu", "Floor", "Ceil", "Acos", "Acosh", "Not", "IsNaN", "IsInf", "BitwiseNot",
    elementwise=True,
)  # fmt: skip
def pointwise(op: OpContext) -> None:
    """Any other function of one element: permutations only."""
    state = op.state(0)
    op.freeze(state)
    op.like(0, State(state.shape, tuple(fixed(f) for f in state.factors)))


@operator("Clip", elementwise=True)
def clip(op: OpContext) -> None:
    """Scalar bounds: permutations; signs where they are symmetric; scalings where each is 0 or infinite.

    Bounds are attributes before opset 11. A bound is a scalar by the specification, so it never carries labels.
    """
    state = op.state(0)
    bounds: list[float | None] = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        if op.version < 11:
            bounds.append(float(op.attr(name, default)))
        elif not op.has(index):
            bounds.append(default)
        else:
            const = op.const(index)
            bounds.append(None if const is None or const.size != 1 else float(const.reshape(())))
            op.pin(op.optional(index), "bound of Clip")
    lo, hi = bounds
    scales = all(b is not None and (b == 0 or np.isinf(b)) for b in bounds)
    signs = lo is not None and hi is not None and lo == -hi
    op.freeze(state, scale=not scales, sign=not signs)
    op.like(0, state)


@operator("PRelu", elementwise=True)
def prelu(op: OpContext) -> None:
    """max(x, 0) + slope * min(x, 0): positive scaling; the slope permutes along, and is never scaled."""
    x, slope = op.state(0), op.state(1)
    out = broadcast(op, [x, slope], "PRelu")
    op.freeze(slope)
    op.freeze(x, scale=False)
    factors = [Factor(f.axes, f.labels, var_on(x, op.shape(), f.axes), f.repeats) for f in out.factors]
    op.like(0, State(out.shape, tuple(factors)))


# ---------------------------------------------------------------- several inputs
def shifted(state: State, rank: int) -> State:
    """Return the state with leading axes of size 1 added."""
    d = rank - state.rank
    if d == 0:
        return state
    factors = tuple(Factor(tuple(a + d for a in f.axes), f.labels, f.scale_var, f.repeats) for f in state.factors)
    return State((1,) * d + state.shape, factors, frozenset(range(d)) | {a + d for a in state.uniform})


def var_on(state: State, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Scale variable of an input on exactly these output axes, ZERO where it has none."""
    moved = shifted(state, len(shape))
    for f in moved.factors:
        if f.axes == axes:
            return f.scale_var
    return ZERO


def broadcast(op: OpContext, states: list[State], what: str, inputs: Sequence[int | None] | None = None) -> State:
    """Align inputs from the right, tie what meets, pin what meets a fixed axis. Output factors carry no scale.

    Of factors over nested sets of axes, the finer goes on; the coarser is tied to its blocks. ``inputs``: which inputs
    of the node these are (by default the first ones), None for what is not an input as it came in.
    """
    shape = op.shape()
    moved = [shifted(s, len(shape)) for s in states]
    out: list[Factor] = []
    for f in sorted((f for s in moved for f in s.factors), key=lambda f: -len(f.axes)):  # the finest first
        _join(op, f, out)
    for index, original, s in zip(inputs or range(len(states)), states, moved, strict=True):
        for f in list(out):
            for a in f.axes:
                if index is not None and s.broadcasts(a) and a >= s.rank - original.rank:
                    op.note_uniform_operand(index, a - s.rank + original.rank, f, a)
            blind = tuple(a for a in f.axes if not s.broadcasts(a) and s.factor_of(a) is None)
            if blind:
                op.rec.pin(op.rec.marginal(f, blind).labels, f"{what} with a value that is fixed along this axis")
                if blind == f.axes:
                    out.remove(f)  # fixed from here on
    return State(shape, tuple(fixed(f) for f in out), alike(moved, shape))


def _join(op: OpContext, f: Factor, out: list[Factor]) -> None:
    for g in out:
        common = tuple(a for a in f.axes if a in g.axes)
        if not common:
            continue
        op.rec.unify(op.rec.marginal(f, common).labels, op.rec.marginal(g, common).labels)
        if common == f.axes:
            return
        raise UnsupportedPattern("labels over overlapping axes meet")
    out.append(f)


def _scale_terms(states: list[State], shape: tuple[int, ...], f: Factor) -> list[int | None]:
    """Variable of each input on ``f``'s axes; None where the input broadcasts along all of them."""
    terms: list[int | None] = []
    for s in states:
        moved = shifted(s, len(shape))
        own = [g for g in moved.factors if g.axes == f.axes]
        if own:
            terms.append(own[0].scale_var)
        elif all(moved.broadcasts(a) for a in f.axes):
            terms.append(None)
        else:
            terms.append(ZERO)
    return terms


def _freeze_partial(op: OpContext, states: list[State], out: State) -> None:
    """Factors whose axes are not an output factor's carry no scale."""
    kept = {f.axes for f in out.factors}
    for s in states:
        d = len(out.shape) - s.rank
        for f in s.factors:
            if tuple(a + d for a in f.axes) not in kept:
                op.freeze_factor(f)


def _neutral(const: Array | None) -> tuple[bool, bool]:
    """Return whether scalings, and signs, leave a constant as it is."""
    if const is None:
        return False, False
    zero = not const.any()
    return zero or bool(((const == 0) | np.isinf(const)).all()), zero


def additive(op: OpContext, states: list[State], out: State, *, signs: bool, first: int = 0) -> None:
    """Inputs number ``first`` on scale alike; one without the axis must be a constant that scaling does not change."""
    _freeze_partial(op, states, out)
    factors = []
    for f in out.factors:
        terms = _scale_terms(states, out.shape, f)
        var = next((t for t in terms if t is not None), ZERO)
        for index, term in enumerate(terms, start=first):
            if term is None:
                scale, sign = _neutral(op.const(index))
                op.rec.zero(f.labels, var, scale=not scale, sign=not sign)
            elif term == ZERO:
                op.rec.zero(f.labels, var)
            else:
                op.rec.same(f.labels, var, term)
        if not signs:
            op.rec.zero(f.labels, var, scale=False)
        factors.append(Factor(f.axes, f.labels, var, f.repeats))
    op.like(0, State(out.shape, tuple(factors)))


@operator("Add", "Sub", "Sum", "Mean", elementwise=True)
def add(op: OpContext) -> None:
    """Sums: one scale and sign for all terms."""
    states = [op.state(k) for k in range(len(op.node.inputs))]
    additive(op, states, broadcast(op, states, op.node.op_type), signs=True)


@operator("Max", "Min", elementwise=True)
def extremum(op: OpContext) -> None:
    """max(ax, ay) = a max(x, y) for a > 0."""
    states = [op.state(k) for k in range(len(op.node.inputs))]
    additive(op, states, broadcast(op, states, op.node.op_type), signs=False)


@operator("Where", elementwise=True)
def where(op: OpContext) -> None:
    """The condition permutes along, the branches scale alike."""
    condition, x, y = op.state(0), op.state(1), op.state(2)
    op.freeze(condition)
    additive(op, [x, y], broadcast(op, [condition, x, y], "Where"), signs=True, first=1)


@operator("Mul", "Div", elementwise=True)
def multiply(op: OpContext) -> None:
    """Log-scales add (subtract); a factor without the axis is no constraint."""
    multiplied(op, [op.state(0), op.state(1)])


def multiplied(op: OpContext, states: list[State]) -> None:
    """Set the output to a product (a quotient) of the two inputs."""
    minus = -1 if op.node.op_type == "Div" else 1
    out = broadcast(op, states, op.node.op_type)
    _freeze_partial(op, states, out)  # a coarser partner is tied to blocks, which carry no scale
    factors = []
    for f in out.factors:
        terms = _scale_terms(states, out.shape, f)
        a, b = (ZERO if t is None else t for t in terms)
        if b == ZERO:
            var = a
        elif a == ZERO and minus == 1:
            var = b
        else:
            var = op.rec.variable()
            op.rec.equate(f.labels, ((var, 1), (a, -1), (b, -minus)))
        factors.append(Factor(f.axes, f.labels, var, f.repeats))
    op.like(0, State(out.shape, tuple(factors)))


@operator("Pow", elementwise=True)
def power(op: OpContext) -> None:
    """x^d for a constant whole d: log-scale times d, the sign kept for odd d; permutations otherwise."""
    x, exponent = op.state(0), op.state(1)
    degree = op.const(1)
    if degree is not None and degree.size == 1 and float(degree.reshape(())).is_integer():
        d = int(degree.reshape(()))
        op.pin(exponent, "exponent of Pow")
        x = shifted(x, len(op.shape()))
        op.like(0, State(op.shape(), tuple(op.scaled(f, d, sign=d % 2 == 1) for f in x.factors)))
        return
    op.freeze(x)
    op.freeze(exponent)
    op.like(0, broadcast(op, [x, exponent], "Pow"))


@operator("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", elementwise=True)
def order(op: OpContext) -> None:
    """ax < ay where x < y, for a > 0; ax = ay where x = y, for any a: what both sides share ends here."""
    states = [op.state(0), op.state(1)]
    out = broadcast(op, states, op.node.op_type)
    additive(op, states, out, signs=op.node.op_type == "Equal")
    op.like(0, out)


@operator("And", "Or", "Xor", "Mod", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", elementwise=True)
def compare(op: OpContext) -> None:
    """Functions of two elements: permutations only."""
    states = [op.state(0), op.state(1)]
    for s in states:
        op.freeze(s)
    op.like(0, broadcast(op, states, op.node.op_type))
