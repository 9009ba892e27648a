"""The convex programme of `equalize`: smooth maxima of growing sharpness, L-BFGS, then rounding to powers of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, lsqr

from cipm_ir.passes.exact.canonicalize.members import Floats
from cipm_ir.passes.exact.equalize.grid import Coded, Dense, Grid
from cipm_ir.passes.exact.equalize.terms import Exponents, Term

Per = Literal["tensor", "channel"]
SHARPNESS = (4.0, 16.0, 48.0)
"""Powers of the norms that stand for a maximum, one after the other."""
_STEPS = 80
_LOG2 = float(np.log(2.0))
_ROUNDS = 100
_LEAST = 1e-6
_TINY = 1e-300
_ALMOST = 1.0 - 1e-9
_OFFSETS = (0.5, 0.3, 0.7)
_MANY = 5000
"""From so many unknowns on, fewer offsets are tried."""
_BLUNT = (6.0, 16.0, 48.0)
_ENOUGH = 3e-5
"""Of more magnitudes than `IN_MEMORY`, each step has to gain as much per weight: 0.0001 dB. Each takes a reading."""
IN_MEMORY = 1 << 24
"""Up to so many magnitudes an objective keeps all of them, and their norms, as they are: 256 MB."""


@dataclass
class _Side:
    """A weight as an objective needs it: magnitudes in memory, or where they are to be read."""

    size: Floats | Grid
    rows: Exponents
    columns: Exponents
    gain: Floats
    moment: Floats
    energies: tuple[Floats, Floats]
    """Of rows and of columns."""
    counts: Floats
    """Energy of each column by what outputs count; only with ``peak``."""
    peak: Floats | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(groups, rows, columns)."""
        return self.size.shape


@dataclass
class _Stack:
    """Weights of one shape, laid on each other: (weights, groups, rows, columns).

    ``rows``, ``columns``: where their levels lie among all. ``top``: the largest magnitude, where it is expanded.
    """

    rows: slice
    columns: slice
    norm: Dense | Coded
    gain: Floats
    moment: Floats
    counts: Floats
    peak: Floats | None
    top: Floats

    @classmethod
    def of(cls, sides: Sequence[_Side], place: int) -> _Stack:
        """The levels of all rows come first, then those of all columns."""
        gain, moment, counts = (
            np.stack([getattr(one, name) for one in sides]) for name in ("gain", "moment", "counts")
        )
        grids = [one.size for one in sides if isinstance(one.size, Grid)]
        norm = Coded(grids) if grids else Dense([one.size for one in sides if not isinstance(one.size, Grid)])
        peaks = [one.peak for one in sides if one.peak is not None]
        middle = place + gain.size
        where = slice(place, middle), slice(middle, middle + moment.size)
        return cls(*where, norm, gain, moment, counts, np.stack(peaks) if peaks else None, np.zeros(len(sides)))


@dataclass
class Shares:
    """Of one value: how much of a maximum and of a sum of noise is due to each row and column of all weights.

    A row that goes up by x in log-scale changes the objective by about ``2 / p log(1 + peak (e^px - 1))`` plus
    ``log(1 + noise (e^-2x - 1))``, added over weights; the slope is ``2 peak - 2 noise``.
    """

    value: float
    peak: Floats
    noise: Floats


class Objective:
    """Sum over all weights of the log of the noise energy that quantization adds; see `equalize_terms`.

    Args:
        terms: the weights.
        free: positions of the unknowns that may change among all; the others are 0.
        per: one step for a whole weight, or one for each row.
        alpha: between 0, only weights are quantized, and 1, only activations are (one step per tensor), as in
            SmoothQuant; activations count where their magnitudes are known.
        in_memory: up to so many magnitudes (`IN_MEMORY`) are kept as they are; of more, norms are kept rounded
            (`Coded`), and steps that gain less than ``least`` end the search.
    """

    def __init__(
        self, terms: Sequence[Term], free: npt.NDArray[np.int64], per: Per, alpha: float, in_memory: int | None = None
    ) -> None:
        self.per, self.alpha, self.count = per, alpha, len(free)
        self._energy: list[tuple[slice, Floats]] = []
        sides = [side for term in terms if (side := _side(term, free, per)) is not None]
        large = sum(int(np.prod(side.shape)) for side in sides if isinstance(side.size, Grid)) > (
            IN_MEMORY if in_memory is None else in_memory
        )
        shapes: dict[tuple[object, ...], list[_Side]] = {}
        for side in sides:
            if isinstance(side.size, Grid) and not large:
                side.size = side.size.size()
            shapes.setdefault((side.shape, side.peak is None, isinstance(side.size, Grid)), []).append(side)
        self.least = _ENOUGH * len(sides) if large else 0.0
        self.stacks: list[_Stack] = []
        tables, place = [], 0
        for found in shapes.values():
            stack = _Stack.of(found, place)
            place = stack.columns.stop
            self.stacks.append(stack)
            tables += [side.rows for side in found] + [side.columns for side in found]
            start = stack.rows.start
            for k in range(2):
                for side in found:
                    self._energy.append((slice(start, start + side.energies[k].size), side.energies[k].ravel()))
                    start += side.energies[k].size
        self.table = sparse.vstack(tables, format="csr") if tables else sparse.csr_array((0, self.count))
        self._back = self.table.T.tocsr()
        self._at, self._p = np.zeros(self.table.shape[0]), SHARPNESS[0]

    def start(self) -> Floats:
        """Log-scales that make the rows and columns of each weight as alike in energy as can be: least squares."""
        level, centre = np.zeros(self.table.shape[0]), []
        used = np.diff(self.table.indptr) > 0
        for where, energy in self._energy:
            alive = np.flatnonzero((energy > 0) & used[where])
            if len(alive) > 1:
                log = 0.5 * np.log(energy[alive])
                level[where.start + alive] = log - log.mean()
                centre.append(where.start + alive)
        if not centre:
            return np.zeros(self.count)
        rows = np.concatenate(centre)
        group = np.repeat(np.arange(len(centre)), [len(c) for c in centre])
        picked, count = self.table[rows], np.bincount(group)
        back = picked.T.tocsr()

        def centred(v: Floats) -> Floats:
            return np.asarray(v.ravel() - (np.bincount(group, v.ravel()) / count)[group])

        def forward(t: Floats) -> Floats:
            return centred(np.asarray(picked @ t.ravel()))

        def backward(v: Floats) -> Floats:
            return np.asarray(back @ centred(v))

        system: Any = LinearOperator(picked.shape, matvec=forward, rmatvec=backward, dtype=np.float64)
        return np.asarray(lsqr(system, -level[rows], iter_lim=50)[0], np.float64)

    def expand(self, t: Floats, sharpness: float) -> None:
        """Prepare norms of this power, with all magnitudes taken at ``t``."""
        self._at, self._p = np.asarray(self.table @ t), sharpness
        for one in self.stacks:
            r, c = self._at[one.rows].reshape(one.gain.shape), self._at[one.columns].reshape(one.moment.shape)
            one.top = one.norm.expand(r if self.per == "tensor" else None, c, sharpness)

    def __call__(self, t: Floats) -> tuple[float, Floats]:
        """Return value and gradient near where it was expanded."""
        found = self.shares(t)
        return found.value, np.asarray(self._back @ (2 * found.peak - 2 * found.noise))

    def moves(self, found: Shares, step: float) -> Floats:
        """About how much the objective changes when one unknown alone goes up by a step; exact for one table entry."""
        table = self._back
        power = np.expm1(np.clip(self._p * step * table.data, -700, 700))
        fall = np.expm1(np.clip(-2 * step * table.data, -700, 700))
        where = np.repeat(np.arange(self.count), np.diff(table.indptr))
        up = 2 / self._p * np.log1p(np.maximum(found.peak[table.indices] * power, -_ALMOST))
        down = np.log1p(np.maximum(found.noise[table.indices] * fall, -_ALMOST))
        return np.asarray(np.bincount(where, up + down, minlength=self.count), np.float64)

    def shares(self, t: Floats) -> Shares:
        """Return value near where it was expanded, and what it is due to."""
        level = np.asarray(self.table @ t)
        out = Shares(0.0, np.zeros_like(level), np.zeros_like(level))
        weigh = self._tensor if self.per == "tensor" else self._channel
        for one in self.stacks:
            r, c = level[one.rows].reshape(one.gain.shape), level[one.columns].reshape(one.moment.shape)
            dr, dc = r - self._at[one.rows].reshape(r.shape), c - self._at[one.columns].reshape(c.shape)
            both = one.peak is not None and self.alpha > 0
            share = 1.0 - self.alpha if both else 1.0
            value, peaks, noises = weigh(one, r, c, dr, dc)
            out.value += share * value
            for where, peak, noise in zip((one.rows, one.columns), peaks, noises, strict=True):
                out.peak[where] += share * peak.ravel()
                out.noise[where] += share * noise.ravel()
            if both:
                value, fall, rise = self._activation(one, c)
                out.value += self.alpha * value
                out.peak[one.columns] += self.alpha * rise.ravel()
                out.noise[one.columns] += self.alpha * fall.ravel()
        return out

    def _tensor(
        self, one: _Stack, r: Floats, c: Floats, dr: Floats, dc: Floats
    ) -> tuple[float, tuple[Floats, Floats], tuple[Floats, Floats]]:
        """Return value and shares by rows and columns, one step for each weight."""
        tops = [x.max((1, 2), keepdims=True) for x in (dr, dc)]
        u, v = (np.exp(self._p * (x - top)) for x, top in zip((dr, dc), tops, strict=True))
        seen, back = one.norm.products(v, lambda _, at: u[at])
        whole = np.maximum((u * seen).sum((1, 2), keepdims=True), _TINY)
        value = np.log(one.top) + (tops[0] + tops[1] + np.log(whole) / self._p).ravel()
        low = [x.min((1, 2), keepdims=True) for x in (r, c)]
        x, y = one.gain * np.exp(-2 * (r - low[0])), one.moment * np.exp(-2 * (c - low[1]))
        rows, columns = x.sum(2, keepdims=True), y.sum(2, keepdims=True)
        total = np.maximum((rows * columns).sum(1, keepdims=True), _TINY)
        value += 0.5 * np.log(total).ravel() - (low[0] + low[1]).ravel()
        return (
            2 * float(value.sum()),
            (u * seen / whole, v * back / whole),
            (x * columns / total, y * rows / total),
        )

    def _channel(
        self, one: _Stack, r: Floats, c: Floats, dr: Floats, dc: Floats
    ) -> tuple[float, tuple[Floats, Floats], tuple[Floats, Floats]]:
        """Return the same with a step for each row, in which the scale of the row cancels."""
        still, top = np.zeros_like(r), dc.max((1, 2), keepdims=True)
        v = np.exp(self._p * (dc - top))
        least = one.gain * one.top**2 * np.exp(2 * top)

        def weigh(seen: Floats, at: tuple[slice | int, ...]) -> Floats:
            seen = np.maximum(seen, _TINY)
            return np.asarray(least[at] * seen ** (2 / self._p) / seen)

        seen, back = one.norm.products(v, weigh)
        back = back * v
        step = least * np.maximum(seen, _TINY) ** (2 / self._p)
        low = c.min((1, 2), keepdims=True)
        spread = one.moment * np.exp(-2 * (c - low))
        steps, spreads = step.sum(2, keepdims=True), spread.sum(2, keepdims=True)
        total = np.maximum((steps * spreads).sum(1, keepdims=True), _TINY)
        value = float((np.log(total) - 2 * low).sum())
        return value, (still, back * spreads / total), (still, spread * steps / total)

    def _activation(self, one: _Stack, c: Floats) -> tuple[float, Floats, Floats]:
        """Noise of quantizing what is multiplied, with one step per value; by columns what falls and what rises."""
        assert one.peak is not None
        level = np.log(np.maximum(one.peak, _TINY)) - c
        top, high = level.max((1, 2), keepdims=True), c.max((1, 2), keepdims=True)
        power = np.exp(self._p * (level - top))
        spread = one.counts * np.exp(2 * (c - high))
        peak = np.maximum(power.sum((1, 2), keepdims=True), _TINY)
        whole = np.maximum(spread.sum((1, 2), keepdims=True), _TINY)
        value = float((2 * (top + np.log(peak) / self._p) + np.log(whole) + 2 * high).sum())
        return value, power / peak, spread / whole


def _side(term: Term, free: npt.NDArray[np.int64], per: Per) -> _Side | None:
    """Return what an objective needs of a weight; None where nothing of it is free.

    A weight of which only one side moves is a vector to an objective with one step per tensor.
    """
    rows, columns, grid = term.rows[:, free], term.columns[:, free], term.grid
    if not rows.nnz and not columns.nnz:
        return None
    gain, moment = term.gain, term.moment
    size: Floats | Grid = grid
    counts = term.counts() if not rows.nnz or term.peak is not None else np.zeros_like(moment)
    energies = grid.row_energy, grid.column_energy
    if per == "tensor" and not rows.nnz:
        gain = gain.sum(1, keepdims=True)
        size, energies = grid.column_size[:, None, :], (np.zeros_like(gain), counts / np.maximum(gain, 1e-300))
        rows = sparse.csr_array((len(gain), rows.shape[1]))
    if per == "tensor" and not columns.nnz and term.peak is None:
        moment = moment.sum(1, keepdims=True)
        size, energies = grid.row_size[:, :, None], (grid.row_energy, np.zeros_like(moment))
        columns, counts = sparse.csr_array((len(moment), columns.shape[1])), np.zeros_like(moment)
    return _Side(size, rows, columns, gain, moment, energies, counts, term.peak)


def solve(objective: Objective, progress: Callable[[float], None] | None = None) -> Floats:
    """Log-scales (natural) that minimize the objective."""
    t = objective.start()
    options: Any = {"maxiter": _STEPS, "maxcor": 20}
    for k, sharpness in enumerate(SHARPNESS):
        objective.expand(t, sharpness)
        if objective.least:
            options["ftol"] = objective.least / max(abs(objective(t)[0]), 1.0)
        t = np.asarray(minimize(objective, t, jac=True, method="L-BFGS-B", options=options).x)
        if progress is not None:
            progress((k + 1) / len(SHARPNESS))
    return t


def rounded(objective: Objective, t: Floats) -> npt.NDArray[np.int64]:
    """Exponents of two near some log-scales: rounded with several offsets, each improved by steps of one; the best.

    An offset of all units of a space changes no weight's noise, but which of them are rounded up. Scales of 1 are
    improved too, unless every step takes a reading of large weights: then they are only compared with.
    """
    offsets = _OFFSETS if objective.count < _MANY else _OFFSETS[:1]
    still = np.zeros(objective.count)
    starts = [np.floor(t / _LOG2 + offset) for offset in offsets]
    if objective.least:
        objective.expand(still, _BLUNT[-1])
        found = [(objective(still)[0], still)]
    else:
        found = [_descended(objective, still)]
    found += [_descended(objective, z) for z in starts]
    return min(found, key=lambda pair: pair[0])[1].astype(np.int64)


def _descended(objective: Objective, z: Floats) -> tuple[float, Floats]:
    """Move by steps of one while the objective falls, first with blunt maxima: sharp ones hide all but the largest."""
    value = 0.0
    for sharpness in _BLUNT:
        objective.expand(z * _LOG2, sharpness)
        value, z = _stepped(objective, z)
    return value, z


def _stepped(objective: Objective, z: Floats) -> tuple[float, Floats]:
    """The moves that promise most are made together: fewer where that does not help, more where it does."""
    now = objective.shares(z * _LOG2)
    least = max(_LEAST, objective.least)
    batch = max(objective.count // 4, 1)
    for _ in range(_ROUNDS):
        both = np.stack([objective.moves(now, _LOG2), objective.moves(now, -_LOG2)])
        gain, step = both.min(0), np.where(both[0] < both[1], 1.0, -1.0)
        good = np.flatnonzero(gain < -_LEAST)
        good = good[np.argsort(gain[good])]
        batch = min(2 * batch, len(good))
        while batch:
            trial = z.copy()
            trial[good[:batch]] += step[good[:batch]]
            found = objective.shares(trial * _LOG2)
            if found.value < now.value - least:
                break
            batch //= 2
        if not batch:
            break
        z, now = trial, found
    return now.value, z
