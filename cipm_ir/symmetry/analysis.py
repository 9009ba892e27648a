"""The symmetry analysis of a graph, and how a choice of elements becomes an action on atoms."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from cipm_ir.algebra import Element
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.symmetry.classes import Classes
from cipm_ir.symmetry.counting import Count
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.scales import Directions, solve_scales
from cipm_ir.symmetry.spaces import RawSpace, find_spaces
from cipm_ir.symmetry.walk import Walk, walk
from cipm_ir.symmetry.whole_axes import classes_of

if TYPE_CHECKING:
    from cipm_ir.symmetry.dense import Linearity


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: what is allocated stays, and scanning it again and again takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Analysis:
    """Walk, classes, spaces and scale directions of one graph; independent of the values of its weights."""

    walk: Walk
    classes: Classes
    spaces: list[RawSpace]
    directions: list[Directions]
    linear: list[Linearity] | None = field(default=None, repr=False)
    """Which spaces admit dense groups, once `cipm_ir.symmetry.dense.linearities` was asked."""
    counts: dict[tuple[tuple[str, int], ...], Count] = field(default_factory=dict, repr=False)
    """Multiply-accumulates at the sizes that were asked for (`Program.count`)."""

    @classmethod
    def of(cls, model: ir.Model) -> Analysis:
        """Analyse a model without model-local functions."""
        with uncollected():
            walked = walk(model)
            classes = classes_of(walked)
            spaces = find_spaces(classes)
            directions = solve_scales(walked, classes, spaces)
            kept = [k for k, s in enumerate(spaces) if s.kind != "cells" or directions[k].scales or directions[k].signs]
            return cls(walked, classes, [spaces[k] for k in kept], [directions[k] for k in kept])

    @cached_property
    def _order(self) -> tuple[Labels, Labels]:
        """Atoms by (class, colour), and where each class starts."""
        order = np.lexsort((self.classes.colour, self.classes.of))
        return order, np.searchsorted(self.classes.of[order], np.arange(self.classes.count + 1))

    def atoms_of(self, members: Labels) -> Labels:
        """Atoms of some classes in matching order: shape (len(members), atoms per class), for alike classes."""
        order, start = self._order
        width = int(start[members[0] + 1] - start[members[0]])
        return np.asarray(order[start[members][:, None] + np.arange(width)])

    def class_source(self, elements: dict[int, Element]) -> Labels:
        """For each class, the class whose place it takes over: units first, then blocks from inner to outer."""
        source = np.arange(self.classes.count)
        for k in sorted(elements):
            table, perm = self.spaces[k].table, elements[k].perm
            step = np.arange(self.classes.count)
            step[table.ravel()] = table[perm].ravel()
            source = source[step]
        return source

    def atom_source(self, source: Labels) -> Labels:
        """The same for atoms: the k-th by colour goes with the k-th."""
        out = np.arange(len(self.classes.of))
        order, start = self._order
        moved = np.flatnonzero(source != np.arange(len(source)))
        if len(moved):
            width = start[moved + 1] - start[moved]
            offset = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
            out[order[np.repeat(start[moved], width) + offset]] = order[np.repeat(start[source[moved]], width) + offset]
        return out

    @cached_property
    def variable_of(self) -> Labels:
        """Scale variable of each atom of a parameter; 0 elsewhere."""
        out = np.zeros(len(self.classes.of), np.int64)
        for f in self.walk.leaf_factors:
            out[f.base : f.base + f.size] = f.var
        return out

    def atom_scale(self, elements: dict[int, Element]) -> Array:
        """What each atom's position is multiplied by (signs included)."""
        scale = np.ones(len(self.classes.of))
        source = np.arange(self.classes.count)
        for k in sorted(elements):
            element, space, free = elements[k], self.spaces[k], self.directions[k]
            step = np.arange(self.classes.count)
            step[space.table.ravel()] = space.table[element.perm].ravel()
            if space.kind == "blocks" or space.table.shape[1] > 1:
                scale = scale[self.atom_source(step)]  # a block takes its contents' scales along
                source = source[step]
                continue
            if not element.scales and not element.signs:
                continue
            atoms = self.atoms_of(space.table[:, 0])
            for column in range(atoms.shape[1]):
                var = int(self.variable_of[atoms[0, column]])
                up, flip = free.scale.get(var), free.sign.get(var)
                factor = np.ones(len(atoms))
                for d, e in enumerate(up or ()):
                    if e:
                        factor = factor * element.scale[d] ** e if e > 0 else factor / element.scale[d] ** -e
                for d, e in enumerate(flip or ()):
                    if e:
                        factor = factor * element.sign[d]
                if up or flip:
                    scale[atoms[:, column]] = factor
        return scale

    @cached_property
    def bodies(self) -> list[str]:
        """For each space, the path of a body of If, Loop or Scan that uses its units; "" where none does.

        Values inside bodies cannot be looked at over data: they are no outputs of the main graph.
        """
        walk, paths = self.walk, self.walk.paths
        where = np.full(self.classes.count, -1, np.int64)
        for position, node in enumerate(walk.nodes if any(paths) else ()):
            if not paths[position]:
                continue
            for k, value in enumerate(node.inputs):
                leaf = walk.use_leaf.get((position, k))
                state = walk.states.get(value.name or "") if value is not None else None
                state = state if leaf is None else walk.leaves[leaf].state
                for f in () if state is None else state.factors:
                    where[self.classes.of[f.labels]] = position
        found = [int(where[space.table].max(initial=-1)) for space in self.spaces]
        return [paths[position] if position >= 0 else "" for position in found]

    def factor_positions(self, f: LeafFactor, members: Labels) -> Labels:
        """Positions of classes along a one-axis factor, by occurrence: (classes, occurrences)."""
        atoms = self.atoms_of(members)
        inside = (atoms[0] >= f.base) & (atoms[0] < f.base + f.size)
        return np.asarray(atoms[:, inside] - f.base)
