"""Correlations of very wide spaces: a linear sketch of the rows, and exact sums for the pairs that matter.

Let X be the rows about their means, (rows, d). The exact covariance needs d² numbers and d² products for each row. The
*count sketch* (Charikar, Chen and Farach-Colton 2002; for Gram matrices Clarkson and Woodruff 2009, Theorem 2.9) adds
each row, with a random sign, to one of k buckets: Y = S X, (k, d), at d additions a row. Y^T Y is an unbiased estimate
of X^T X, and for each pair of units

    Var (Y^T Y)_ij  <=  (|x_i|² |x_j|² + (x_i . x_j)²) / k

so that an estimated correlation has a standard error of at most sqrt((1 + r²) / k), and by Chebyshev's inequality it is
off by more than t with a probability of at most 2 / (k t²). Sign and bucket are a hash of the row's number, which no
other row has, so sketches of shards add up to a sketch of the whole.

The strongest pairs by this estimate can then be followed exactly in a second pass: `Pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from cipm_ir.errors import InputError
from cipm_ir.ir.labels import mix
from cipm_ir.runtime.statistics.moments import Array, Floats, MergeableStatistic, Moments, centred, chunks, same_size

Index = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

BUCKETS = 1024
"""Default k: a standard error of 0.031 for uncorrelated and 0.044 for equal units; 8 KiB per unit."""

_SALT = 41
_BLOCK = 512


@dataclass
class Sketch(MergeableStatistic):
    """The count sketch of rows.

    Attributes:
        count: rows so far.
        sums: (k, size): sum of sign times row, by bucket.
        signs: (k,): sum of the signs, by bucket; takes the mean out afterwards.
    """

    count: int
    sums: Floats
    signs: Floats

    @classmethod
    def zero(cls, size: int, buckets: int = BUCKETS) -> Sketch:
        """Of no rows."""
        return cls(0, np.zeros((buckets, size)), np.zeros(buckets))

    @property
    def size(self) -> int:
        """How many units."""
        return int(self.sums.shape[1])

    def update(self, rows: Array, numbers: Hashes) -> None:
        """Take in rows, (rows, size), each with a number of its own, which no other row of the data has."""
        same_size(self.size, rows.shape[1])
        hashes = mix(numbers, _SALT)
        bucket = (hashes >> np.uint64(1)) % np.uint64(len(self.signs))
        sign = np.where(hashes & np.uint64(1), 1.0, -1.0)
        start = 0
        for chunk in chunks(rows):
            part = slice(start, start + len(chunk))
            start += len(chunk)
            spread = csr_array(
                (sign[part].astype(chunk.dtype), (bucket[part].astype(np.int64), np.arange(len(chunk)))),
                shape=(len(self.signs), len(chunk)),
            )
            self.sums += spread @ chunk
        np.add.at(self.signs, bucket.astype(np.int64), sign)
        self.count += len(rows)

    def __add__(self, other: Sketch) -> Sketch:
        if self.sums.shape != other.sums.shape:
            raise InputError(
                f"Sketches of shapes {self.sums.shape} and {other.sums.shape} cannot be added; collect them alike."
            )
        if np.array_equal(self.signs, other.signs) and np.array_equal(self.sums, other.sums):
            # The same rows twice: with the same signs they add up to four times their products, not to two.
            return Sketch(self.count + other.count, self.sums * math.sqrt(2), self.signs * math.sqrt(2))
        return Sketch(self.count + other.count, self.sums + other.sums, self.signs + other.signs)

    @property
    def standard_error(self) -> float:
        """A bound on the standard error of every estimated correlation: sqrt(2 / k)."""
        return math.sqrt(2 / len(self.signs))

    def bound(self, probability: float) -> float:
        """An estimated correlation is off by more than this with at most this probability (Chebyshev)."""
        return math.sqrt(2 / (len(self.signs) * probability))

    def whitened(self, mean: Floats, variance: Floats) -> npt.NDArray[np.float32]:
        """(k, size): the sketch of the rows in units of standard deviations; its Gram matrix estimates correlations."""
        around = self.sums - np.multiply.outer(self.signs, mean)
        root = np.sqrt(np.maximum(variance, 0.0) * max(self.count, 1))
        return np.asarray(around * np.divide(1.0, root, out=np.zeros_like(root), where=root > 0), np.float32)

    def correlation(self, mean: Floats, variance: Floats) -> npt.NDArray[np.float32]:
        """(size, size): estimates, clipped to [-1, 1]; the diagonal is 1, or 0 for constant units."""
        white = self.whitened(mean, variance)
        out = np.asarray(np.clip(white.T @ white, -1.0, 1.0), np.float32)
        np.fill_diagonal(out, variance > 0)
        return out

    def strongest(self, mean: Floats, variance: Floats, partners: int) -> Index:
        """Return pairs (i, j), i < j, such that i is among the ``partners`` strongest of j by the estimate, or j of i.

        Takes size² k products, a block at a time.
        """
        white = self.whitened(mean, variance)
        partners = min(partners, self.size - 1)
        found = []
        for start in range(0, self.size if partners > 0 else 0, _BLOCK):
            block = np.abs(white[:, start : start + _BLOCK].T @ white)
            here = np.arange(len(block))
            block[here, start + here] = -1.0
            best = np.argpartition(-block, partners - 1, axis=1)[:, :partners]
            found.append(np.stack([np.repeat(start + here, partners), best.ravel()], 1))
        return unordered(np.concatenate(found)) if found else np.zeros((0, 2), np.int64)


def unordered(pairs: Any) -> Index:
    """Distinct pairs (i, j) with i < j, sorted; pairs of a unit with itself are left out."""
    array = np.sort(np.asarray(pairs, np.int64).reshape(-1, 2), axis=1)
    return np.unique(array[array[:, 0] < array[:, 1]], axis=0)


@dataclass
class Pairs(MergeableStatistic):
    """Centred products of chosen pairs of units, exact and merged as in `moments`.

    Attributes:
        pairs: (m, 2), see `unordered`.
        moments: count, means and variances of all units.
        products: (m,): sum of (x_i - mean_i)(x_j - mean_j).
    """

    pairs: Index
    moments: Moments
    products: Floats

    @classmethod
    def zero(cls, size: int, pairs: Any) -> Pairs:
        """Of no rows. Raises: InputError for a pair of which a unit is out of range."""
        chosen = unordered(pairs)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= size):
            raise InputError(f"Pairs of units must lie within 0..{size - 1}.")
        return cls(chosen, Moments.zero(size, full=False), np.zeros(len(chosen)))

    def update(self, rows: Array) -> None:
        """Take in rows, (rows, size)."""
        for chunk in chunks(rows):
            mean, around = centred(chunk)
            columns = np.ascontiguousarray(around.T)
            products = np.concatenate([p for p in self._products(columns)] or [np.zeros(0)])
            new = Moments(len(chunk), mean, np.einsum("ij,ij->i", columns, columns).astype(np.float64))
            self._join(new, products)

    def _products(self, columns: Array) -> Iterator[Array]:
        step = max((1 << 22) // max(columns.shape[1], 1), 1)
        for start in range(0, len(self.pairs), step):
            i, j = self.pairs[start : start + step].T
            yield np.einsum("ij,ij->i", columns[i], columns[j])

    def _join(self, moments: Moments, products: Array) -> None:
        total = self.moments.count + moments.count
        if not moments.count:
            return
        step = moments.mean - self.moments.mean
        i, j = self.pairs.T
        self.products = self.products + products + step[i] * step[j] * (self.moments.count * moments.count / total)
        self.moments = self.moments + moments

    def __add__(self, other: Pairs) -> Pairs:
        """Of the pairs that were followed in both."""
        one, two = self._among(other.pairs), other._among(self.pairs)
        out = Pairs(self.pairs[one], self.moments, self.products[one])
        out._join(other.moments, other.products[two])
        return out

    def _among(self, pairs: Index) -> npt.NDArray[np.bool_]:
        key = [p[:, 0] * self.moments.size + p[:, 1] for p in (self.pairs, pairs)]
        return np.isin(key[0], key[1])

    @property
    def correlation(self) -> Floats:
        """(m,): 0 where a unit is constant."""
        root = np.sqrt(self.moments.variance)
        below = root[self.pairs[:, 0]] * root[self.pairs[:, 1]] * max(self.moments.count, 1)
        quotient = np.divide(self.products, below, out=np.zeros_like(below), where=below > 0)
        return np.asarray(np.clip(quotient, -1.0, 1.0))

    def state(self) -> dict[str, Array]:
        """Plain arrays."""
        return {"pairs": self.pairs, "products": self.products, **self.moments.state()}

    @classmethod
    def restore(cls, state: Mapping[str, Array]) -> Pairs:
        """Return the part that gave this state."""
        return cls(state["pairs"], Moments.restore(state), state["products"])
