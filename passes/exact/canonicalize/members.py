"""What the canonical form is read from: every axis of every parameter that moves, and the values along it.

A *member* is one factor of one parameter: each of its positions holds an atom of some class, and the entries at that
position are the *row* of the class there. Entries are compared as float64, which holds every smaller type exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.constants import constant_tensor
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.classes import kinds_of_atoms
from cipm_ir.symmetry.consumers import Incidence
from cipm_ir.symmetry.leaves import Leaf, LeafFactor
from cipm_ir.symmetry.program import Program

Floats = npt.NDArray[np.float64]
CHUNK = 1 << 18
_KEPT_BYTES = 1 << 26
"""Of edited tensors, evaluated ones that are kept: an eighth of the weights of a model of half a gigabyte."""


@dataclass
class Member:
    """One factor with, per position: the class, what is ordered, and the exponents of its directions.

    ``places`` names the class, or the cell where it crosses a part (`Classes.refined`): that has a colour. ``rank``:
    which of the atoms there this is.

    ``scale`` is (positions, directions) over those scale directions of the spaces, ``scale_at``, that play a part here;
    ``sign`` holds the parities of the sign directions ``sign_at``.
    ``line``: every other axis of the parameter has size 1, so that a row is one number. ``epsilon``: a variance, whose
    scale acts on value + epsilon.
    """

    factor: LeafFactor
    shape: tuple[int, ...]
    classes: Labels
    places: Labels
    rank: Labels
    scale: Labels
    scale_at: Labels
    sign: Labels
    sign_at: Labels
    line: bool
    epsilon: float | None

    @property
    def axis(self) -> int:
        """The axis of the parameter that the positions lie on."""
        return self.factor.axes[-1]

    @property
    def groups(self) -> int:
        """0 for a plain axis; else positions are counted separately in each group of rows of axis 0."""
        return self.factor.groups

    def spread(self, vector: Array) -> Array:
        """Return a value per position, shaped so that it broadcasts against the parameter."""
        shape = [1] * len(self.shape)
        shape[self.axis] = self.shape[self.axis]
        if not self.groups:
            return vector.reshape(shape)
        shape[0] = self.shape[0]
        return vector.reshape(self.factor.shape)[self.group_of_rows()].reshape(shape)

    def group_of_rows(self) -> Labels:
        """For each row of axis 0, its group."""
        rows = self.shape[0]
        return np.asarray(np.arange(rows) * self.groups // rows, np.int64)

    def at(self, vector: Array, index: Sequence[Array]) -> Array:
        """Return a value per position, read at entries of the parameter: one index array per axis."""
        if not self.groups:
            return np.asarray(vector[index[self.axis]])
        return np.asarray(vector[index[0] * self.groups // self.shape[0] * self.factor.shape[1] + index[self.axis]])


class Members:
    """All members of a program in graph order, and their values.

    With ``exact``, directions whose powers of two would round are left out. An edited tensor that is not yet evaluated
    is evaluated once and kept, up to 64 MiB in all.
    """

    def __init__(self, program: Program, *, exact: bool) -> None:
        self.program = program
        self.analysis: Analysis = program.analysis
        self.count = self.analysis.classes.count
        self.exact = exact
        directions = self.analysis.directions
        self.scales = max((d.scales for d in directions), default=0)
        self.signs = max((d.signs for d in directions), default=0)
        self._rounding = [np.flatnonzero(~np.asarray(d.exact, bool) & exact) for d in directions]
        self._nodes = nodes_in_order(program.model.graph)
        self._arrays: dict[int, Array] = {}
        self._kept = 0
        self._finite: dict[int, bool] = {}
        self.space_of = np.full(self.count, -1, np.int64)
        for k, raw in enumerate(self.analysis.spaces):
            if raw.kind != "blocks" and raw.table.shape[1] == 1:
                self.space_of[raw.table[:, 0]] = k
        self.rank_of = self._ranks()
        self.moving = self._moving()
        self.all = [m for f in self.analysis.walk.leaf_factors if (m := self._member(f)) is not None]
        self.on_leaf: dict[int, list[Member]] = {}
        for m in self.all:
            self.on_leaf.setdefault(m.factor.leaf, []).append(m)

    @cached_property
    def _by_class(self) -> Incidence:
        return Incidence.of(m.classes for m in self.all)

    def holding(self, classes: Labels) -> list[Member]:
        """Return the members with a position of any of these classes, in graph order."""
        return [self.all[k] for k in self._by_class.holding(classes)]

    def _ranks(self) -> Labels:
        classes = self.analysis.classes
        of, parts = classes.refined(), classes.parts
        colour = classes.colour
        if parts.of is not None:
            colour = np.where(parts.of >= 0, kinds_of_atoms(self.analysis.walk, classes), colour)
        order = np.lexsort((colour, of))
        start = np.searchsorted(of[order], np.arange(int(of.max(initial=-1)) + 2))
        rank = np.empty(len(of), np.int64)
        rank[order] = np.arange(len(of)) - start[of[order]]
        return rank

    def _moving(self) -> npt.NDArray[np.bool_]:
        """Return classes and cells that some space exchanges or rescales."""
        moving = np.zeros(self.count + len(self.analysis.classes.parts.cell_class), bool)
        for k in range(len(self.analysis.spaces)):
            moving[self.analysis.places_of(k)[0]] = True
        return moving

    def _member(self, f: LeafFactor) -> Member | None:
        leaf = self.analysis.walk.leaves[f.leaf]
        span = slice(f.base, f.base + f.size)
        classes, places = self.analysis.classes.of[span], self.analysis.classes.refined(span)
        if not f.active or 0 in leaf.shape or not self.moving[places].any():
            return None
        scale, sign = self._exponents(f, classes)
        if f.epsilon is not None:  # a variance takes the square of a scale, and no sign
            scale, sign = 2 * scale, 0 * sign
        other = int(np.prod(leaf.shape)) // (f.shape[-1] * max(f.groups, 1))
        epsilon = None if self.exact else f.epsilon
        up, flip = np.flatnonzero(scale.any(0)), np.flatnonzero(sign.any(0))
        place = classes, places, self.rank_of[span]
        return Member(f, leaf.shape, *place, scale[:, up], up, sign[:, flip], flip, other == 1, epsilon)

    def _exponents(self, f: LeafFactor, classes: Labels) -> tuple[Labels, Labels]:
        scale = np.zeros((f.size, self.scales), np.int64)
        sign = np.zeros((f.size, self.signs), np.int64)
        space = self.space_of[classes]
        for k in np.unique(space[space >= 0]).tolist():
            free = self.analysis.directions[k]
            here = np.flatnonzero(space == k)
            up, flip = free.scale.get(f.scale_var), free.sign.get(f.scale_var)
            if up:
                scale[here, : free.scales] = up
                scale[here[:, None], self._rounding[k]] = 0
            if flip:
                sign[here, : free.signs] = np.asarray(flip) % 2
        return scale, sign

    # ------------------------------------------------------------ values
    def array(self, leaf: int) -> Array:
        """Return the parameter itself, unedited and in its own dtype."""
        known = self._arrays.get(leaf)
        if known is not None:
            return known
        tensor = _tensor(self._nodes, self.analysis.walk.leaves[leaf])
        array = np.asarray(tensor.numpy())
        if self.analysis.walk.leaves[leaf].filled:
            array = np.broadcast_to(array.reshape(()), self.analysis.walk.leaves[leaf].shape)
        lazy = isinstance(tensor, ir.LazyTensor)
        if not lazy or self._kept + array.nbytes <= _KEPT_BYTES:
            self._arrays[leaf] = array
            self._kept += array.nbytes if lazy else 0
        return array

    def finite(self, leaf: int) -> bool:
        """Return whether a parameter of a floating-point type holds no NaN and no infinity."""
        if leaf not in self._finite:
            array = self.array(leaf)
            step = max(1, CHUNK // max(1, array[:1].size))
            parts = (array[lo : lo + step] for lo in range(0, len(array), step))
            plain = array.dtype.kind == "f"
            self._finite[leaf] = all(np.isfinite(x if plain else x.astype(np.float32)).all() for x in parts)
        return self._finite[leaf]

    def blocks(
        self, leaf: int, weights: Sequence[Array], epsilon: float | None, *, narrow: bool = False
    ) -> Iterator[tuple[slice, Array]]:
        """Yield the parameter times some weights that broadcast, in slices of axis 0 that fit into the cache.

        With ``narrow``, products with moderate powers of two stay float32: exact unless they leave the normal range.
        """
        array = self.array(leaf)
        step = max(1, CHUNK // max(1, array[:1].size))
        used = [w for w in weights if not (w == 1.0).all()]
        plain = epsilon is None and array.dtype == np.float32 and (not used or (narrow and _moderate(used)))
        used = [w.astype(np.float32) for w in used] if plain else used
        for lo in range(0, len(array), step):
            part = slice(lo, min(lo + step, len(array)))
            block = array[part] if plain else array[part].astype(np.float64)
            if epsilon is not None:
                block = block + epsilon
            for w in used:
                block = block * (w[part] if w.shape[0] > 1 else w)
            yield part, block

    def reduce(self, m: Member, blocks: Iterator[tuple[slice, Array]], ufunc: np.ufunc) -> Array:
        """Reduce blocks of the parameter to one value per position of a member."""
        others = tuple(a for a in range(len(m.shape)) if a != m.axis and not (m.groups and a == 0))
        out: Array | None = None
        rows: list[Array] = []
        for _, block in blocks:
            part = ufunc.reduce(block, axis=others)
            if m.axis == 0 or m.groups:
                rows.append(part)
            else:
                out = part if out is None else ufunc(out, part)
        if m.axis == 0:
            return np.concatenate(rows)
        if m.groups:
            grouped = np.concatenate(rows).reshape(m.groups, m.shape[0] // m.groups, m.factor.shape[1])
            return np.asarray(ufunc.reduce(grouped, axis=1)).ravel()
        assert out is not None  # parameters without entries have no members
        return np.asarray(out)

    def entries(self, leaf: int, index: Sequence[Array], weight: Callable[[Member], Floats]) -> Floats:
        """Return entries of the parameter at one index array per axis, times the weights of all its members."""
        values = np.asarray(self.array(leaf)[tuple(index)]).astype(np.float64)
        for m in self.on_leaf[leaf]:
            values = (values if m.epsilon is None else values + m.epsilon) * m.at(weight(m), index)
        return values


def _moderate(weights: Sequence[Array]) -> bool:
    small = [np.abs(w) for w in weights]
    return all((((w == 0) | ((w > 2.0**-30) & (w < 2.0**30))) & (np.frexp(w)[0] % 0.5 == 0)).all() for w in small)


def _tensor(nodes: Sequence[ir.Node], leaf: Leaf) -> ir.TensorProtocol:
    """Return the tensor of a parameter in a graph with these nodes; of a filled one, the tensor with its only entry."""
    node, slot = leaf.uses[0]
    value = nodes[node].inputs[slot]
    producer = None if value is None else value.producer()
    tensor = None if value is None else value.const_value
    if leaf.filled and producer is not None:
        tensor = fill_of(producer)
    elif producer is not None:
        tensor = constant_tensor(producer)
    if tensor is None:
        raise ValueError(f"input {slot} of node {node} ({leaf.name}) is not a parameter")
    return tensor


def fill_of(node: ir.Node) -> ir.TensorProtocol:
    """Return the tensor with the one entry that a ConstantOfShape repeats."""
    attribute = node.attributes.get("value")
    return ir.tensor(np.zeros(1, np.float32)) if attribute is None else attribute.as_tensor()
