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
_SWAP_SIZE = 4096
"""Up to this many rows of all readers together swaps are tried: each costs a few passes over as large a matrix."""


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

    def seen_by(self, root: Matrix | None) -> Problem:
        """Return the same problem with errors ``e`` of the outputs measured as ``|root e|²``.

        None leaves it as it is.
        """
        if root is None or not np.isfinite(self.energy):
            return self
        weight = self.weight @ root
        return Problem(
            self.gram, weight, self.rows, float(np.einsum("ko,ko->", weight, self.gram @ weight)), self.damping
        )

    def stays(self, keep: Labels) -> Labels:
        """Return rows that stay when these elements do."""
        mask = np.ones(len(self.gram), bool)
        mask[self.rows.ravel()] = False
        mask[self.rows[keep].ravel()] = True
        return np.flatnonzero(mask)

    def refit(self, keep: Labels) -> Matrix:
        """Return the best weight with zeros in the rows of all other elements."""
        return self.without(np.setdiff1d(np.arange(len(self.gram)), self.stays(keep), assume_unique=True))

    def without(self, rows: Labels) -> Matrix:
        """Return the best weight with zeros in some rows."""
        stays = np.setdiff1d(np.arange(len(self.gram)), rows)
        gram = self.damped
        out = np.zeros_like(self.weight)
        out[stays] = solve(gram[np.ix_(stays, stays)], gram[stays] @ self.weight)
        return out

    def error(self, weight: Matrix) -> float:
        """Return mean squared error of the output with another weight, relative to its variance."""
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


def _each(blocks: Matrix, targets: Matrix) -> Matrix:
    """``blocks⁻¹ targets`` for a stack of small matrices; the pseudo-inverse where one is singular by rounding."""
    try:
        return np.asarray(np.linalg.solve(blocks, targets))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.pinv(blocks) @ targets)


def removal_costs(inverse: Matrix, weight: Matrix, rows: Labels) -> Matrix:
    """Return ``tr(W_Sᵀ [(G⁻¹)_SS]⁻¹ W_S)`` for each set S: the growth of the squared error without these rows of W.

    Args:
        inverse: of the Gram matrix, (K, K).
        weight: (K, outputs).
        rows: (sets, k), the rows in each set.
    """
    return _quadratic(inverse[rows[:, :, None], rows[:, None, :]], weight[rows])


def _quadratic(blocks: Matrix, own: Matrix) -> Matrix:
    """``tr(ownᵀ blocks⁻¹ own)`` for each of a stack: (n, k, k) and (n, k, outputs) to (n,)."""
    if blocks.shape[1] == 1:
        return np.asarray((own[:, 0] ** 2).sum(axis=1) / blocks[:, 0, 0])
    return np.asarray((own * _each(blocks, own)).sum(axis=(1, 2)))


def eliminate(problems: Sequence[Problem], count: int, floor: int = 1) -> Labels:
    """Return elements in the order in which they should go, first to go first.

    The last ``floor`` in no special order.
    """
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
    """Return the first ``number`` of a pool, one by one, each after the others' absence is made up for."""
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
        """Return the same for these elements alone: what happens to the others does not change their costs."""
        rows = self.rows[elements]
        flat = rows.ravel()
        block = self.inverse[np.ix_(flat, flat)]
        return _State(block, self.weight[flat].copy(), np.arange(rows.size).reshape(rows.shape), self.energy)

    def costs(self, elements: Labels) -> Matrix:
        return removal_costs(self.inverse, self.weight, self.rows[elements]) / self.energy

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


@dataclass
class Swaps:
    """Finds better sets of kept elements by exchanging one for another, from set to set without factorizing again."""

    problems: Sequence[Problem]
    count: int
    _swept: list[_Swept] | None = field(default=None, repr=False)

    def improve(self, keep: Labels) -> Labels:
        """Swap a kept element for one that is gone while that lowers the error; gives the kept elements, sorted."""
        kept = np.sort(keep)
        large = sum(len(p.gram) for p in self.problems) > _SWAP_SIZE
        if not self.problems or large or not 0 < len(kept) < self.count:
            return kept
        self._swept = self._swept or [_Swept.of(p) for p in self.problems]
        for s in self._swept:
            s.move(kept)
        for _ in range(_SWAPS):
            gone = np.setdiff1d(np.arange(self.count), kept, assume_unique=True)
            gain = np.sum([s.gains(gone) for s in self._swept], axis=0)
            best = max((self._exchange(kept, gone[k], gain[k]) for k in np.argsort(-gain)[:_TRIED]), default=None)
            if best is None or best[0] <= 0.0:
                break
            _, enters, leaves = best
            for s in self._swept:
                s.pivot(np.asarray([enters]), enter=True)
                s.pivot(np.asarray([leaves]), enter=False)
            kept = np.sort(np.append(kept[kept != leaves], enters))
        return kept

    def _exchange(self, kept: Labels, enters: int, gain: float) -> tuple[float, int, int]:
        """Return what is saved when an element comes and the one that is missed least then goes.

        0 where that is rounding.
        """
        assert self._swept is not None
        cost = np.sum([s.drops(kept, enters) for s in self._swept], axis=0)
        worst = int(np.argmin(cost))
        saved = float(gain - cost[worst])
        return (saved if saved > 1e-6 * abs(gain) else 0.0), int(enters), int(kept[worst])


@dataclass
class _Swept:
    """A least-squares problem under the sweep operator, which takes rows in and out at the cost of one update.

    With s the rows that stay and g the others, ``matrix`` holds ``-(G_ss)⁻¹``, ``(G_ss)⁻¹ G_sg`` and the Schur
    complement of g; ``target`` holds the fitted weights, and what they leave over of ``G W``. Source: Goodnight 1979.
    """

    matrix: Matrix
    target: Matrix
    rows: Labels
    energy: float
    stays: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, problem: Problem) -> _Swept:
        """With all rows in."""
        inverse = solve(problem.damped, np.eye(len(problem.gram)))
        stays = np.ones(len(problem.rows), bool)
        matrix = np.ascontiguousarray(-(inverse + inverse.T) / 2)
        return cls(matrix, problem.weight.copy(), problem.rows, max(problem.energy, 1e-30), stays)

    def move(self, kept: Labels) -> None:
        """Take elements in and out until these are in."""
        wanted = np.zeros(len(self.stays), bool)
        wanted[kept] = True
        for enter, change in ((True, wanted & ~self.stays), (False, self.stays & ~wanted)):
            if change.any():
                self.pivot(np.flatnonzero(change), enter=enter)

    def pivot(self, elements: Labels, *, enter: bool) -> None:
        """Take elements in or out."""
        rows = self.rows[elements].ravel()
        side, block, aim = self.matrix[rows], self.matrix[np.ix_(rows, rows)], self.target[rows]
        sign = 1.0 if enter else -1.0
        flat = sign * solve(sign * block, np.concatenate([side, aim, np.eye(len(rows))], axis=1))
        half, fitted, inverse = np.split(flat, [side.shape[1], side.shape[1] + aim.shape[1]], axis=1)
        # in place: the matrix is symmetric, so its transpose is the same one in Fortran's order
        dgemm(-1.0, side.T, half.T, 1.0, self.matrix.T, trans_b=True, overwrite_c=True)
        self.target -= side.T @ fitted
        self.matrix[rows], self.matrix[:, rows] = sign * half, sign * half.T
        self.matrix[np.ix_(rows, rows)], self.target[rows] = -inverse, sign * fitted
        self.stays[elements] = enter

    def gains(self, gone: Labels) -> Matrix:
        """Return how much each absent element would lower the error."""
        return removal_costs(self.matrix, self.target, self.rows[gone]) / self.energy

    def drops(self, kept: Labels, enters: int | None = None) -> Matrix:
        """Return how much the error would grow without each kept element, once another one has entered."""
        own_rows = self.rows[kept]
        block, aim = self.matrix[own_rows[:, :, None], own_rows[:, None, :]], self.target[own_rows]
        if enters is not None:
            rows = self.rows[enters]
            side = self.matrix[self.rows[kept][:, :, None], rows]  # elements, k, k of the one that enters
            own = self.matrix[np.ix_(rows, rows)]
            block = block - side @ _each(own, side.transpose(0, 2, 1))
            aim = aim - side @ _each(own, self.target[rows])
        return _quadratic(-block, aim) / self.energy
