"""Products of rows with later rows: lagged covariances, along sequences or along the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cipm_ir.errors import InputError
from cipm_ir.runtime.statistics.moments import (
    Array,
    Floats,
    MergeableStatistic,
    Moments,
    add_outer,
    centred,
    chunks,
    normalized,
    same_size,
)


@dataclass
class Lagged(MergeableStatistic):
    """Moments of pairs (x at t, x at t + lag), merged as in `moments`.

    Rows of an endless stream may come in pieces: the first and the last rows are kept, so that ``a + b``, where b
    continues a, holds the pairs across the seam as well.

    Attributes:
        lag: how many steps later.
        early, late: count, means and variances of the two sides.
        products: sum of (x_t - mean)(x_(t+lag) - mean)^T, (size, size): row the earlier, column the later unit.
        head, tail: the first and last rows of the stream, at most ``lag``.
        length: rows of the stream.
    """

    lag: int
    early: Moments
    late: Moments
    products: Floats
    head: Array = field(repr=False)
    tail: Array = field(repr=False)
    length: int = 0

    @classmethod
    def zero(cls, size: int, lag: int) -> Lagged:
        """Of no rows."""
        none = np.zeros((0, size), np.float32)
        early, late = (Moments.zero(size, full=False) for _ in range(2))
        return cls(lag, early, late, np.zeros((size, size)), none, none)

    @property
    def size(self) -> int:
        """How many units."""
        return len(self.products)

    @property
    def count(self) -> int:
        """Pairs so far."""
        return self.early.count

    def update(self, sequences: Array) -> None:
        """Take in whole sequences, (sequences, steps, size); pairs lie within one sequence."""
        same_size(self.size, sequences.shape[2])
        if sequences.shape[1] > self.lag:
            early, late = sequences[:, : -self.lag], sequences[:, self.lag :]
            self._take(early.reshape(-1, self.size), late.reshape(-1, self.size))

    def extend(self, rows: Array) -> None:
        """Take in the next rows of the stream, (rows, size)."""
        same_size(self.size, rows.shape[1])
        both = np.concatenate([self.tail, rows.astype(np.float32) if rows.dtype.itemsize < 4 else rows])
        if len(both) > self.lag:
            self._take(both[: -self.lag], both[self.lag :])
        if self.length < self.lag:
            self.head = np.concatenate([self.head, rows])[: self.lag]
        self.tail = both[-self.lag :].copy()
        self.length += len(rows)

    def _take(self, early: Array, late: Array) -> None:
        for a, b in zip(chunks(early), chunks(late), strict=True):
            (mean_a, a), (mean_b, b) = centred(a), centred(b)
            first, second = (Moments(len(x), m, np.einsum("ij,ij->j", x, x)) for m, x in ((mean_a, a), (mean_b, b)))
            self._join(first, second, a.T @ b)

    def _join(self, early: Moments, late: Moments, products: Array) -> None:
        if early.count:
            weight = self.count * early.count / (self.count + early.count)
            self.products += products
            add_outer(self.products, early.mean - self.early.mean, late.mean - self.late.mean, weight)
            self.early, self.late = self.early + early, self.late + late

    def __add__(self, other: Lagged) -> Lagged:
        """Return the pairs of both, and those across the seam where both are streams."""
        out = self.pooled(other)
        both = np.concatenate([self.tail, other.head])
        pairs = min(len(self.tail), len(both) - self.lag)
        if pairs > 0:
            out._take(both[:pairs], both[self.lag : self.lag + pairs])
        out.head = np.concatenate([self.head, other.head])[: self.lag] if self.length < self.lag else self.head
        out.tail = np.concatenate([self.tail, other.tail])[-self.lag :] if other.length < self.lag else other.tail
        out.length = self.length + other.length
        return out

    def pooled(self, other: Lagged) -> Lagged:
        """Return the pairs of both, as of two streams that have nothing to do with each other."""
        same_size(self.size, other.size)
        if self.lag != other.lag:
            raise InputError(f"Products at lag {self.lag} and at lag {other.lag} cannot be added.")
        out = Lagged.zero(self.size, self.lag)
        for one in (self, other):
            out._join(one.early, one.late, one.products)
        return out

    @property
    def correlation(self) -> Floats:
        """(size, size): of the row unit now with the column unit ``lag`` steps later; 0 for constant units."""
        return normalized(self.products / max(self.count, 1), self.early.variance, self.late.variance)

    def state(self) -> dict[str, Array]:
        """Plain arrays."""
        numbers = {name: np.asarray(getattr(self, name)) for name in ("lag", "count", "length")}
        sides = {name: np.stack([x.mean, x.spread]) for name, x in (("early", self.early), ("late", self.late))}
        return numbers | sides | {name: getattr(self, name) for name in ("products", "head", "tail")}

    @classmethod
    def restore(cls, state: Mapping[str, Array]) -> Lagged:
        """Return the part that gave this state."""
        early, late = (Moments(int(state["count"]), *state[name]) for name in ("early", "late"))
        arrays = {name: state[name] for name in ("products", "head", "tail")}
        return cls(int(state["lag"]), early, late, **arrays, length=int(state["length"]))
