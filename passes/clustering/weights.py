"""What the weights say about units: how alike two units of a space are, and how strongly two spaces are coupled.

Both are read from every floating-point weight that moves with the units: producers, consumers, embeddings. Everything
here is the same for all models of one orbit: what units may be rescaled by is balanced first (`evened`), rows have norm
1, and heads are compared by the norms of what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.spatial.distance import pdist, squareform

from cipm_ir.ir.labels import Array, Labels
from cipm_ir.ir.parameters import stored_tensor
from cipm_ir.symmetry.leaves import Leaf, LeafFactor
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Floats = npt.NDArray[np.float64]
_BALANCING = 50


@dataclass(frozen=True)
class Likeness:
    """How alike the units of a space are.

    Attributes:
        signed: (n, n), positive semidefinite with a diagonal of ones or zeros: the mean over the weights.
        affinity: (n, n), 0 to 1: the root mean square, in which opposite signs do not cancel.
    """

    signed: Floats
    affinity: Floats


class Weights:
    """The weights of a program, seen from its spaces."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.analysis = program.analysis
        self._arrays: dict[str, Array] = {}

    # ------------------------------------------------------------ inside a space
    def likeness(self, space: Space, measure: str) -> Likeness | None:
        """Return how alike the units (or heads) of a space are; None where it has no weights but single numbers per
        unit.

        Args:
            space: one of the program's.
            measure: "cosine" of the rows; "correlation", the same of centred rows; "distance": 1 minus the L1 distance
                of all rows together over the greatest such distance (Neural Metamorphosis), for the affinity only.

        For heads a row holds the norms over the units of the head, which do not depend on their order or signs.
        """
        centred = self._is_blocks(space) or measure == "correlation"
        signed, square, made = np.zeros(()), np.zeros(()), []
        count = 0
        for row in self._rows(space):
            if row.shape[1] == 1:
                continue
            row = normalized(row, centred=centred)
            product = np.asarray(row @ row.T, np.float64)
            signed, square, count = signed + product, square + product * product, count + 1
            made += [row] if measure == "distance" else []
        if not count:
            return None
        signed, square = signed / count, square / count
        affinity = np.sqrt(np.clip(square, 0.0, 1.0))
        if measure == "distance":
            far = squareform(pdist(np.concatenate(made, axis=1), "cityblock"))
            affinity = 1.0 - far / max(float(far.max()), 1e-300)
        return Likeness(signed, affinity)

    def _rows(self, space: Space) -> Iterator[Array]:
        """Yield one matrix (units, entries) per weight that moves with the space."""
        table = self.analysis.spaces[self.program.index(space)].table
        blocks, element = self._is_blocks(space), self.analysis.elements_of(self.program.index(space))
        for leaf, f in self._factors:
            owner = element[self.analysis.classes.refined(slice(f.base, f.base + f.size))]
            if not (owner >= 0).any():
                continue
            rows = rows_of(self._evened(leaf, f), f)
            if blocks:
                yield self._energies(rows, owner, len(table))
            else:
                at = self.analysis.factor_positions(f, table[:, 0])
                yield rows[at.T].transpose(1, 0, 2).reshape(len(at), -1)

    def _energies(self, rows: Array, block: Labels, count: int) -> Array:
        """Per block the norm over its positions, for each entry of the rows."""
        hot = (block == np.arange(count)[:, None]).astype(rows.dtype)
        return np.asarray(np.sqrt(hot @ np.square(rows)))

    def _is_blocks(self, space: Space) -> bool:
        raw = self.analysis.spaces[self.program.index(space)]
        return raw.kind == "blocks" or raw.table.shape[1] > 1

    # ------------------------------------------------------------ between spaces
    def couplings(self, spaces: tuple[Space, ...]) -> dict[tuple[int, int], Floats]:
        """For pairs of these spaces, by their places i < j: how strongly units of one are bound to units of the other.

        The squares of the weights between them, summed over kernel taps and over the tensors that hold both, each
        balanced to equal row sums and equal column sums (Sinkhorn), so that no rescaling of units shows. Shape (n, m),
        mean 1; a unit without weights has zeros.
        """
        owner = np.full(self.analysis.classes.count, -1, np.int64)
        tables = [self.analysis.spaces[self.program.index(space)].table for space in spaces]
        for k, (space, table) in enumerate(zip(spaces, tables, strict=True)):
            if not self._is_blocks(space):
                owner[table[:, 0]] = k
        found: dict[tuple[int, int], Floats] = {}
        for leaf, one, two in self._pairs():
            ends = [np.unique(owner[self._classes(f)]) for f in (one, two)]
            pairs = [(i, j) for i in ends[0].tolist() for j in ends[1].tolist() if i >= 0 and j >= 0 and i != j]
            if not pairs:
                continue
            energy = _energy(self._array(leaf), one.axes[0], two.axes[0])
            for i, j in pairs:
                rows = self.analysis.factor_positions(one, tables[i][:, 0])
                columns = self.analysis.factor_positions(two, tables[j][:, 0])
                part = balanced(energy[rows].sum(axis=1)[:, columns].sum(axis=2))
                key, part = ((i, j), part) if i < j else ((j, i), part.T)
                found[key] = found[key] + part if key in found else part
        return {key: part / max(float(part.mean()), 1e-300) for key, part in found.items()}

    def _pairs(self) -> Iterator[tuple[Leaf, LeafFactor, LeafFactor]]:
        """Yield weights with units along two axes."""
        by_leaf: dict[int, list[tuple[Leaf, LeafFactor]]] = {}
        for leaf, f in self._factors:
            if not f.groups and len(f.axes) == 1:
                by_leaf.setdefault(f.leaf, []).append((leaf, f))
        for entries in by_leaf.values():
            for a, (leaf, one) in enumerate(entries):
                yield from ((leaf, one, two) for _, two in entries[a + 1 :] if one.axes != two.axes)

    # ------------------------------------------------------------ reading
    @cached_property
    def _factors(self) -> list[tuple[Leaf, LeafFactor]]:
        walk = self.analysis.walk
        leaves = [leaf for leaf in walk.leaves if leaf.dtype.is_floating_point() and not leaf.filled]
        return [(leaf, f) for leaf in leaves for f in leaf.factors if f.active]

    @cached_property
    def _scaled(self) -> npt.NDArray[np.bool_]:
        """Classes that some space rescales."""
        scaled = np.zeros(self.analysis.classes.count, bool)
        for space, raw in zip(self.program.spaces, self.analysis.spaces, strict=True):
            if space.group.scales:
                scaled[raw.table[:, 0]] = True
        return scaled

    def _evened(self, leaf: Leaf, f: LeafFactor) -> Array:
        """Return the weight, where the units along another axis may be rescaled with these evened out."""
        array = self._array(leaf)
        plain = [one for _, one in self._factors if one.leaf == f.leaf and not one.groups and len(one.axes) == 1]
        free = {one.axes[0]: self._scaled[self._classes(one)] for one in plain}
        mine = f.axes[0] if len(f.axes) == 1 and not f.groups else None
        other = next((axis for axis, hit in free.items() if axis != mine and hit.any()), None)
        if mine is None or other is None or not np.issubdtype(array.dtype, np.floating):
            return array
        columns = evened(_energy(array, mine, other), free.get(mine), free[other])
        shape = [1] * array.ndim
        shape[other] = -1
        return np.asarray(array * columns.reshape(shape).astype(array.dtype))

    def _classes(self, f: LeafFactor) -> Labels:
        return np.asarray(self.analysis.classes.of[f.base : f.base + f.size])

    def _array(self, leaf: Leaf) -> Array:
        """Return the weight as float32 or float64; looked up once where it is no copy."""
        if leaf.name not in self._arrays:
            tensor = stored_tensor(self.program.model, leaf.name)
            array = np.asarray(tensor.numpy())
            wide = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
            if not np.isfinite(wide).all():
                wide = np.nan_to_num(wide, posinf=0.0, neginf=0.0)
            if wide is not array or isinstance(tensor, ir.LazyTensor):
                return wide  # a copy, which would pile up
            self._arrays[leaf.name] = wide
        return self._arrays[leaf.name]


def rows_of(array: Array, f: LeafFactor) -> Array:
    """Return the entries at each position of a factor: (positions, entries), in the order of the factor's atoms."""
    if f.groups:
        split = array.reshape(f.groups, array.shape[0] // f.groups, *array.shape[1:])
        return np.moveaxis(split, f.axes[-1] + 1, 1).reshape(f.size, -1)
    return np.moveaxis(array, f.axes, range(len(f.axes))).reshape(f.size, -1)


def normalized(rows: Array, *, centred: bool) -> Array:
    """Return rows of norm 1, their mean taken off before where ``centred``; rows of zeros stay."""
    moved = rows - rows.mean(axis=1, keepdims=True) if centred else rows
    norm = np.linalg.norm(moved, axis=1, keepdims=True)
    # A constant row leaves rounding noise when its mean is taken off.
    noise = 1e-5 * np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.where(norm > noise, moved / np.maximum(norm, np.finfo(rows.dtype).tiny), 0.0))


def _energy(array: Array, one: int, two: int) -> Floats:
    others = tuple(a for a in range(array.ndim) if a not in (one, two))
    energy: Floats = np.square(array, dtype=np.float64).sum(axis=others)
    return energy if one < two else energy.T


def evened(energy: Floats, rows: npt.NDArray[np.bool_] | None, columns: npt.NDArray[np.bool_]) -> Floats:
    """Return factors of the columns that make a weight the same for all scales of the rows and columns that are free.

    Args:
        energy: squares of the weight, (n, m).
        rows, columns: which may be rescaled; with the factors their sums of squares are m and n.

    Returns: factors of the columns, (m,); 1 where fixed or zero.
    """
    up, across = np.ones(len(energy)), np.ones(energy.shape[1])
    for _ in range(_BALANCING):
        if rows is not None and rows.any():
            up = _factors(energy @ across, rows, len(across))
        across = _factors(energy.T @ up, columns, len(up))
    return np.sqrt(across)


def _factors(sums: Floats, free: npt.NDArray[np.bool_], target: int) -> Floats:
    return np.where(free & (sums > 0), target / np.where(sums > 0, sums, 1.0), 1.0)


def balanced(energy: Floats) -> Floats:
    """Return rows and columns scaled in turn until each row sums to 1 and each column to the same number.

    Zeros stay.
    """
    made = np.asarray(energy, np.float64)
    for _ in range(_BALANCING):
        made = made / np.maximum(made.sum(axis=0, keepdims=True), 1e-300) * (made.shape[0] / made.shape[1])
        made = made / np.maximum(made.sum(axis=1, keepdims=True), 1e-300)
    return made
