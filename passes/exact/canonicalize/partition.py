"""An ordered partition of the classes: the colour of a class is how many classes come before its cell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.labels import Labels, mix
from cipm_ir.passes.exact.canonicalize.members import Floats
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.classes import Hashes, components

_CLOSE = 1e-5
_SMALL = 8


class Partition:
    """Cells of classes that may still be exchanged; splitting keeps the order of the cells.

    At first, the cells are the orbits of the permutations, so that classes of sibling blocks start in one cell.
    """

    def __init__(self, analysis: Analysis) -> None:
        pairs = []
        classes, parts = analysis.classes, analysis.classes.parts
        count = classes.count + len(parts.cell_class)
        cells = np.arange(classes.count, count)
        moves = classes.free[parts.cell_class]  # parts may exchange cells of classes that are fixed
        self._parent = np.r_[parts.cell_class[moves], parts.cell_part]  # both are blocks of the cells that they hold
        self._child = np.r_[cells[moves], cells]
        self._heads = np.zeros(count, bool)
        self._heads[self._parent] = True
        for k, raw in enumerate(analysis.spaces):
            table = raw.table
            if raw.kind != "cells" and len(table) > 1:
                pairs.append((table[1:].ravel(), np.broadcast_to(table[0], table[1:].shape).ravel()))
                pairs += _exchanged_cells(analysis, k) if len(cells) else []
            if table.shape[1] > 1:
                self._heads[table[:, 0]] = True
                self._parent = np.r_[self._parent, np.repeat(table[:, 0], table.shape[1] - 1)]
                self._child = np.r_[self._child, table[:, 1:].ravel()]
        number, label = components(count, pairs)
        first = np.full(number, count, np.int64)
        np.minimum.at(first, label, np.arange(count))
        size = np.bincount(label, minlength=number)
        order = np.argsort(first)
        start = np.empty(number, np.int64)
        start[order] = np.cumsum(size[order]) - size[order]
        self.colour: Labels = start[label]
        self._orbit = label

    def tied(self) -> npt.NDArray[np.bool_]:
        """Return classes that share their colour."""
        if self._tied is None:
            self._tied = np.bincount(self.colour, minlength=len(self.colour))[self.colour] > 1
        return self._tied

    _tied: npt.NDArray[np.bool_] | None = None

    def split(self, classes: Labels, keys: Labels) -> bool:
        """Split cells by the rows of ``keys`` (classes, columns); every class of such a cell must be given."""
        classes, keys = self._whole(classes, keys)
        if not len(classes):
            return False
        colour = self.colour[classes]
        order = np.lexsort((*keys.T[::-1], colour))
        keys, colour = keys[order], colour[order]
        return self._cut(classes[order], colour, (keys[1:] != keys[:-1]).any(1))

    def split_close(self, classes: Labels, key: Floats, size: Floats) -> bool:
        """Split cells by one number per class that is known up to about 1e-7 of ``size``.

        Large cells into about as many ranges of equal width as the root of their size, small ones at gaps: sorting a
        large cell by one number would compare too many neighbours that differ by no more than the noise.
        """
        whole = self._complete(classes)
        classes, key, size = classes[whole], key[whole], size[whole]
        if not len(classes):
            return False
        order = np.lexsort((key, self.colour[classes]))
        classes, key, size = classes[order], key[order], size[order]
        colour = self.colour[classes]
        starts = np.flatnonzero(np.r_[True, colour[1:] != colour[:-1]])
        count = np.diff(np.r_[starts, len(colour)])
        bound = np.maximum.reduceat(size, starts) * _CLOSE
        mean = np.repeat(np.add.reduceat(key, starts) / count, count)
        deviation = np.sqrt(np.add.reduceat((key - mean) ** 2, starts) / count)
        width = np.maximum(4 * deviation / np.sqrt(count), bound)
        # The offset keeps values that sit exactly on the mean away from the edge of a range.
        rung = np.floor((key - mean) / np.repeat(np.where(width > 0, width, 1.0), count) + 0.37)
        gap = np.diff(key) > np.repeat(bound, count)[1:]
        return self._cut(classes, colour, np.where(np.repeat(count, count)[1:] > _SMALL, rung[1:] != rung[:-1], gap))

    def propagate(self) -> None:
        """Let blocks learn from what they hold, and the other way round, until nothing changes."""
        while len(self._parent) and self.tied().any():
            with np.errstate(over="ignore"):
                key: Hashes = np.zeros(len(self.colour), np.uint64)
                np.add.at(key, self._parent, mix(self.colour[self._child]))
                np.add.at(key, self._child, mix(self.colour[self._parent] + (1 << 40)))
            tied = np.flatnonzero(self.tied())
            if not self.split(tied, key[tied, None].view(np.int64)):
                return

    def choose(self, *, single: bool) -> None:
        """Split by the order the classes came in, blocks before units: one tied cell, or all that began as one with it.

        Of a small cell, only the first class is set apart: what is left may tell the others apart.
        """
        tied = self.tied()
        among = np.flatnonzero(tied & self._heads if (tied & self._heads).any() else tied)
        first = among[self.colour[among].argmin()]
        if single:
            cell = np.flatnonzero(self.colour == self.colour[first])
            key = np.arange(len(cell))
            self.split(cell, (np.minimum(key, 1) if len(cell) <= _SMALL else key)[:, None])
            return
        orbit = np.flatnonzero(tied & (self._orbit == self._orbit[first]))
        self.split(orbit, orbit[:, None])

    def spread_all(self) -> None:
        """Keep the order that the classes came in wherever they are tied."""
        tied = np.flatnonzero(self.tied())
        self.split(tied, tied[:, None])

    # ------------------------------------------------------------ cells
    def _complete(self, classes: Labels) -> npt.NDArray[np.bool_]:
        colour = self.colour[classes]
        given = np.bincount(colour, minlength=len(self.colour))
        size = np.bincount(self.colour, minlength=len(self.colour))
        return np.asarray((given == size)[colour] & (size[colour] > 1))

    def _whole(self, classes: Labels, keys: Labels) -> tuple[Labels, Labels]:
        whole = self._complete(classes)
        return classes[whole], keys[whole]

    def _cut(self, classes: Labels, colour: Labels, between: npt.NDArray[np.bool_]) -> bool:
        """Return new colours for classes in order of (colour, key).

        With a cut wherever ``between`` neighbours of one cell.
        """
        cell = np.r_[True, colour[1:] != colour[:-1]]
        group = cell | np.r_[True, between]
        place = np.arange(len(classes))
        offset = np.maximum.accumulate(np.where(group, place, 0)) - np.maximum.accumulate(np.where(cell, place, 0))
        if not offset.any():
            return False
        self.colour[classes] = colour + offset
        self._tied = None
        return True


def _exchanged_cells(analysis: Analysis, k: int) -> list[tuple[Labels, Labels]]:
    """Cells and parts that the elements of a space exchange, as pairs."""
    atoms, parts, count = analysis.part_atoms(k), analysis.classes.parts, analysis.classes.count
    tables = [analysis.atoms_of(column) for column in analysis.spaces[k].table.T] if atoms is None else [atoms]
    pairs = []
    for table in tables:
        cell = analysis.classes.refined(table)
        cell = cell[:, cell[0] >= count] - count
        first = np.broadcast_to(cell[0], cell[1:].shape)
        pairs.append((cell[1:].ravel() + count, first.ravel() + count))
        pairs.append((parts.cell_part[cell[1:]].ravel(), parts.cell_part[first].ravel()))
    return pairs
