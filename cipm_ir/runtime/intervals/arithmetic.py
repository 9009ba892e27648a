"""Interval arithmetic on arrays, rounded outward to what a run in a given element type may give.

The bounds of a value are two arrays of its rank; an axis along which they do not differ has size 1. An infinite bound
stands for a finite number of unknown size: 0 times unbounded is 0. Rounding is monotone, so a computed sum lies
between the computed sums of the bounds; exact zeros, and sums with them, stay exact.
Source: Moore, Kearfott, Cloud, Introduction to Interval Analysis, 2009; the error of a sum of n terms from Higham,
Accuracy and Stability of Numerical Algorithms, 2002, chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Bounds = npt.NDArray[np.float64]
Letters = Sequence[str | None]
_BLOCK = 1 << 22
MANY = 1 << 16
"""Terms assumed in the rounding error of a mean over an axis of unknown size."""


@dataclass(frozen=True)
class Precision:
    """Relative error of one operation, and the smallest normal number (what is below may be flushed to zero)."""

    eps: float
    tiny: float


_PRECISION = {
    ir.DataType.DOUBLE: Precision(2.0**-51, 2.0**-1022),  # one bit more: the bounds themselves are computed in double
    ir.DataType.FLOAT16: Precision(2.0**-10, 2.0**-14),
    ir.DataType.BFLOAT16: Precision(2.0**-7, 2.0**-126),
}
SINGLE = Precision(2.0**-23, 2.0**-126)
REAL = Precision(0.0, 0.0)
"""No rounding at all: what the graph computes in real arithmetic."""


def precision_of(dtype: ir.DataType | None) -> Precision:
    """Precision of an element type; that of float32 where the type is another or unknown."""
    return SINGLE if dtype is None else _PRECISION.get(dtype, SINGLE)


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """``lo`` and ``hi``: arrays of equal shape, ``lo <= hi``, without NaN; ``lo`` is never +inf, ``hi`` never -inf."""

    lo: Bounds
    hi: Bounds

    @classmethod
    def of(cls, lo: Any, hi: Any) -> Interval:
        """Bounds, with the infinite bound in the place of what is not a number."""
        low, high = np.broadcast_arrays(np.asarray(lo, np.float64), np.asarray(hi, np.float64))
        bad_low, bad_high = np.isnan(low) | (low == np.inf), np.isnan(high) | (high == -np.inf)
        if bad_low.any() or bad_high.any():
            bad = np.isnan(low) | np.isnan(high)
            low, high = np.where(bad_low | bad, -np.inf, low), np.where(bad_high | bad, np.inf, high)
        return cls(low, high)

    @classmethod
    def point(cls, array: Any, *, wide: bool = True) -> Interval:
        """A known array; not ``wide``: a float32 array stays one, for `contract` alone, which reads it in blocks."""
        given = np.asarray(array)
        if wide or given.dtype != np.float32:
            given = given.astype(np.float64)
        return cls(given, given) if np.isfinite(given).all() else cls.of(given, given)

    @classmethod
    def unbounded(cls, rank: int) -> Interval:
        """Nothing is known."""
        return cls(np.full((1,) * rank, -np.inf), np.full((1,) * rank, np.inf))

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.lo.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along each axis: 1 or that of the value."""
        return self.lo.shape

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """Where the value is exactly zero."""
        return np.asarray(self.lo == 0) if self.lo is self.hi else np.asarray((self.lo == 0) & (self.hi == 0))

    @property
    def known(self) -> bool:
        """Whether every entry is a single number."""
        return self.lo is self.hi or bool((self.lo == self.hi).all())

    @property
    def largest(self) -> Bounds:
        """Bound of the absolute value."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))

    def map(self, move: Callable[[Bounds], Bounds]) -> Interval:
        """The same rearrangement of both bounds."""
        lo = move(self.lo)
        return Interval(lo, lo if self.hi is self.lo else move(self.hi))

    def merged(self, axes: Iterable[int]) -> Interval:
        """One bound for all positions along some axes, which keep size 1."""
        gone = tuple(a for a in axes if self.lo.shape[a] != 1)
        if not gone:
            return self
        if not self.lo.size:  # a slice of nothing, which no number leaves
            none = np.zeros([1 if a in gone else n for a, n in enumerate(self.lo.shape)], self.lo.dtype)
            return Interval(none, none)
        return Interval(self.lo.min(axis=gone, keepdims=True), self.hi.max(axis=gone, keepdims=True))

    def hull(self, *others: Interval) -> Interval:
        """What holds for this or another value, by position."""
        every = (self, *others)
        return Interval(reduce(np.minimum, [x.lo for x in every]), reduce(np.maximum, [x.hi for x in every]))

    def within(self, low: float, high: float) -> Interval:
        """Cut to a range that the value is known to lie in."""
        return Interval(np.clip(self.lo, low, high), np.clip(self.hi, low, high))

    def rounded(self, p: Precision, ulps: float = 1.0) -> Interval:
        """Widened by the error of an operation that keeps the sign; zeros stay."""
        if not p.eps:
            return self
        return Interval(_down(self.lo, p, ulps), -_down(-self.hi, p, ulps))

    def loosened(self, p: Precision, ulps: float = 8.0) -> Interval:
        """Widened by the error of an approximated function, relative to one or to the value if that is larger."""
        with np.errstate(invalid="ignore"):
            return Interval(
                self.lo - ulps * p.eps * (1 + np.where(np.isinf(self.lo), 0, np.abs(self.lo))),
                self.hi + ulps * p.eps * (1 + np.where(np.isinf(self.hi), 0, np.abs(self.hi))),
            )


def _down(x: Bounds, p: Precision, ulps: float) -> Bounds:
    low = x - ulps * (p.eps * np.abs(np.where(np.isinf(x), 0, x)) + p.tiny)
    return np.where(x == 0, 0.0, np.where(x > 0, np.maximum(low, 0.0), low))


# ---------------------------------------------------------------- elementwise
def add(a: Interval, b: Interval, p: Precision) -> Interval:
    """a + b; exact where one of them is exactly zero."""
    return Interval(_add_low(a.lo, b.lo, p), -_add_low(-a.hi, -b.hi, p))


def _add_low(a: Bounds, b: Bounds, p: Precision) -> Bounds:
    total = a + b
    return total if not p.eps else np.where((a == 0) | (b == 0), total, _down(total, p, 1.0))


def negated(a: Interval) -> Interval:
    """-a."""
    return Interval(-a.hi, -a.lo)


def multiply(a: Interval, b: Interval, p: Precision) -> Interval:
    """a * b."""
    ends = [_product(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Interval.of(reduce(np.minimum, ends), reduce(np.maximum, ends)).rounded(p)


def _product(x: Bounds, y: Bounds) -> Bounds:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((x == 0) | (y == 0), 0.0, x * y)


def divide(a: Interval, b: Interval, p: Precision) -> Interval:
    """a / b; unbounded where b may be zero."""
    safe = (b.lo > 0) | (b.hi < 0)
    lo, hi = np.where(safe, b.lo, 1.0), np.where(safe, b.hi, 1.0)
    with np.errstate(invalid="ignore", over="ignore"):
        ends = [np.where(x == 0, 0.0, x / y) for x in (a.lo, a.hi) for y in (lo, hi)]
    low, high = np.stack(ends).min(axis=0), np.stack(ends).max(axis=0)
    return Interval.of(np.where(safe, low, -np.inf), np.where(safe, high, np.inf)).rounded(p)


def total(x: Interval, sizes: Mapping[int, int | None], p: Precision) -> Interval:
    """Sum over axes of these sizes (None: unknown), which keep size 1."""
    full = tuple(a for a in sizes if x.shape[a] != 1)
    counts = [sizes[a] for a in sizes if x.shape[a] == 1]
    terms = math.prod(MANY if n is None else n for n in sizes.values())
    lo, hi = x.lo.sum(axis=full, keepdims=True), x.hi.sum(axis=full, keepdims=True)
    size = [np.abs(e).sum(axis=full, keepdims=True) for e in (x.lo, x.hi)]
    return _repeated(lo, hi, size[0], size[1], counts, terms, p)


def mean(x: Interval, sizes: Mapping[int, int | None], p: Precision) -> Interval:
    """Mean over axes of these sizes (None: unknown), which keep size 1."""
    full = tuple(a for a in sizes if x.shape[a] != 1)
    terms = math.prod(MANY if n is None else n for n in sizes.values())
    lo, hi = x.lo.mean(axis=full, keepdims=True), x.hi.mean(axis=full, keepdims=True)
    size = [np.abs(e).mean(axis=full, keepdims=True) for e in (x.lo, x.hi)]
    return _with_error(lo, hi, size[0], size[1], terms, p)


def _repeated(
    lo: Bounds, hi: Bounds, low_size: Bounds, high_size: Bounds, counts: Sequence[int | None], terms: int, p: Precision
) -> Interval:
    """A sum of as many equal intervals as ``counts`` say, with its rounding error."""
    if any(n is None for n in counts):
        return Interval.of(np.where(lo < 0, -np.inf, 0.0), np.where(hi > 0, np.inf, 0.0))
    n = float(math.prod(c for c in counts if c is not None))
    return _with_error(lo * n, hi * n, low_size * n, high_size * n, terms, p)


def _with_error(lo: Bounds, hi: Bounds, low_size: Bounds, high_size: Bounds, terms: int, p: Precision) -> Interval:
    def error(size: Bounds) -> Bounds:
        finite = np.where(np.isinf(size), 0.0, size)
        return np.where(finite > 0, (terms + 2) * (p.eps * finite + p.tiny), 0.0)

    return Interval.of(lo - error(low_size), hi + error(high_size))


# ---------------------------------------------------------------- contractions
def contract(
    a: Interval, b: Interval, left: Letters, right: Letters, out: Letters, sizes: Mapping[str, int | None], p: Precision
) -> Interval:
    """Sum of products, Einstein's way: axes by letters, those missing in ``out`` are summed over; None: of size 1.

    ``sizes``: per letter, None where unknown. Exact for a known operand, coarse (by absolute values) for two unknown.
    """
    summed = [x for x in dict.fromkeys([*left, *right]) if x is not None and x not in out]
    terms = math.prod(MANY if sizes[x] is None else (sizes[x] or 0) for x in summed)
    first, first_letters = _squeezed(a, left)
    second, second_letters = _squeezed(b, right)
    if first.known and not second.known:
        first, first_letters, second, second_letters = second, second_letters, first, first_letters
    present = {*first_letters, *second_letters}
    counts = [sizes[x] for x in summed if x not in present]
    kept = [x for x in out if x is not None and x in present]
    run = _Products(first_letters, second_letters, kept)
    parts = _by_known(first, second.lo, run) if second.known else _by_size(first, second, run)
    made = _repeated(*parts, counts, terms, p)
    gaps = tuple(k for k, x in enumerate(out) if x is None or x not in present)
    return made.map(lambda e: np.expand_dims(e, gaps))


def _squeezed(x: Interval, letters: Letters) -> tuple[Interval, list[str]]:
    """Without the axes along which the bounds do not differ."""
    gone = tuple(k for k, name in enumerate(letters) if name is None or x.shape[k] == 1)
    return x.map(lambda e: e.squeeze(gone)), [n for k, n in enumerate(letters) if n is not None and k not in gone]


@dataclass
class _Products:
    """The contraction of a stack of arrays with a function of one array, which is read in blocks to save memory."""

    left: list[str]
    right: list[str]
    out: list[str]

    def __call__(self, stack: Bounds, array: Bounds, *functions: Callable[[Bounds], Bounds]) -> list[Bounds]:
        axes = [k for k, x in enumerate(self.right) if x in self.out and x not in self.left]
        if array.size <= _BLOCK or not axes:
            return [self._run(stack, f(np.asarray(array, np.float64))) for f in functions]
        axis = max(axes, key=lambda k: array.shape[k])
        step = max(1, _BLOCK * array.shape[axis] // array.size)
        cuts = range(step, array.shape[axis], step)
        parts = [self(stack, part, *functions) for part in _split(array, list(cuts), axis)]
        place = 1 + self.out.index(self.right[axis])
        return [np.concatenate(same, axis=place) for same in zip(*parts, strict=True)]

    def _run(self, stack: Bounds, array: Bounds) -> Bounds:
        number = {x: k + 1 for k, x in enumerate(dict.fromkeys([*self.left, *self.right]))}
        left, right, out = ([number[x] for x in part] for part in (self.left, self.right, self.out))
        terms: list[Any] = [stack, [0, *left], array, right, [0, *out]]
        return np.asarray(np.einsum(*terms, optimize=True))


def _split(array: Bounds, cuts: Sequence[int], axis: int) -> list[Bounds]:
    return [np.asarray(part) for part in np.array_split(array, cuts, axis=axis)]


Parts = tuple[Bounds, Bounds, Bounds, Bounds]


def _by_known(x: Interval, weight: Bounds, run: _Products) -> Parts:
    """Bounds of x contracted with numbers, and the sums of absolute values of the terms of each bound."""
    x = Interval(np.asarray(x.lo, np.float64), np.asarray(x.hi, np.float64))
    lost = (np.isinf(x.lo), np.isinf(x.hi))
    if lost[0].all() and lost[1].all():
        (reached,) = run(np.ones((1, *x.shape)), weight, np.abs)
        zero = np.zeros_like(reached[0])
        return np.where(reached[0] > 0, -np.inf, 0.0), np.where(reached[0] > 0, np.inf, 0.0), zero, zero
    lo, hi = np.where(lost[0], 0.0, x.lo), np.where(lost[1], 0.0, x.hi)
    stack = [lo, hi, np.abs(lo), np.abs(hi)]
    unlimited = bool(lost[0].any() or lost[1].any())
    if unlimited:
        stack += [lost[0].astype(np.float64), lost[1].astype(np.float64)]
    plus, minus = run(np.stack(stack), weight, lambda w: np.maximum(w, 0.0), lambda w: np.maximum(-w, 0.0))
    low, high = plus[0] - minus[1], plus[1] - minus[0]
    if unlimited:
        low = np.where(plus[4] + minus[5] > 0, -np.inf, low)
        high = np.where(plus[5] + minus[4] > 0, np.inf, high)
    return low, high, plus[2] + minus[3], plus[3] + minus[2]


def _by_size(a: Interval, b: Interval, run: _Products) -> Parts:
    """Bounds from absolute values; not below zero where neither operand is."""
    sizes = (a.largest, b.largest)
    lost = (np.isinf(sizes[0]), np.isinf(sizes[1]))
    x, y = np.where(lost[0], 1.0, sizes[0]), np.where(lost[1], 1.0, sizes[1])
    stack = np.stack([x, lost[0].astype(np.float64)])
    most, hit = run(stack, y, np.asarray)[0]
    hit = hit + run(x[None], lost[1].astype(np.float64), np.asarray)[0][0]
    high = np.where(hit > 0, np.inf, most)
    low = np.zeros_like(high) if (a.lo >= 0).all() and (b.lo >= 0).all() else -high
    return low, high, np.where(low == 0, 0.0, most), most
