"""Sizes and kept positions of every axis when some classes are dropped.

A factor over several axes is a grid (heads by head dim). The rest must again be a grid: rows go as wholes, and
the rows that stay keep equally many entries, because a reshape fixes the row length.
"""

from __future__ import annotations

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Factor, Labels, State

Mask = np.ndarray


def outer_first(labels: Labels) -> list[int]:
    """Dimensions of a label array from the slowest to the fastest moving: rows before columns."""
    if labels.ndim == 1:
        return [0]
    corner = int(labels[(0,) * labels.ndim])
    extent = [
        abs(int(labels[tuple(-1 if j == k else 0 for j in range(labels.ndim))]) - corner) for k in range(labels.ndim)
    ]
    return sorted(range(labels.ndim), key=lambda k: -extent[k])


def grid_shape(mask: Mask, order: list[int]) -> tuple[int, ...] | None:
    """Return sizes of what remains of a grid, None where it is ragged."""
    table = mask.transpose(order)
    sizes = []
    alive: Mask = np.ones((), bool)
    for k in range(table.ndim):
        some: Mask = np.asarray(table.any(axis=tuple(range(k + 1, table.ndim))))
        counts = some.sum(axis=-1)
        counts = counts[alive] if counts.ndim else counts.reshape(1)
        if counts.size == 0 or (counts != counts.flat[0]).any():
            return None
        sizes.append(int(counts.flat[0]))
        alive = some
    out = [0] * table.ndim
    for k, axis in enumerate(order):
        out[axis] = sizes[k]
    return tuple(out)


class Sizes:
    """Shapes and positions after a restriction; ``keep`` says for each atom whether it stays."""

    def __init__(self, keep: Mask, describe: dict[str, State]) -> None:
        self.keep = keep
        self.states = describe
        self._cache: dict[int, tuple[Labels, tuple[int, ...] | None]] = {}

    def factor(self, f: Factor) -> tuple[int, ...] | None:
        """Return sizes of a factor's axes afterwards; None where the rest is ragged."""
        known = self._cache.get(id(f.labels))
        if known is None:
            mask = self.keep[f.labels]
            if mask.all():
                shape: tuple[int, ...] | None = f.labels.shape
            elif f.labels.ndim == 1:
                shape = (int(mask.sum()),)
            else:
                shape = grid_shape(mask, outer_first(f.labels))
            known = self._cache[id(f.labels)] = (f.labels, shape)
        return known[1]

    def shape(self, state: State, name: str) -> tuple[int, ...]:
        """Return the shape of a value afterwards."""
        new = list(state.shape)
        for f in state.factors:
            sizes = self.factor(f)
            if sizes is None:
                raise SymmetryError(
                    f"What would remain of {name} along axes {list(f.axes)} is ragged: its rows (heads, groups) "
                    "must keep equally many units; keep the same number in every block."
                )
            for axis, size in zip(f.axes, sizes, strict=True):
                new[axis] = size
        if 0 in new and 0 not in state.shape:
            raise SymmetryError(f"Nothing would remain of axis {new.index(0)} of {name}; keep at least one unit.")
        return tuple(new)

    def positions(self, state: State, axis: int, name: str) -> Labels:
        """Kept positions along an axis."""
        f = state.factor_of(axis)
        if f is None:
            return np.arange(state.shape[axis])
        mask = self.keep[f.labels]
        k = f.axes.index(axis)
        if mask.ndim == 1:
            return np.flatnonzero(mask)
        table = np.moveaxis(mask, k, 0).reshape(mask.shape[k], -1)
        some = table[:, table.any(axis=0)]
        if (some != some[:, :1]).any():
            raise SymmetryError(
                f"Along axis {axis} of {name} every row must keep the same positions, because an index is taken there."
            )
        return np.flatnonzero(some[:, 0]) if some.size else np.zeros(0, np.int64)
