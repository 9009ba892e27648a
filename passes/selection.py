"""Which units to keep: backward elimination by the optimal brain surgeon's cost, then swaps, per reader in closed form.

A reader computes ``X W`` from rows of inputs X with Gram matrix ``G = XᵀX / rows``. Without the rows S of W, and with
the others refitted, its mean squared error grows by ``tr(W_Sᵀ [(G⁻¹)_SS]⁻¹ W_S)`` (Hassibi & Stork 1993; He et al. 2017
for channels). Errors of several readers are added, each relative to the variance of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dgemm

from cipm_ir.ir.labels import Labels

Matrix = npt.NDArray[np.float64]
_STEPS = 128
"""Elimination goes in about this many rounds; within one, candidates are still taken one by one."""
_POOL = 4
"""A round looks at this many candidates for each that goes."""
_SWAPS = 24
_TRIED = 3
"""So many absent elements, those that would help most, are tried in each round of swaps."""
_SWAP_SIZE = 1200
"""Up to this many rows of a reader swaps are tried: each costs a factorization."""


@dataclass
class Problem:
    """One reader's least-squares problem.

    Attributes:
        gram: (K, K), the mean of x xᵀ over rows, centred where the reader has a bias that takes up means.
        weight: (K, outputs).
        rows: (elements, k): rows that each element of the space owns; other rows always stay.
        energy: variance of the output, summed over outputs: the unit of the error.
        damping: added to the diagonal of ``gram``, as a fraction of its mean.
    """

    gram: Matrix
    weight: Matrix
    rows: Labels
    energy: float
    damping: float = 1e-4
    _damped: Matrix | None = field(default=None, repr=False)

    @property
    def damped(self) -> Matrix:
        """The Gram matrix with its damping."""
        if self._damped is None:
            mean = float(np.trace(self.gram)) / max(len(self.gram), 1)
            self._damped = self.gram + np.eye(len(self.gram)) * max(self.damping * mean, 1e-12)
        return self._damped

    def stays(self, keep: Labels) -> Labels:
        """Rows that stay when these elements do."""
        mask = np.ones(len(self.gram), bool)
        mask[self.rows.ravel()] = False
        mask[self.rows[keep].ravel()] = True
        return np.flatnonzero(mask)

    def refit(self, keep: Labels) -> Matrix:
        """The best weight with zeros in the rows of all other elements."""
        stays = self.stays(keep)
        gram = self.damped
        out = np.zeros_like(self.weight)
        out[stays] = solve(gram[np.ix_(stays, stays)], gram[stays] @ self.weight)
        return out

    def error(self, weight: Matrix) -> float:
        """Mean squared error of the output with another weight, relative to its variance."""
        gap = weight - self.weight
        return float(np.einsum("ko,kl,lo->", gap, self.gram, gap, optimize=True)) / max(self.energy, 1e-30)


def solve(gram: Matrix, target: Matrix) -> Matrix:
    """``gram⁻¹ target`` for a symmetric positive definite matrix, in float64."""
    if not len(gram):
        return target
    try:
        return np.asarray(cho_solve(cho_factor(gram, lower=True, check_finite=False), target, check_finite=False))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(gram, target, rcond=None)[0])


def eliminate(problems: Sequence[Problem], count: int, floor: int = 1) -> Labels:
    """Elements in the order in which they should go, first to go first; the last ``floor`` in no special order."""
    states = [_State.of(p) for p in problems]
    left = np.arange(count)
    order: list[int] = []
    step = max(1, count // _STEPS)
    while len(left) > floor:
        number = min(step, len(left) - floor)
        cost = np.sum([s.costs(left) for s in states], axis=0)
        pool = left[np.argsort(cost, kind="stable")[: min(len(left), _POOL * number if number > 1 else 1)]]
        gone = pool[:1] if number == 1 else _within(states, pool, number)
        for s in states:
            s.remove(gone)
        order.extend(gone.tolist())
        left = np.setdiff1d(left, gone, assume_unique=True)
    return np.concatenate([np.asarray(order, np.int64), left])


def _within(states: Sequence[_State], pool: Labels, number: int) -> Labels:
    """The first ``number`` of a pool, one by one, each after the others' absence is made up for."""
    small = [s.on(pool) for s in states]
    inside = np.arange(len(pool))
    gone: list[int] = []
    for _ in range(number):
        cost = np.sum([s.costs(inside) for s in small], axis=0)
        first = inside[int(np.argmin(cost))]
        for s in small:
            s.remove(np.asarray([first]))
        gone.append(int(first))
        inside = inside[inside != first]
    return np.asarray(pool[np.asarray(gone)])


@dataclass
class _State:
    """Inverse Gram matrix and weight of a reader while rows go."""

    inverse: Matrix
    weight: Matrix
    rows: Labels
    energy: float
    gone: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.inverse = np.ascontiguousarray(self.inverse)
        self.gone = np.zeros(len(self.inverse), bool)

    @classmethod
    def of(cls, problem: Problem) -> _State:
        inverse = solve(problem.damped, np.eye(len(problem.gram)))
        return cls(inverse, problem.weight.copy(), problem.rows, max(problem.energy, 1e-30))

    def on(self, elements: Labels) -> _State:
        """The same for these elements alone: what happens to the others does not change their costs."""
        rows = self.rows[elements]
        flat = rows.ravel()
        block = self.inverse[np.ix_(flat, flat)]
        return _State(block, self.weight[flat].copy(), np.arange(rows.size).reshape(rows.shape), self.energy)

    def costs(self, elements: Labels) -> Matrix:
        rows = self.rows[elements]
        blocks = self.inverse[rows[:, :, None], rows[:, None, :]]
        weights = self.weight[rows]
        if rows.shape[1] == 1:
            return np.asarray((weights[:, 0] ** 2).sum(axis=1) / blocks[:, 0, 0]) / self.energy
        return np.asarray((weights * np.linalg.solve(blocks, weights)).sum(axis=(1, 2))) / self.energy

    def remove(self, elements: Labels) -> None:
        rows = self.rows[elements].ravel()
        side = self.inverse[:, rows]
        factor = solve(side[rows], side.T)  # S, K
        self.weight -= factor.T @ self.weight[rows]
        # in place: the matrix is symmetric, so its transpose is the same one in Fortran's order
        dgemm(-1.0, factor.T, side, 1.0, self.inverse.T, trans_b=True, overwrite_c=True)
        self.gone[rows] = True
        if self.gone.sum() * 4 > len(self.gone):
            self._compact()

    def _compact(self) -> None:
        """Forget rows that are gone; until then what is left in their places is not read."""
        left = np.flatnonzero(~self.gone)
        place = np.full(len(self.gone), -1)
        place[left] = np.arange(len(left))
        self.inverse, self.weight = self.inverse[np.ix_(left, left)], self.weight[left]
        self.rows, self.gone = place[self.rows], np.zeros(len(left), bool)


def improve(problems: Sequence[Problem], keep: Labels, count: int) -> Labels:
    """Swap a kept element for one that is gone while that lowers the error; gives the kept elements, sorted."""
    if sum(len(p.gram) for p in problems) > _SWAP_SIZE * 2 or not 0 < len(keep) < count:
        return np.sort(keep)
    kept = np.sort(keep)
    for _ in range(_SWAPS):
        gone = np.setdiff1d(np.arange(count), kept, assume_unique=True)
        gain = np.sum([_gains(p, kept, gone) for p in problems], axis=0)
        best: tuple[float, Labels] | None = None
        for k in np.argsort(-gain)[:_TRIED]:
            wider = np.sort(np.append(kept, gone[k]))
            cost = np.sum([_drops(p, wider) for p in problems], axis=0)
            worst = int(np.argmin(cost))
            saved = float(gain[k] - cost[worst])
            if saved > 1e-6 * abs(gain[k]) and (best is None or saved > best[0]):
                best = saved, np.delete(wider, worst)
        if best is None:
            break
        kept = best[1]
    return kept


def _gains(p: Problem, kept: Labels, gone: Labels) -> Matrix:
    """How much each absent element would lower the error."""
    stays, gram = p.stays(kept), p.damped
    inner = gram[np.ix_(stays, stays)]
    flat = p.rows[gone]
    side = gram[np.ix_(stays, flat.ravel())]
    # target cross terms that the kept rows leave over
    target = gram @ p.weight
    both = solve(inner, np.concatenate([side, target[stays]], axis=1))
    half, fitted = both[:, : side.shape[1]], both[:, side.shape[1] :]
    left = (target[flat.ravel()] - side.T @ fitted).reshape(*flat.shape, -1)
    schur = gram[flat[:, :, None], flat[:, None, :]]
    cut = side.reshape(len(stays), *flat.shape), half.reshape(len(stays), *flat.shape)
    schur = schur - np.einsum("rea,reb->eab", *cut, optimize=True)
    return np.asarray((left * np.linalg.solve(schur, left)).sum(axis=(1, 2))) / max(p.energy, 1e-30)


def _drops(p: Problem, kept: Labels) -> Matrix:
    """How much the error would grow without each kept element."""
    stays, gram = p.stays(kept), p.damped
    inverse = solve(gram[np.ix_(stays, stays)], np.eye(len(stays)))
    weight = inverse @ (gram[stays] @ p.weight)
    place = np.full(len(gram), -1)
    place[stays] = np.arange(len(stays))
    state = _State(inverse, weight, place[p.rows], max(p.energy, 1e-30))
    return state.costs(kept)
