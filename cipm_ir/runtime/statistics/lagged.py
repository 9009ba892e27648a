"""Products of rows with later rows: lagged covariances, along sequences or along the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cipm_ir.errors import InputError
from cipm_ir.runtime.statistics.moments import Array, Floats, add_outer, centred, chunks, normalized, same_size


@dataclass
class Lagged:
    """Moments of pairs (x at t, x at t + lag), merged as in `moments`.

    Rows of an endless stream may come in pieces: the first and the last rows are kept, so that ``a + b``, where b
    continues a, holds the pairs across the seam as well.

    Attributes:
        lag: how many steps later.
        count: pairs so far.
        early, late: means and sums of squares of the two sides, (2, size) each.
        products: sum of (x_t - mean)(x_(t+lag) - mean)^T, (size, size): row the earlier, column the later unit.
        head, tail: the first and last rows of the stream, at most ``lag``.
        length: rows of the stream.
    """

    lag: int
    count: int
    early: Floats
    late: Floats
    products: Floats
    head: Array = field(repr=False)
    tail: Array = field(repr=False)
    length: int = 0

    @classmethod
    def zero(cls, size: int, lag: int) -> Lagged:
        """Of no rows."""
        none = np.zeros((0, size), np.float32)
        return cls(lag, 0, np.zeros((2, size)), np.zeros((2, size)), np.zeros((size, size)), none, none)

    @property
    def size(self) -> int:
        """How many units."""
        return len(self.products)

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
            sides = [np.stack([mean, np.einsum("ij,ij->j", x, x)]) for mean, x in ((mean_a, a), (mean_b, b))]
            self._join(len(a), sides[0], sides[1], a.T @ b)

    def _join(self, count: int, early: Floats, late: Floats, products: Array) -> None:
        if not count:
            return
        total = self.count + count
        weight, part = self.count * count / total, count / total
        step = early[0] - self.early[0], late[0] - self.late[0]
        self.products += products
        add_outer(self.products, step[0], step[1], weight)
        for side, new, delta in ((self.early, early, step[0]), (self.late, late, step[1])):
            side[0] += delta * part
            side[1] += new[1] + weight * delta * delta
        self.count = total

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
            out._join(one.count, one.early, one.late, one.products)
        return out

    @property
    def correlation(self) -> Floats:
        """(size, size): of the row unit now with the column unit ``lag`` steps later; 0 for constant units."""
        n = max(self.count, 1)
        return normalized(self.products / n, self.early[1] / n, self.late[1] / n)

    def state(self) -> dict[str, Array]:
        """Plain arrays."""
        numbers = {name: np.asarray(getattr(self, name)) for name in ("lag", "count", "length")}
        return numbers | {name: getattr(self, name) for name in ("early", "late", "products", "head", "tail")}

    @classmethod
    def restore(cls, state: Mapping[str, Array]) -> Lagged:
        """Return the part that gave this state."""
        arrays = {name: state[name] for name in ("early", "late", "products", "head", "tail")}
        return cls(int(state["lag"]), int(state["count"]), **arrays, length=int(state["length"]))
