"""Bounds through elementwise operators: monotone functions end by end, others by what is known of their range."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import onnx_ir as ir

from cipm_ir.runtime.intervals.arithmetic import Bounds, Interval, add, divide, multiply, negated
from cipm_ir.runtime.intervals.site import Site, bounds

Function = Callable[[Bounds], Bounds]
_INF = math.inf


# ---------------------------------------------------------------- one input, exact
@bounds("Identity", "Dropout")
def identity(site: Site) -> list[Interval | None]:
    """The input; unbounded for a Dropout that may be training."""
    training = site.const(2) if len(site.inputs) > 2 and site.has(2) else np.zeros(1, bool)
    if training is None or training.any():
        return [None] * len(site.node.outputs)
    return [site.of(0)] + [None] * (len(site.node.outputs) - 1)


@bounds("Neg")
def negative(site: Site) -> Interval:
    """-x."""
    return negated(site.of(0))


@bounds("Relu", "Floor", "Ceil", "Round", "Sign")
def exact_steps(site: Site) -> Interval:
    """Increasing, without rounding."""
    steps: dict[str, Function] = {
        "Relu": lambda e: np.maximum(e, 0.0),
        "Floor": np.floor,
        "Ceil": np.ceil,
        "Round": np.round,
        "Sign": np.sign,
    }
    return site.of(0).map(steps[site.node.op_type])


@bounds("Abs")
def absolute(site: Site) -> Interval:
    """|x|."""
    x = site.of(0)
    low = np.where(x.lo > 0, x.lo, np.where(x.hi < 0, -x.hi, 0.0))
    return Interval(low, x.largest)


@bounds("Cast", "CastLike")
def cast(site: Site) -> Interval | None:
    """To wide types rounded, to integers truncated; what may overflow or saturate is not followed."""
    target = ir.DataType(site.attr("to", site.node.outputs[0].dtype or ir.DataType.UNDEFINED))
    x = site.of(0)
    if target in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return x.rounded(site.p)
    if target == ir.DataType.BOOL:
        return Interval(np.zeros((1,) * x.rank), np.ones((1,) * x.rank))
    if target in (ir.DataType.INT64, ir.DataType.INT32) and float(x.largest.max(initial=0.0)) < 2**30:
        return x.map(np.trunc)
    return None


@bounds("Clip")
def clip(site: Site) -> Interval:
    """Between bounds that are constants, attributes (before opset 11) or computed."""
    out = site.of(0)
    for index, name, end in ((1, "min", -_INF), (2, "max", _INF)):
        if site.version < 11:
            limit = Interval.of(*[site.attr(name, end)] * 2)
        elif site.has(index):
            limit = site.of(index)
        else:
            continue
        join = np.maximum if name == "min" else np.minimum
        out = Interval.of(join(out.lo, limit.lo), join(out.hi, limit.hi))
    return out


@bounds("LeakyRelu", "PRelu")
def sloped(site: Site) -> Interval:
    """max(x, 0) + slope * min(x, 0), of which one is zero."""
    x = site.of(0)
    slope = site.of(1) if site.node.op_type == "PRelu" else Interval.point(np.float32(site.attr("alpha", 0.01)))
    below = multiply(x.map(lambda e: np.minimum(e, 0.0)), slope, site.p)
    return add(x.map(lambda e: np.maximum(e, 0.0)), below, site.p)


# ---------------------------------------------------------------- one input, approximated
def _elu(site: Site) -> Function | None:
    alpha = float(site.attr("alpha", 1.0))
    return None if alpha < 0 else lambda e: np.where(e > 0, e, alpha * np.expm1(np.minimum(e, 0)))


def _selu(site: Site) -> Function | None:
    alpha, gamma = float(site.attr("alpha", 1.67326319217681)), float(site.attr("gamma", 1.05070102214813))
    if alpha < 0 or gamma < 0:
        return None
    return lambda e: gamma * np.where(e > 0, e, alpha * np.expm1(np.minimum(e, 0)))


def _celu(site: Site) -> Function | None:
    alpha = float(site.attr("alpha", 1.0))
    return None if alpha <= 0 else lambda e: np.where(e > 0, e, alpha * np.expm1(np.minimum(e, 0) / alpha))


def _hard_sigmoid(site: Site) -> Function | None:
    alpha, beta = float(site.attr("alpha", 0.2)), float(site.attr("beta", 0.5))
    return None if alpha < 0 else lambda e: np.clip(alpha * e + beta, 0.0, 1.0)


def _thresholded(site: Site) -> Function | None:
    alpha = float(site.attr("alpha", 1.0))
    return None if alpha < 0 else lambda e: np.where(e > alpha, e, 0.0)


def _expit(e: Bounds) -> Bounds:
    small = np.exp(-np.abs(e))
    return np.asarray(np.where(e < 0, small, 1.0) / (1 + small))


def _erf(e: Bounds) -> Bounds:
    from scipy.special import erf  # takes longer to import than most models to bound

    return np.asarray(erf(e))


def _plain(function: Function) -> Callable[[Site], Function | None]:
    return lambda _: function


# name: the function, and the range of its results
_INCREASING: dict[str, tuple[Callable[[Site], Function | None], float, float]] = {
    "Sigmoid": (_plain(_expit), 0.0, 1.0),
    "Tanh": (_plain(np.tanh), -1.0, 1.0),
    "Erf": (_plain(_erf), -1.0, 1.0),
    "Softsign": (_plain(lambda e: np.where(np.isinf(e), np.sign(e), e / (1 + np.abs(e)))), -1.0, 1.0),
    "Softplus": (_plain(lambda e: np.logaddexp(0.0, e)), 0.0, _INF),
    "Atan": (_plain(np.arctan), -_INF, _INF),
    "Asinh": (_plain(np.arcsinh), -_INF, _INF),
    "Sinh": (_plain(np.sinh), -_INF, _INF),
    "Exp": (_plain(np.exp), 0.0, _INF),
    "Log": (_plain(lambda e: np.log(np.maximum(e, 0.0))), -_INF, _INF),
    "Sqrt": (_plain(lambda e: np.sqrt(np.maximum(e, 0.0))), 0.0, _INF),
    "Elu": (_elu, -_INF, _INF),
    "Selu": (_selu, -_INF, _INF),
    "Celu": (_celu, -_INF, _INF),
    "HardSigmoid": (_hard_sigmoid, 0.0, 1.0),
    "ThresholdedRelu": (_thresholded, 0.0, _INF),
}
_KEEP_ZERO = {"Tanh", "Erf", "Softsign", "Atan", "Asinh", "Sinh", "Sqrt", "Elu", "Selu", "Celu", "ThresholdedRelu"}


@bounds(*_INCREASING)
def increasing(site: Site) -> Interval | None:
    """f(lo) to f(hi)."""
    x = site.of(0)
    make, low, high = _INCREASING[site.node.op_type]
    function = make(site)
    if function is None:
        return None
    with np.errstate(all="ignore"):
        out = Interval.of(function(x.lo), function(x.hi)).loosened(site.p)
    out = out.within(low, high)
    return _with_zeros(x, out) if site.node.op_type in _KEEP_ZERO else out


def _with_zeros(x: Interval, out: Interval) -> Interval:
    """f(0) = 0, exactly, and f keeps the sign."""
    return Interval(np.where(x.lo == 0, 0.0, out.lo), np.where(x.hi == 0, 0.0, out.hi))


def _gelu(e: Bounds) -> Bounds:
    return 0.5 * e * (1 + _erf(e / math.sqrt(2)))


# x times a gate from 0 to 1: falls to a least value (rounded outward here) at the place given, then rises
_DIPPED: dict[str, tuple[Function, float, float]] = {
    "Gelu": (_gelu, -0.75179, -0.16998),
    "Swish": (lambda e: e * _expit(e), -1.27847, -0.27847),
    "Mish": (lambda e: e * np.tanh(np.logaddexp(0.0, e)), -1.19243, -0.30885),
    "HardSwish": (lambda e: e * np.clip(e / 6 + 0.5, 0.0, 1.0), -1.5, -0.37501),
}


@bounds(*_DIPPED)
def dipped(site: Site) -> Interval | None:
    """Between the values at the ends, and the least value where that lies between."""
    x = site.of(0)
    function, place, least = _DIPPED[site.node.op_type]
    if site.attr("alpha", 1.0) != 1.0:
        return None
    with np.errstate(all="ignore"):
        ends = [np.where(e == -np.inf, 0.0, function(e)) for e in (x.lo, x.hi)]
    low = np.where((x.lo <= place) & (x.hi >= place), least, np.minimum(*ends))
    out = Interval.of(low, np.maximum(*ends)).loosened(site.p)
    if site.attr("approximate", "none") == "tanh":  # within 5e-4 of the exact function
        out = Interval(out.lo - 1e-3, out.hi + 1e-3)
    return Interval(np.where(x.lo == 0, 0.0, out.lo), np.where((x.hi <= 0) & (x.lo == 0), 0.0, out.hi))


@bounds("Sin", "Cos")
def periodic(site: Site) -> Interval:
    """From -1 to 1."""
    one = np.ones((1,) * site.rank(0))
    return Interval(-one, one)


@bounds(
    "Not", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf", "Softmax"
)
def from_zero_to_one(site: Site) -> Interval:
    """A truth value or a share."""
    rank = len(site.out())
    high = np.ones((1,) * rank)
    return Interval(np.zeros((1,) * rank), high * (1 + 8 * site.p.eps))


@bounds("LogSoftmax")
def log_softmax(site: Site) -> Interval:
    """Not above zero."""
    none = Interval.unbounded(site.rank(0))
    return Interval(none.lo, np.full_like(none.lo, 8 * site.p.eps))


# ---------------------------------------------------------------- several inputs
@bounds("Add", "Sum", "Mean")
def added(site: Site) -> Interval:
    """Sums."""
    count = len(site.inputs)
    out = reduce(lambda a, b: add(a, b, site.p), [site.of(k) for k in range(count)])
    return out if site.node.op_type != "Mean" else divide(out, Interval.point(float(count)), site.p)


@bounds("Sub")
def subtracted(site: Site) -> Interval:
    """a - b."""
    return add(site.of(0), negated(site.of(1)), site.p)


@bounds("Mul")
def multiplied(site: Site) -> Interval:
    """a * b; not below zero for the square of one value."""
    out = multiply(site.of(0), site.of(1), site.p)
    if site.node.inputs[0] is site.node.inputs[1]:
        return Interval(np.maximum(out.lo, 0.0), out.hi)
    return out


def _whole(site: Site) -> bool:
    """Integer arithmetic, which truncates."""
    dtypes = [v.dtype for v in (*site.node.inputs, *site.node.outputs) if v is not None and v.dtype is not None]
    return any(d.is_integer() for d in dtypes)


@bounds("Div")
def divided(site: Site) -> Interval | None:
    """a / b."""
    return None if _whole(site) else divide(site.of(0), site.of(1), site.p)


@bounds("Reciprocal")
def reciprocal(site: Site) -> Interval:
    """1 / x."""
    return divide(Interval.point(1.0), site.of(0), site.p)


@bounds("Max", "Min")
def extremum(site: Site) -> Interval:
    """The larger (smaller) of all, by position."""
    join = np.maximum if site.node.op_type == "Max" else np.minimum
    every = [site.of(k) for k in range(len(site.inputs))]
    return Interval.of(reduce(join, [x.lo for x in every]), reduce(join, [x.hi for x in every]))


@bounds("Where")
def where(site: Site) -> Interval:
    """One branch or the other."""
    return site.of(1).hull(site.of(2))


@bounds("Pow")
def power(site: Site) -> Interval | None:
    """Whole powers, and any positive power of what is not negative."""
    x, exponent = site.of(0), site.const(1)
    if exponent is None or exponent.size != 1 or (d := float(exponent.reshape(()))) <= 0:
        return None
    even = d % 2 == 0
    if not even and d % 2 != 1 and (x.lo < 0).any():
        return None
    with np.errstate(over="ignore"):
        lo, hi = np.power(x.lo, d), np.power(x.hi, d)
    if even:
        lo, hi = np.where((x.lo <= 0) & (x.hi >= 0), 0.0, np.minimum(lo, hi)), np.maximum(lo, hi)
    return Interval.of(lo, hi).rounded(site.p, 8.0)
