"""The convex programme of `equalize`: smooth maxima of growing sharpness, L-BFGS, then rounding to powers of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.linalg import lsqr

from cipm_ir.passes.canonical_members import Floats
from cipm_ir.passes.equalize_terms import Term

Per = Literal["tensor", "channel"]
SHARPNESS = (4.0, 16.0, 48.0)
"""Powers of the norms that stand for a maximum, one after the other."""
_STEPS = 80
_LOG2 = float(np.log(2.0))
_ROUNDS = 300
_LEAST = 1e-6
_ALMOST = 1.0 - 1e-9
_OFFSETS = (0.25, 0.5, 0.75)
_BLUNT = (6.0, 12.0, 24.0, 48.0)


@dataclass
class _Part:
    """A term, where its rows and columns lie among all levels, and its norms where it is expanded."""

    term: Term
    rows: slice
    columns: slice
    size: Floats | None = None
    top: Floats | None = None


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
    """

    def __init__(self, terms: Sequence[Term], free: npt.NDArray[np.int64], per: Per, alpha: float) -> None:
        self.per, self.alpha, self.count = per, alpha, len(free)
        self.parts: list[_Part] = []
        tables, place = [], 0
        for term in terms:
            rows, columns = term.rows[:, free], term.columns[:, free]
            if rows.nnz or columns.nnz:
                middle, stop = place + rows.shape[0], place + rows.shape[0] + columns.shape[0]
                self.parts.append(_Part(term, slice(place, middle), slice(middle, stop)))
                tables += [rows, columns]
                place = stop
        self.table = sparse.vstack(tables, format="csr") if tables else sparse.csr_array((0, self.count))
        self._back = self.table.T.tocsr()
        self._at, self._p = np.zeros(self.table.shape[0]), SHARPNESS[0]

    def start(self) -> Floats:
        """Log-scales that make the rows and columns of each weight as alike in energy as can be: least squares."""
        level, centre = np.zeros(self.table.shape[0]), []
        used = np.diff(self.table.indptr) > 0
        for part in self.parts:
            for where, energy in ((part.rows, part.term.energy.sum(2)), (part.columns, part.term.energy.sum(1))):
                flat = energy.ravel()
                alive = np.flatnonzero((flat > 0) & used[where])
                if len(alive) > 1:
                    log = 0.5 * np.log(flat[alive])
                    level[where.start + alive] = log - log.mean()
                    centre.append(where.start + alive)
        if not centre:
            return np.zeros(self.count)
        rows = np.concatenate(centre)
        group = np.repeat(np.arange(len(centre)), [len(c) for c in centre])
        mean = sparse.csr_array((1.0 / np.bincount(group)[group], (group, np.arange(len(rows)))))
        spread = sparse.csr_array((np.ones(len(rows)), (np.arange(len(rows)), group)))
        picked = self.table[rows]
        return np.asarray(lsqr(picked - spread @ (mean @ picked), -level[rows], iter_lim=50)[0], np.float64)

    def expand(self, t: Floats, sharpness: float) -> None:
        """Prepare norms of this power, with all magnitudes taken at ``t``."""
        self._at, self._p = np.asarray(self.table @ t), sharpness
        for part in self.parts:
            term = part.term
            size = term.size * np.exp(self._at[part.columns]).reshape(term.moment.shape)[:, None, :]
            if self.per == "tensor":
                size *= np.exp(self._at[part.rows]).reshape(term.gain.shape)[:, :, None]
                part.top = top = np.asarray(size.max())
            else:
                part.top = size.max(2)
                top = np.where(part.top > 0, part.top, 1.0)[:, :, None]
            part.size = (size / top) ** sharpness

    def __call__(self, t: Floats) -> tuple[float, Floats]:
        """Value and gradient near where it was expanded."""
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
        """Value near where it was expanded, and what it is due to."""
        level = np.asarray(self.table @ t)
        out = Shares(0.0, np.zeros_like(level), np.zeros_like(level))
        weigh = self._tensor if self.per == "tensor" else self._channel
        for part in self.parts:
            term = part.term
            r, c = level[part.rows].reshape(term.gain.shape), level[part.columns].reshape(term.moment.shape)
            dr, dc = r - self._at[part.rows].reshape(r.shape), c - self._at[part.columns].reshape(c.shape)
            both = term.peak is not None and self.alpha > 0
            share = 1.0 - self.alpha if both else 1.0
            value, peaks, noises = weigh(part, r, c, dr, dc)
            out.value += share * value
            for where, peak, noise in zip((part.rows, part.columns), peaks, noises, strict=True):
                out.peak[where] += share * peak.ravel()
                out.noise[where] += share * noise.ravel()
            if both:
                value, peak, noise = self._activation(term, c)
                out.value += self.alpha * value
                out.peak[part.columns] += self.alpha * noise.ravel()
                out.noise[part.columns] += self.alpha * peak.ravel()
        return out

    def _tensor(
        self, part: _Part, r: Floats, c: Floats, dr: Floats, dc: Floats
    ) -> tuple[float, tuple[Floats, Floats], tuple[Floats, Floats]]:
        """Value and shares by rows and columns, one step for the weight."""
        assert part.size is not None and part.top is not None
        u, v = (np.exp(self._p * (x - x.max())) for x in (dr, dc))
        seen = np.matmul(part.size, v[:, :, None])[:, :, 0]
        whole = max(float((u * seen).sum()), 1e-300)
        back = np.matmul(u[:, None, :], part.size)[:, 0]
        value = 2 * (float(np.log(part.top)) + float(dr.max() + dc.max()) + np.log(whole) / self._p)
        low = r.min(), c.min()
        x, y = part.term.gain * np.exp(-2 * (r - low[0])), part.term.moment * np.exp(-2 * (c - low[1]))
        rows, columns = x.sum(1), y.sum(1)
        total = max(float((rows * columns).sum()), 1e-300)
        value += float(np.log(total)) - 2 * float(low[0] + low[1])
        noise = x * columns[:, None] / total, y * rows[:, None] / total
        return value, (u * seen / whole, v * back / whole), noise

    def _channel(
        self, part: _Part, r: Floats, c: Floats, dr: Floats, dc: Floats
    ) -> tuple[float, tuple[Floats, Floats], tuple[Floats, Floats]]:
        """The same with a step for each row, in which the scale of the row cancels."""
        assert part.size is not None and part.top is not None
        term, still = part.term, np.zeros_like(r)
        v = np.exp(self._p * (dc - dc.max()))
        seen = np.maximum(np.matmul(part.size, v[:, :, None])[:, :, 0], 1e-300)
        step = term.gain * part.top**2 * np.exp(2 * dc.max()) * seen ** (2 / self._p)
        low = c.min()
        spread = term.moment * np.exp(-2 * (c - low))
        steps, spreads = step.sum(1), spread.sum(1)
        total = max(float((steps * spreads).sum()), 1e-300)
        back = np.matmul((step / seen)[:, None, :], part.size)[:, 0] * v
        peak, noise = back * spreads[:, None] / total, spread * steps[:, None] / total
        return float(np.log(total) - 2 * low), (still, peak), (still, noise)

    def _activation(self, term: Term, c: Floats) -> tuple[float, Floats, Floats]:
        """Noise of quantizing what is multiplied, with one step; shares by columns."""
        assert term.peak is not None
        with np.errstate(divide="ignore"):
            level = np.log(term.peak) - c
        top = level.max()
        power = np.exp(self._p * (level - top))
        counts = np.matmul(term.gain[:, None, :], term.energy)[:, 0]
        spread = counts * np.exp(2 * (c - c.max()))
        whole = max(float(spread.sum()), 1e-300)
        value = 2 * (top + np.log(power.sum()) / self._p) + np.log(whole) + 2 * c.max()
        return float(value), power / power.sum(), spread / whole


def solve(objective: Objective, progress: Callable[[float], None] | None = None) -> Floats:
    """Log-scales (natural) that minimize the objective."""
    t = objective.start()
    for k, sharpness in enumerate(SHARPNESS):
        objective.expand(t, sharpness)
        t = np.asarray(minimize(objective, t, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS, "maxcor": 20}).x)
        if progress is not None:
            progress((k + 1) / len(SHARPNESS))
    return t


def rounded(objective: Objective, t: Floats) -> npt.NDArray[np.int64]:
    """Exponents of two near some log-scales: rounded with several offsets, each improved by steps of one; the best.

    An offset of all units of a space changes no weight's noise, but which of them are rounded up.
    """
    starts = [np.zeros(objective.count), *(np.floor(t / _LOG2 + offset) for offset in _OFFSETS)]
    found = [_descended(objective, z) for z in starts]
    return min(found, key=lambda pair: pair[0])[1].astype(np.int64)


def _descended(objective: Objective, z: Floats) -> tuple[float, Floats]:
    """Move by steps of one while the objective falls, first with blunt maxima: sharp ones hide all but the largest."""
    value = 0.0
    for sharpness in _BLUNT:
        objective.expand(z * _LOG2, sharpness)
        value, z = _stepped(objective, z)
    return value, z


def _stepped(objective: Objective, z: Floats) -> tuple[float, Floats]:
    """The moves that promise most are made together, fewer and fewer where that does not help."""
    now = objective.shares(z * _LOG2)
    batch = max(objective.count // 4, 1)
    for _ in range(_ROUNDS):
        both = np.stack([objective.moves(now, _LOG2), objective.moves(now, -_LOG2)])
        gain, step = both.min(0), np.where(both[0] < both[1], 1.0, -1.0)
        order = np.argsort(gain)
        while True:
            chosen = order[:batch]
            chosen = chosen[gain[chosen] < -_LEAST]
            trial = z.copy()
            trial[chosen] += step[chosen]
            found = objective.shares(trial * _LOG2)
            if len(chosen) and found.value < now.value - _LEAST:
                z, now = trial, found
                break
            if batch == 1 or not len(chosen):
                return now.value, z
            batch = max(min(batch, len(chosen)) // 2, 1)
    return now.value, z
