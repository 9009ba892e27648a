"""A weight as `equalize` sees it: magnitudes and energies of a stack of matrices, read from the file in pieces.

What is needed of all entries at once are maxima and sums of rows and columns; these take one reading. Only the norms of
`equalize_solve` need every entry again and again: `Coded` keeps them in one byte each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.labels import Array
from cipm_ir.passes.exact.canonicalize.members import Floats

_CHUNK = 1 << 18
Place = tuple[slice, slice, slice]
"""Where a piece lies: groups, rows, columns."""
Weigh = Callable[[Floats, tuple[slice | int, ...]], Floats]
"""Factors of rows, from their sums and where they lie: (weights, groups, rows)."""


@dataclass(frozen=True)
class Grid:
    """The magnitudes of a weight: (groups, rows, columns), of which each stands for ``count`` entries (taps).

    Attributes:
        array: gives the weight.
        order: its axes: those of the rows, the one that is summed, those of the taps.
        groups: of a convolution, runs of the first axis of the rows.
    """

    array: Callable[[], Array]
    order: tuple[int, ...]
    taps: int
    groups: int = 1

    @classmethod
    def held(cls, size: Floats) -> Grid:
        """Of magnitudes (groups, rows, columns) in memory."""
        flat = size.reshape(-1, size.shape[2])
        return cls(lambda: flat, (0, 1), 0, len(size))

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(groups, rows, columns)."""
        sizes = [self.array().shape[a] for a in self.order]
        kept = len(sizes) - self.taps - 1
        return self.groups, int(np.prod(sizes[:kept])) // self.groups, sizes[kept]

    @property
    def count(self) -> int:
        """Entries of the weight behind one magnitude."""
        return self.array().size // int(np.prod(self.shape))

    def pieces(self) -> Iterator[tuple[Place, Floats, Floats]]:
        """Place, magnitudes and energies (the sums of squares over the taps), some rows or some columns at a time."""
        over = tuple(range(-self.taps, 0))
        for place, shape, laid in self._laid(np.float64):
            square = np.square(laid)
            yield place, _over(laid, over).reshape(shape), (square.sum(over) if over else square).reshape(shape)

    def magnitudes(self) -> Iterator[tuple[Place, Array]]:
        """Place and magnitudes, in single precision where the weight has no more."""
        dtype = np.float64 if self.array().dtype == np.float64 else np.float32
        for place, shape, laid in self._laid(dtype):
            yield place, _over(laid, tuple(range(-self.taps, 0))).reshape(shape)

    def _laid(self, dtype: type[np.floating[Any]]) -> Iterator[tuple[Place, tuple[int, ...], Array]]:
        """Place, shape without taps, and magnitudes in the order of the axes."""
        array = self.array()
        groups, rows, columns = self.shape
        first, length, every = self.order.index(0), len(array), slice(None)
        summed = len(self.order) - self.taps - 1
        step = max(1, _CHUNK // max(array[:1].size, 1))
        if self.groups > 1:  # whole groups
            run = length // groups
            step = max(1, step // run) * run
        if first not in (0, summed) or (self.groups > 1 and first):
            step = length
        for lo in range(0, length, step):
            part = slice(lo, min(lo + step, length))
            piece = array[part].astype(dtype)
            laid = np.moveaxis(np.abs(piece, out=piece), self.order, range(array.ndim))
            if first == summed:
                yield (every, every, part), (groups, rows, -1), laid
            elif groups > 1:
                inside = slice(part.start * groups // length, part.stop * groups // length)
                yield (inside, every, every), (-1, rows, columns), laid
            else:
                times = rows // length
                inside = every if step == length else slice(part.start * times, part.stop * times)
                yield (every, inside, every), (1, -1, columns), laid

    # ------------------------------------------------------------ one reading
    @cached_property
    def _totals(self) -> tuple[Floats, Floats, Floats, Floats]:
        groups, rows, columns = self.shape
        up, across = np.zeros((groups, rows)), np.zeros((groups, columns))
        made, read = np.zeros_like(up), np.zeros_like(across)
        for (g, r, c), size, energy in self.pieces():
            up[g, r] = np.maximum(up[g, r], size.max(2))
            across[g, c] = np.maximum(across[g, c], size.max(1))
            made[g, r] += energy.sum(2)
            read[g, c] += energy.sum(1)
        return up, across, made, read

    @property
    def row_size(self) -> Floats:
        """Largest magnitude of each row: (groups, rows)."""
        return self._totals[0]

    @property
    def column_size(self) -> Floats:
        """Largest magnitude of each column: (groups, columns)."""
        return self._totals[1]

    @property
    def row_energy(self) -> Floats:
        """Sum of squares of each row."""
        return self._totals[2]

    @property
    def column_energy(self) -> Floats:
        """Sum of squares of each column."""
        return self._totals[3]

    def made(self, moment: Floats) -> Floats:
        """Energy of each row, columns weighted: (groups, rows)."""
        out = np.zeros(self.shape[:2])
        for (g, r, c), _, energy in self.pieces():
            out[g, r] += (energy @ moment[g, c][:, :, None])[:, :, 0]
        return out

    def counted(self, gain: Floats) -> Floats:
        """Energy of each column, rows weighted: (groups, columns)."""
        out = np.zeros((self.shape[0], self.shape[2]))
        for (g, r, c), _, energy in self.pieces():
            out[g, c] += np.matmul(gain[g, r][:, None, :], energy)[:, 0]
        return out

    def scaled(self, r: Floats, c: Floats) -> tuple[Floats, Floats, float]:
        """At some log-scales: largest magnitudes of rows and of columns, and the energy of all."""
        up, across, total = np.zeros_like(r), np.zeros_like(c), 0.0
        for (g, rows, columns), size, energy in self.pieces():
            grow, widen = np.exp(r[g, rows])[:, :, None], np.exp(c[g, columns])[:, None, :]
            total += float((np.square(grow) * (energy @ np.square(widen).swapaxes(1, 2))).sum())
            up[g, rows] = np.maximum(up[g, rows], (size * widen).max(2) * grow[:, :, 0])
            across[g, columns] = np.maximum(across[g, columns], (size * grow).max(1) * widen[:, 0])
        return up, across, total

    def size(self) -> Floats:
        """Return all magnitudes, in memory."""
        out = np.empty(self.shape)
        for place, size in self.magnitudes():
            out[place] = size
        return out


def _over(laid: Array, axes: tuple[int, ...]) -> Array:
    """Return largest over some axes; none need no copy."""
    return np.asarray(laid.max(axes)) if axes else laid


# --- norms ------------------------------------------------------------------------------------------
class Dense:
    """Magnitudes of weights of one shape to a power, relative to the largest: (weights, groups, rows, columns)."""

    def __init__(self, sizes: Sequence[Floats]) -> None:
        self._size = self._norm = np.stack(sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """(weights, groups, rows, columns)."""
        return self._size.shape

    def expand(self, r: Floats | None, c: Floats, power: float) -> Floats:
        """Take magnitudes at some log-scales to a power; gives the largest: by weight, without ``r`` by row."""
        size = self._size * np.exp(c)[:, :, None, :]
        if r is None:
            top = size.max(3)
            over = np.where(top > 0, top, 1.0)[:, :, :, None]
        else:
            size *= np.exp(r)[:, :, :, None]
            top = size.max((1, 2, 3))
            over = top[:, None, None, None]
        self._norm = (size / over) ** power
        return np.asarray(top)

    def products(self, v: Floats, weigh: Weigh) -> tuple[Floats, Floats]:
        """Return sums of rows with ``v``, and of columns with what ``weigh`` makes of the former."""
        seen = np.matmul(self._norm, v[..., None])[..., 0]
        return seen, np.matmul(weigh(seen, ())[:, :, None, :], self._norm)[:, :, 0]


class Coded:
    """The same for large weights: read when expanded, and kept in a byte per magnitude.

    A byte is a float of five bits of exponent and three of mantissa: from 1 down to 2^-31, right to 6%. The root of the
    power leaves 1.5% of that error in a maximum at power 4, and 0.1% at power 48.
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        self._grids = grids
        self.shape = (len(grids), *grids[0].shape)
        self._codes: list[npt.NDArray[np.uint8]] = []

    def expand(self, r: Floats | None, c: Floats, power: float) -> Floats:
        """As for `Dense`."""
        self._codes = []
        tops = [self._coded(k, None if r is None else r[k], c[k], power) for k in range(len(self._grids))]
        return np.asarray(tops)

    def _coded(self, k: int, r: Floats | None, c: Floats, power: float) -> Floats:
        """Code one weight; gives its largest magnitude, or that of each row."""
        grid = self._grids[k]
        across = np.exp(c)
        up = np.ones(grid.shape[:2]) if r is None else np.exp(r)
        peak = np.zeros(grid.shape[:2])
        for (g, rows, columns), size in grid.magnitudes():
            peak[g, rows] = np.maximum(peak[g, rows], (size * across[g, columns][:, None, :].astype(size.dtype)).max(2))
        top = peak if r is None else np.asarray((peak * up).max())
        up = up / np.where(top > 0, top, 1.0)
        codes = np.empty(grid.shape, np.uint8)
        for (g, rows, columns), size in grid.magnitudes():
            size = size * across[g, columns][:, None, :].astype(size.dtype)
            size *= up[g, rows][:, :, None].astype(size.dtype)
            codes[g, rows, columns] = encoded(_raised(size.astype(np.float32, copy=False), power))
        self._codes.append(codes)
        return top

    def products(self, v: Floats, weigh: Weigh) -> tuple[Floats, Floats]:
        """As for `Dense`."""
        weights, groups, rows, columns = self.shape
        seen, back = np.zeros(self.shape[:3]), np.zeros((weights, groups, columns))
        step = max(1, _CHUNK // columns)
        small = v.astype(np.float32)
        for k, g in np.ndindex(weights, groups):
            for lo in range(0, rows, step):
                at = k, g, slice(lo, lo + step)
                part = decoded(self._codes[k][at[1:]])
                seen[at] = part @ small[k, g]
                back[k, g] += weigh(seen[at], at).astype(np.float32) @ part
        return seen, back


_SHIFT, _BIAS = 20, 96 << 3
"""Bits of a float32 mantissa that are left out; the code of 2^-31."""


def encoded(norm: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return numbers from 0 to 1 in a byte each; less than 2^-31 becomes that."""
    bits = np.maximum(norm, np.float32(2.0**-31)).view(np.uint32)
    bits -= np.uint32((_BIAS << _SHIFT) - (1 << (_SHIFT - 1)))
    bits >>= np.uint32(_SHIFT)
    return bits.astype(np.uint8)


def decoded(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return what `encoded` was given, rounded."""
    bits = codes.astype(np.uint32)
    bits += np.uint32(_BIAS)
    bits <<= np.uint32(_SHIFT)
    return bits.view(np.float32)


def _raised(x: npt.NDArray[np.float32], power: float) -> npt.NDArray[np.float32]:
    """x to a power; to a whole one by multiplications."""
    if power != int(power) or power < 1:
        return np.asarray(x**power, np.float32)
    left, out = int(power), None
    while True:
        if left & 1:
            out = x.copy() if out is None else np.multiply(out, x, out=out)
        left >>= 1
        if not left:
            assert out is not None
            return out
        x = np.square(x, out=x)
