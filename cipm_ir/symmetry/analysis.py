"""The symmetry analysis of a graph, and how a choice of elements becomes an action on atoms."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from cipm_ir.algebra import Element
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.symmetry.classes import Classes, atoms_by_class
from cipm_ir.symmetry.consumers import Consumers
from cipm_ir.symmetry.counting import Count
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.parts import with_parts
from cipm_ir.symmetry.scales import Directions, solve_scales
from cipm_ir.symmetry.spaces import Linearity, RawSpace, find_spaces
from cipm_ir.symmetry.walk import Walk, walk
from cipm_ir.symmetry.whole_axes import classes_of


@contextmanager
def gc_paused() -> Iterator[None]:
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
        with gc_paused():
            walked = walk(model)
            classes = classes_of(walked)
            classes, spaces = with_parts(walked, classes, find_spaces(classes))
            directions = solve_scales(walked, classes, spaces)
            kept = [k for k, s in enumerate(spaces) if s.kind != "cells" or directions[k].scales or directions[k].signs]
            return cls(walked, classes, [spaces[k] for k in kept], [directions[k] for k in kept])

    def without_statistics(self, inner: Sequence[Labels]) -> Analysis:
        """Return the same without some statistics: those of a group do not change when the whole group is removed."""
        across = list(self.walk.rec.normalized)
        for labels in inner:
            same = next((k for k, one in enumerate(across) if np.array_equal(one, labels.ravel())), None)
            if same is not None:
                del across[same]
        return replace(self, walk=replace(self.walk, rec=replace(self.walk.rec, normalized=across)))

    @cached_property
    def consumers(self) -> Consumers:
        """What uses the classes, looked up by class."""
        return Consumers(self.walk, self.classes)

    @cached_property
    def _order(self) -> tuple[Labels, Labels]:
        return atoms_by_class(self.classes)

    def atoms_of(self, members: Labels) -> Labels:
        """Atoms of some classes in matching order: shape (len(members), atoms per class), for alike classes."""
        order, start = self._order
        width = int(start[members[0] + 1] - start[members[0]])
        return np.asarray(order[start[members][:, None] + np.arange(width)])

    def atom_source(self, elements: Mapping[int, Element]) -> Labels:
        """For each atom, the one whose place it takes: units first, then parts, then blocks from inner to outer."""
        source = np.arange(len(self.classes.of))
        classes = np.arange(self.classes.count)
        for k in sorted(elements):
            perm, atoms = elements[k].perm, self.part_atoms(k)
            if atoms is None:
                classes = classes[self._class_step(k, perm)]
                continue
            source = source[self._atoms_moved(classes)]
            classes = np.arange(self.classes.count)
            step = np.arange(len(source))
            step[atoms] = atoms[perm]
            source = source[step]
        return np.asarray(source[self._atoms_moved(classes)])

    def part_atoms(self, k: int) -> Labels | None:
        """Atoms of the parts of a space in matching order, (parts, atoms); None for a space of classes."""
        return self._part_atoms.get(int(self.spaces[k].table[0, 0]))

    @cached_property
    def _part_atoms(self) -> dict[int, Labels]:
        parts = self.classes.parts
        return {int(numbers[0]): atoms for numbers, atoms in zip(parts.spaces, parts.atoms, strict=True)}

    def places_of(self, k: int) -> tuple[Labels, Labels]:
        """Return classes and cells (`Classes.refined`) that belong to a space, and to which of its elements each."""
        table, parts, count = self.spaces[k].table, self.classes.parts, self.classes.count
        places, element = table.ravel(), np.repeat(np.arange(len(table)), table.shape[1])
        if len(parts.cell_class):
            owner = np.full(count, -1, np.int64)
            owner[places] = element
            held = np.maximum(owner[parts.cell_class], owner[parts.cell_part])
            cells = np.flatnonzero(held >= 0)
            places, element = np.r_[places, count + cells], np.r_[element, held[cells]]
        return places, element

    def elements_of(self, k: int) -> Labels:
        """Of each class and cell, the element of a space that it belongs to, or -1."""
        out = np.full(self.classes.count + len(self.classes.parts.cell_class), -1, np.int64)
        places, element = self.places_of(k)
        out[places] = element
        return out

    def _class_step(self, k: int, perm: Labels) -> Labels:
        table, step = self.spaces[k].table, np.arange(self.classes.count)
        step[table.ravel()] = table[perm].ravel()
        return step

    def _atoms_moved(self, source: Labels) -> Labels:
        """Return an exchange of classes as one of atoms: the k-th by colour goes with the k-th."""
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
            out[f.base : f.base + f.size] = f.scale_var
        return out

    def atom_scale(self, elements: dict[int, Element]) -> Array:
        """Return what each atom's position is multiplied by (signs included)."""
        scale = np.ones(len(self.classes.of))
        for k in sorted(elements):
            element, space, free = elements[k], self.spaces[k], self.directions[k]
            if space.kind == "blocks" or space.table.shape[1] > 1:
                scale = scale[self.atom_source({k: element})]  # a block takes its contents' scales along
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
        where = np.full(self.classes.count + len(self.classes.parts.cell_class), -1, np.int64)
        for position, node in enumerate(walk.nodes if any(paths) else ()):
            if not paths[position]:
                continue
            for k in range(len(node.inputs)):
                state = walk.input_state(position, k)
                for f in () if state is None else state.factors:
                    where[self.classes.refined(f.labels)] = position
        found = [int(where[self.places_of(k)[0]].max(initial=-1)) for k in range(len(self.spaces))]
        return [paths[position] if position >= 0 else "" for position in found]

    def factor_positions(self, f: LeafFactor, members: Labels) -> Labels:
        """Return positions of classes along a one-axis factor, by occurrence: (classes, occurrences)."""
        atoms = self.atoms_of(members)
        inside = (atoms[0] >= f.base) & (atoms[0] < f.base + f.size)
        return np.asarray(atoms[:, inside] - f.base)
