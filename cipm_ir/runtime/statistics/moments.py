"""Sums over rows that can be taken batch by batch and added: moments, extremes, joint firing, lagged products.

Rows are samples of a vector of units, (rows, size). Every class here is a *part*: it takes rows, ``a + b`` is what the
rows of both would have given, and `state` gives the arrays that it can be restored from. Sums are kept in float64
about the running mean and merged by the update of Chan, Golub and LeVeque (Algorithms for computing the sample
variance, 1983), so that a mean that is large against the spread costs no digits. Products are taken in float64 as well,
a few thousand rows at a time: however the same rows are cut, sums agree to some 1e-14 of the variances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]

_ENTRIES = 1 << 22
"""Entries of a chunk of rows: 32 MB in float64."""
_BLOCK = 256
"""Rows of a large matrix that are updated at a time, so that no temporary is as large as the matrix."""


@dataclass
class MergeableStatistic:
    """What a batch of rows is added to: numbers and arrays, the fields of a dataclass."""

    def __add__(self, other: Any) -> Any:
        """Return what the rows of both would have given."""
        raise NotImplementedError

    def state(self) -> dict[str, Array]:
        """Plain arrays from which `restore` makes an equal part."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def restore(cls, state: Mapping[str, Array]) -> Self:
        """Return the part that gave this state."""
        return cls(**{f.name: int(state[f.name]) if f.type in ("int", int) else state[f.name] for f in fields(cls)})


def chunks(rows: Array) -> Iterator[Array]:
    """Yield rows in pieces of bounded size, as float64: copies, which may be overwritten."""
    step = min(max(_ENTRIES // max(rows.shape[1], 1), 64), 16384)
    for start in range(0, len(rows), step):
        yield rows[start : start + step].astype(np.float64)


def centred(rows: Floats) -> tuple[Floats, Floats]:
    """Return the mean, and the rows minus it, in their place; equal rows give zeros without any rounding."""
    if len(rows) == 0:
        return np.zeros(rows.shape[1]), rows
    first = rows[0].copy()
    rows -= first
    mean = np.full(len(rows), 1.0 / len(rows)) @ rows
    rows -= mean
    return first + mean, rows


def check_squares(squares: Floats) -> None:
    """Raise `InputError`: sums of squares of activations do not fit into float64."""
    if not np.isfinite(squares).all():
        raise InputError("The squares of the activations are above what float64 holds; scale the data down.")


def add_outer(matrix: Floats, a: Floats, b: Floats, weight: float) -> None:
    """``matrix += weight * outer(a, b)``, a block of rows at a time."""
    for start in range(0, len(matrix), _BLOCK):
        matrix[start : start + _BLOCK] += np.multiply.outer(weight * a[start : start + _BLOCK], b)


def same_size(a: int, b: int) -> None:
    """Raise `InputError` where parts of different sizes are added."""
    if a != b:
        raise InputError(f"Statistics of {a} and of {b} units cannot be added; collect them from the same model.")


@dataclass
class Moments(MergeableStatistic):
    """Count, mean and centred second moments of rows.

    Attributes:
        count: rows so far.
        mean: (size,).
        spread: sum of (x - mean)(x - mean)^T, (size, size); or its diagonal only, (size,).
    """

    count: int
    mean: Floats
    spread: Floats

    @classmethod
    def zero(cls, size: int, *, full: bool = True) -> Moments:
        """Of no rows; ``full``: with the products of all pairs of units."""
        return cls(0, np.zeros(size), np.zeros((size, size) if full else size))

    @property
    def size(self) -> int:
        """How many units."""
        return len(self.mean)

    @property
    def full(self) -> bool:
        """Whether the products of all pairs are here."""
        return self.spread.ndim == 2

    def update(self, rows: Array) -> None:
        """Take in rows, (rows, size)."""
        same_size(self.size, rows.shape[1])
        for chunk in chunks(rows):
            with np.errstate(over="ignore", invalid="ignore"):
                mean, around = centred(chunk)
                products = around.T @ around if self.full else np.einsum("ij,ij->j", around, around)
            check_squares(np.diagonal(products) if self.full else products)
            self._join(len(chunk), mean, products)

    def _join(self, count: int, mean: Floats, spread: Array) -> None:
        total = self.count + count
        if not count:
            return
        step = mean - self.mean
        weight = self.count * count / total
        self.spread += spread
        if self.full and self.count:
            add_outer(self.spread, step, step, weight)
        elif self.count:
            self.spread += weight * step * step
        self.mean = self.mean + step * (count / total)
        self.count = total

    def __add__(self, other: Moments) -> Moments:
        same_size(self.size, other.size)
        if self.full != other.full:
            raise InputError("Statistics with and without the products of all pairs of units cannot be added.")
        out = Moments(self.count, self.mean.copy(), self.spread.copy())
        out._join(other.count, other.mean, other.spread)
        return out

    @property
    def variance(self) -> Floats:
        """(size,): mean squared distance from the mean, divided by the count (not count - 1)."""
        diagonal = np.diagonal(self.spread) if self.full else self.spread
        return np.asarray(diagonal / max(self.count, 1))

    @property
    def covariance(self) -> Floats:
        """(size, size), divided by the count."""
        return self.spread / max(self.count, 1)

    @property
    def second(self) -> Floats:
        """The second moment E[x x^T], (size, size); E[x²], (size,), where only the diagonal was kept."""
        if not self.full:
            return self.variance + self.mean**2
        out = self.covariance
        add_outer(out, self.mean, self.mean, 1.0)
        return out

    @property
    def bordered(self) -> Floats:
        """E[u u^T] for u = (x, 1): (size + 1, size + 1), what a least-squares fit with a bias needs."""
        out = np.ones((self.size + 1, self.size + 1))
        out[:-1, :-1] = self.second
        out[:-1, -1] = out[-1, :-1] = self.mean
        return out


def normalized(products: Floats, variance: Floats, other: Floats | None = None) -> Floats:
    """Covariances divided by the standard deviations; 0 where one of them is 0."""
    left, right = (_inverse_root(v) for v in (variance, variance if other is None else other))
    return np.asarray(np.clip(products * left[:, None] * right, -1.0, 1.0))


def _inverse_root(variance: Floats) -> Floats:
    root = np.sqrt(np.maximum(variance, 0.0))
    return np.asarray(np.divide(1.0, root, out=np.zeros_like(root), where=root > 0))


@dataclass
class Marginals(MergeableStatistic):
    """Per unit: how often it is above zero, its smallest and its largest value."""

    count: int
    positive: npt.NDArray[np.int64]
    minimum: Floats
    maximum: Floats

    @classmethod
    def zero(cls, size: int) -> Marginals:
        """Of no rows."""
        return cls(0, np.zeros(size, np.int64), np.full(size, np.inf), np.full(size, -np.inf))

    def update(self, rows: Array) -> None:
        """Take in rows, (rows, size)."""
        same_size(len(self.positive), rows.shape[1])
        if len(rows):
            self.count += len(rows)
            self.positive = self.positive + np.count_nonzero(rows > 0, axis=0)
            self.minimum = np.minimum(self.minimum, rows.min(axis=0))
            self.maximum = np.maximum(self.maximum, rows.max(axis=0))

    def __add__(self, other: Marginals) -> Marginals:
        same_size(len(self.positive), len(other.positive))
        return Marginals(
            self.count + other.count,
            self.positive + other.positive,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )


@dataclass
class Cofiring(MergeableStatistic):
    """How often two units are above zero together: counts, (size, size)."""

    count: int
    together: Floats

    @classmethod
    def zero(cls, size: int) -> Cofiring:
        """Of no rows."""
        return cls(0, np.zeros((size, size)))

    def update(self, rows: Array) -> None:
        """Take in rows, (rows, size)."""
        same_size(len(self.together), rows.shape[1])
        for chunk in chunks(rows):
            fires = (chunk > 0).astype(np.float32)
            self.together += fires.T @ fires  # exact: a chunk has fewer than 2^24 rows
            self.count += len(chunk)

    def __add__(self, other: Cofiring) -> Cofiring:
        same_size(len(self.together), len(other.together))
        return Cofiring(self.count + other.count, self.together + other.together)

    @property
    def phi(self) -> Floats:
        """Pearson's correlation of the two events, (size, size); 0 for a unit that fires always or never."""
        rate = np.diagonal(self.together) / max(self.count, 1)
        return normalized(self.together / max(self.count, 1) - np.outer(rate, rate), rate * (1 - rate))
