"""A random sample of rows that shards can add up, and the measures that need whole columns: ranks and information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError
from cipm_ir.ir.labels import mix
from cipm_ir.runtime.statistics.moments import Array, Floats, MergeableStatistic, normalized, same_size

ROWS = 2048
"""Default number of rows: a rank correlation of independent units has a standard error of 1 / sqrt(2047) = 0.022."""

_SALT = 42
_ENTRIES = 1 << 24


@dataclass
class RowSample(MergeableStatistic):
    """The rows with the smallest hashes of their numbers: a uniform sample without replacement ("bottom-k").

    Which rows these are depends on the data alone, not on how it was cut into batches or shards.

    Attributes:
        capacity: how many rows at most.
        seen: rows so far.
        keys: (kept,): hashes, ascending.
        rows: (kept, size).
    """

    capacity: int
    seen: int
    keys: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.float32]

    @classmethod
    def zero(cls, size: int, capacity: int = ROWS) -> RowSample:
        """Of no rows."""
        return cls(capacity, 0, np.zeros(0, np.uint64), np.zeros((0, size), np.float32))

    def update(self, rows: Array, numbers: npt.NDArray[np.uint64]) -> None:
        """Take in rows, (rows, size), each with a number of its own, which no other row of the data has."""
        same_size(self.rows.shape[1], rows.shape[1])
        keys = mix(numbers, _SALT)
        self.seen += len(rows)
        chosen = np.arange(len(keys))
        if len(self.keys) == self.capacity:
            chosen = np.flatnonzero(keys < self.keys[-1])
        if len(chosen) > self.capacity:
            chosen = chosen[np.argpartition(keys[chosen], self.capacity - 1)[: self.capacity]]
        if len(chosen):
            self._keep(keys[chosen], rows[chosen])

    def _keep(self, keys: npt.NDArray[np.uint64], rows: Array) -> None:
        every = np.concatenate([self.keys, keys])
        order = np.argsort(every, kind="stable")[: self.capacity]
        self.rows = np.concatenate([self.rows, rows.astype(np.float32)])[order]
        self.keys = every[order]

    def __add__(self, other: RowSample) -> RowSample:
        same_size(self.rows.shape[1], other.rows.shape[1])
        if self.capacity != other.capacity:
            raise InputError(f"Samples of at most {self.capacity} and {other.capacity} rows cannot be added.")
        out = RowSample(self.capacity, self.seen + other.seen, self.keys, self.rows)
        out._keep(other.keys, other.rows)
        return out

    @property
    def spearman(self) -> Floats:
        """Correlation of the ranks, (size, size); 0 for units that are constant on the sample."""
        if not len(self.rows):
            return np.zeros((self.rows.shape[1],) * 2)
        ranks = _ranks(self.rows, "average")
        ranks -= ranks.mean(axis=0)
        products = ranks.T @ ranks / len(ranks)
        return normalized(products, np.diagonal(products))

    def information(self, bins: int = 8) -> Floats:
        """Mutual information of pairs of units as a correlation, sqrt(1 - exp(-2 I)), (size, size).

        I is estimated from the joint counts of quantile bins, less the expected excess of independent units (Miller and
        Madow); equal values share a bin, so that the many zeros behind a Relu do. The map from nats to [0, 1) is that
        of a Gaussian pair (Linfoot 1957). The diagonal is 1, or 0 for constant units.
        """
        count, size = self.rows.shape
        if not count:
            return np.zeros((size, size))
        order = _ranks(self.rows, "max")
        code = np.minimum((order - 1) * bins // count, bins - 1).astype(np.int64)
        hot = np.zeros((count, size, bins), np.float32)
        np.put_along_axis(hot, code[:, :, None], 1.0, axis=2)
        rate = hot.mean(axis=0, dtype=np.float64)
        used = (rate > 0).sum(axis=1)
        entropy = _entropy_terms(rate).sum(axis=1)
        out = np.zeros((size, size))
        step = max(_ENTRIES // (size * bins * bins), 1)
        flat = hot.reshape(count, -1)
        for start in range(0, size, step):
            stop = min(start + step, size)
            joint = flat[:, start * bins : stop * bins].T @ flat / count
            terms = _entropy_terms(joint.astype(np.float64)).reshape(stop - start, bins, size, bins)
            excess = np.multiply.outer(used[start:stop] - 1, used - 1) / (2 * count)
            nats = entropy[start:stop, None] + entropy - terms.sum(axis=(1, 3)) - excess
            out[start:stop] = np.sqrt(-np.expm1(-2 * np.maximum(nats, 0.0)))
        np.fill_diagonal(out, used > 1)
        return out


def _ranks(rows: Array, method: Literal["average", "max"]) -> Floats:
    """Ranks from 1 on within each column."""
    from scipy.stats import rankdata  # a fifth of the time that it takes to import this package

    return np.asarray(rankdata(rows, method=method, axis=0))


def _entropy_terms(rate: Floats) -> Floats:
    return np.asarray(-rate * np.log(rate, out=np.zeros_like(rate), where=rate > 0))
