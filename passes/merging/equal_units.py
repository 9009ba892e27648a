"""Units that compute the same up to an element of their space's group: found, and brought to the same gauge.

1. Every tensor that makes the units gives each unit a row. A scale t of the unit multiplies the row of a tensor with
   exponent e by t^e, a sign by its parity; so the logarithms of the rows' norms fix the scales (least squares, which
   solves the equations of two duplicates by the same shift), and the signs of generic projections fix the signs.
2. Two units are duplicates when, in this gauge, each row of one lies within the tolerance of that of the other,
   relative to its norm. Rows that are zero must be zero in both.
3. The first unit of a class of duplicates stays. The others are compared with it, never with each other, so that
   errors do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cipm_ir.algebra import Element
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.members import Floats
from cipm_ir.passes.merging.rows import Row, UnitRows

_SEED = 0
_WIDE = 8.0
"""How far a projection of two duplicates may lie apart, in tolerances per tensor: eight standard deviations."""


@dataclass(frozen=True, eq=False)
class Duplicates:
    """``leader[i]``: the unit that stands for unit i. ``element`` brings each unit to the gauge of its leader."""

    leader: Labels
    element: Element

    @property
    def extra(self) -> Labels:
        """Units that another one stands for, sorted."""
        return np.flatnonzero(self.leader != np.arange(len(self.leader)))

    def only(self, extra: Labels) -> Duplicates:
        """Return the same with all other units leading themselves."""
        chosen = np.zeros(len(self.leader), bool)
        chosen[extra] = True
        scale, sign = np.where(chosen, self.element.scale, 1.0), np.where(chosen, self.element.sign, 1)
        leader = np.where(chosen, self.leader, np.arange(len(chosen)))
        return Duplicates(leader, Element(self.element.perm, scale, sign.astype(np.int8)))


def find_duplicates(rows: UnitRows, tolerance: float) -> Duplicates:
    """Duplicates among the units of a space; where there are none, everyone leads himself. NaN is equal to nothing."""
    n, group = rows.space.size, rows.space.group
    rng = np.random.default_rng(_SEED)
    made = rows.producers
    first = [rng.standard_normal(row.width) for row in made]
    second, weights = zip(*((rng.standard_normal(row.width), rng.standard_normal()) for row in made), strict=True)
    looks = [_looked_at(row, pair) for row, *pair in zip(made, first, second, strict=True)]
    norms, signs, along = (np.stack(columns, axis=1) for columns in zip(*looks, strict=True))
    finite = np.isfinite(norms).all(axis=1)
    scale, sign = np.zeros((n, group.scales)), np.zeros((n, group.signs), np.int64)
    exponents = np.stack([row.scale for row in rows.producers])
    parities = np.stack([row.sign for row in rows.producers])
    negative = signs < 0
    present = (norms > 0) & finite[:, None]
    for pattern in np.unique(present, axis=0):
        here = np.flatnonzero((present == pattern).all(axis=1))
        if pattern.any():
            scale[here] = np.log2(norms[np.ix_(here, pattern)]) @ np.linalg.pinv(exponents[pattern].astype(float)).T
            sign[here] = _solve_signs(parities[pattern] % 2, negative[np.ix_(here, pattern)])
    factor = np.stack([np.exp2(-(scale @ row.scale)) * (1 - 2 * ((sign @ row.sign) % 2)) for row in made], axis=1)
    key = _keys(norms * np.abs(factor), along * factor, weights)
    leader = np.arange(n)
    for component in _candidates(key, np.flatnonzero(finite), _WIDE * len(made) * (tolerance + 1e-13)):
        _lead(component, made, factor, tolerance, leader)
    step = scale[leader] - scale
    step = np.where(np.abs(step - np.round(step)) <= tolerance, np.round(step), step)  # powers of two do not round
    flip = 1 - 2 * ((sign[leader] + sign) % 2)
    return Duplicates(leader, Element(np.arange(n), np.exp2(step).T, flip.T.astype(np.int8)))


def _solve_signs(parities: Labels, negative: Floats) -> Labels:
    """Per unit a flip of each direction, such that as many projections as possible become positive: over F2."""
    rows, bits = parities.copy(), negative.astype(np.int64)
    flips = np.zeros((len(bits), rows.shape[1]), np.int64)
    done = 0
    pivots = []
    for d in range(rows.shape[1]):
        hit = np.flatnonzero(rows[done:, d])
        if not len(hit):
            continue
        p = done + int(hit[0])
        rows[[done, p]], bits[:, [done, p]] = rows[[p, done]], bits[:, [p, done]]
        others = np.flatnonzero(rows[:, d])
        others = others[others != done]
        rows[others] ^= rows[done]
        bits[:, others] ^= bits[:, [done]]
        pivots.append(d)
        done += 1
    flips[:, pivots] = bits[:, :done]
    return flips


def _looked_at(row: Row, directions: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """Norms of the rows of all units, and their products with two directions, in one reading."""
    found = np.zeros((3, len(row.places)))
    for units, values in row.parts():
        found[0, units] = np.linalg.norm(values, axis=1)
        for k, direction in enumerate(directions):
            found[k + 1, units] = values @ direction
    return found[0], found[1], found[2]


def _keys(norms: Floats, along: Floats, weights: Sequence[float]) -> Floats:
    """Return a number per unit, nearly the same for duplicates.

    A random projection of directions and logarithms of norms.
    """
    size = np.where(norms > 0, norms, 1.0)
    return np.asarray((along / size + np.log2(size) * weights).sum(axis=1))


def _candidates(key: Floats, units: Labels, gap: float) -> Iterator[Labels]:
    """Sets of units of which no two from different sets can be duplicates: gaps in their keys."""
    order = np.argsort(key[units], kind="stable")
    cuts = np.flatnonzero(np.diff(key[units][order]) > gap) + 1
    for part in np.split(order, cuts):
        if len(part) > 1:
            yield np.sort(units[part])


def _lead(units: Labels, made: Sequence[Row], factor: Floats, tolerance: float, leader: Labels) -> None:
    """The first unit takes those that equal it; what is left goes on without them.

    ``factor``: (units, tensors), what brings each row to the common gauge.
    """
    while len(units) > 1:
        same = units
        for k, row in enumerate(made):
            rows = row.of(same) * factor[same, k, None]
            largest = np.maximum(np.linalg.norm(rows, axis=1), np.linalg.norm(rows[0]))
            same = same[np.linalg.norm(rows - rows[0], axis=1) <= tolerance * largest]
            if len(same) < 2:
                break
        leader[same] = units[0]
        units = np.setdiff1d(units[1:], same)
