"""What `equalize` minimizes, tensor by tensor: the noise that quantizing a weight adds to the product it takes part in.

A weight W with rows r (outputs) and columns c (what is summed) becomes W exp(e_r + e_c), where e is linear in the
unknown log-scales. Quantized with step D, its error seen in the original gauge has the energy

    D^2 / 12 * sum_r g_r exp(-2 e_r) * sum_c a_c exp(-2 e_c),    D ~ max over the quantized group of |W| exp(e_r + e_c),

with ``a`` the second moment of what is multiplied and ``g`` what noise on an output counts at the end. The logarithm is
a maximum of linear functions plus logarithms of sums of exponentials of linear functions: convex.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy import sparse

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.members import Floats, Member, Members
from cipm_ir.passes.exact.equalize.grid import Grid
from cipm_ir.passes.framework.reasons import listed
from cipm_ir.symmetry.leaves import Leaf

Exponents = sparse.csr_array
_FAR = 300.0
"""Logarithms of energies beyond this are cut off."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Term:
    """One weight as a stack of matrices, one for each group of a convolution.

    Attributes:
        name: of the parameter.
        grid: magnitudes and energies, (groups, rows, columns); over all other axes (the taps of a kernel) the largest
            and the sum of squares.
        rows, columns: exponents of each row and column: (groups * rows or columns, unknowns).
        gain, moment: (groups, rows) and (groups, columns), the weights g and a.
        source: name of the value that is multiplied, where that is one activation; else None.
        peak: (groups, columns), the largest magnitude of what is multiplied; None without data.
    """

    name: str
    grid: Grid
    rows: Exponents
    columns: Exponents
    gain: Floats
    moment: Floats
    source: str | None
    peak: Floats | None = None
    _counts: tuple[Floats, Floats] | None = None

    def counts(self) -> Floats:
        """Energy of each column by what outputs count: (groups, columns); read once for each ``gain``."""
        if self._counts is None or self._counts[0] is not self.gain:
            self._counts = self.gain, self.grid.counted(self.gain)
        return self._counts[1]

    def levels(self, t: Floats) -> tuple[Floats, Floats]:
        """e_r and e_c at some log-scales: (groups, rows), (groups, columns)."""
        return (self.rows @ t).reshape(self.gain.shape), (self.columns @ t).reshape(self.moment.shape)

    @property
    def ends(self) -> tuple[tuple[Exponents, Floats, Floats], tuple[Exponents, Floats, Floats]]:
        """Of rows and of columns: exponents, largest magnitudes, energies."""
        grid = self.grid
        return (self.rows, grid.row_size, grid.row_energy), (self.columns, grid.column_size, grid.column_energy)


Look = Callable[[set[str]], Mapping[str, tuple[Floats, Floats]]]
"""Gives for names of values the second moment and largest magnitude of each of their channels."""


def terms_of(members: Members, look: Look | None = None) -> list[Term]:
    """Return every weight matrix or kernel that some scale moves.

    Args:
        members: all axes of all parameters.
        look: tells about the values that are multiplied; None: the weights alone tell.
    """
    made: dict[int, Term] = {}
    for leaf, found in members.on_leaf.items():
        one = members.analysis.walk.leaves[leaf]
        if one.dtype not in _FLOATS or not any(m.scale.any() for m in found):
            continue
        roles = _roles(members.analysis.walk.nodes, one)
        term = None if roles is None else _term(members, leaf, found, roles)
        if term is not None:
            made[leaf] = term
    names = {term.source for term in made.values() if term.source is not None}
    observed = look(names) if look is not None and names else {}
    given = set()
    for term in made.values():
        seen = observed.get(term.source or "")
        if seen is not None and seen[0].size == term.moment.size:
            term.moment, term.peak = (np.asarray(vector).reshape(term.moment.shape) for vector in seen)
            given.add(term.name)
    _weigh(members, made, given)
    return list(made.values())


def _roles(nodes: Sequence[ir.Node], leaf: Leaf) -> tuple[int, int] | None:
    """Return the axes of a parameter that its first reader gives out, and sums over; None for what is no weight of a
    product.

    An embedding sums over its entries with weights 0 and 1.
    """
    position, slot = leaf.uses[0]
    node, rank = nodes[position], len(leaf.shape)
    order = list(range(rank))
    if node.op_type == "Transpose" and node.outputs[0].uses():
        order = list(attribute(node, "perm", tuple(reversed(order))))
        node, slot = next(iter(node.outputs[0].uses()))
    pair: tuple[int, int] | None = None
    if rank >= 2 and node.op_type == "Conv" and slot == 1:
        pair = (0, 1)
    elif rank >= 2 and node.op_type == "ConvTranspose" and slot == 1:
        pair = (1, 0)
    elif rank >= 2 and node.op_type in ("MatMul", "Gemm") and slot < 2:
        turned = bool(node.op_type == "Gemm" and attribute(node, "transB" if slot else "transA", 0))
        pair = (rank - 1, rank - 2) if bool(slot) != turned else (rank - 2, rank - 1)
    elif rank >= 2 and node.op_type == "Gather" and slot == 0:
        pair = (rank - 1, 0)
    elif rank == 3 and node.op_type in ("LSTM", "GRU", "RNN") and slot in (1, 2):
        pair = (1, 2)
    elif rank >= 2 and node.op_type == "Einsum":
        pair = (rank - 1, 0)
    return None if pair is None else (order[pair[0]], order[pair[1]])


def _term(members: Members, leaf: int, found: list[Member], roles: tuple[int, int]) -> Term | None:
    """Return rows: the axis that is given out and all other axes that move; columns: the axis that is summed."""
    one = members.analysis.walk.leaves[leaf]
    groups = next((m.groups for m in found if m.groups), 0) or 1
    out, summed = roles
    if any(m.groups and m.axis != summed for m in found):
        return None  # a grouped ConvTranspose: its groups are those of what is given out
    kept = [out, *sorted({m.axis for m in found} - {out, summed})]
    if groups > 1 or 0 in kept:  # groups are runs of axis 0, and pieces are read along it
        kept = [0, *(a for a in kept if a != 0)]
    rest = tuple(a for a in range(len(one.shape)) if a not in (*kept, summed))
    grid = Grid(lambda: members.array(leaf), (*kept, summed, *rest), len(rest), groups)
    if not members.finite(leaf) or not grid.row_size.any():
        return None
    shape = [one.shape[a] for a in kept]
    unknowns = members.count * max(members.scales, 1)
    where = np.unravel_index(np.arange(int(np.prod(shape))), shape)
    split = grid.shape
    rows, columns = _none(split[0] * split[1], unknowns), _none(split[0] * split[2], unknowns)
    for m in found:
        table = _table(members, m)
        if m.groups:
            columns = columns + table
        elif m.axis == summed:
            columns = columns + table[np.tile(np.arange(split[2]), groups)]
        else:
            rows = rows + table[where[kept.index(m.axis)]]
    node = members.analysis.walk.nodes[one.uses[0][0]]
    first = node.inputs[0] if node.op_type in ("Conv", "Gemm", "MatMul") and one.uses[0][1] == 1 else None
    source = None if first is None else first.name
    flat = np.ones(split[:2]), np.ones((split[0], split[2]))
    return Term(one.name, grid, rows.tocsr(), columns.tocsr(), *flat, source)


def _none(count: int, unknowns: int) -> Exponents:
    return sparse.csr_array((count, unknowns), dtype=np.float64)


def _table(members: Members, m: Member) -> Exponents:
    """Exponents of the positions of a member: (positions, unknowns)."""
    unknown = m.classes[:, None] * max(members.scales, 1) + m.scale_at[None, :]
    start = np.arange(len(m.classes) + 1) * len(m.scale_at)
    shape = (len(m.classes), members.count * max(members.scales, 1))
    made = sparse.csr_array((m.scale.ravel().astype(np.float64), unknown.ravel(), start), shape=shape)
    made.eliminate_zeros()
    return made


class _Flow:
    """What a network does to energies, unit by unit, as if its units were independent: no data is needed for it.

    Forward, the energy of a unit is that of the weights, biases and gains that make it. Backward, ``use`` is the energy
    that its readers make of it, so that noise on a unit counts use / energy. All follow when a unit is rescaled, so
    that the result does not depend on the gauge that a model comes in. Inputs of the graph have energy 1, outputs
    count 1. A place with exponent d holds the d-th power of the unit; one that makes with a negative exponent (keys,
    where queries make with a positive one) is a reader.
    """

    def __init__(self, unknowns: int) -> None:
        self.energy, self.use = np.zeros(unknowns), np.zeros(unknowns)

    def moment(self, term: Term) -> Floats:
        """Second moments of what a weight is multiplied by, as far as the leaves before it tell."""
        return _powers(-term.columns, self.energy).reshape(term.moment.shape)

    def gain(self, term: Term) -> Floats:
        """Return what noise on an output of a weight counts, as far as the leaves behind it tell."""
        known = (self.energy > 0) & (self.use > 0)
        counts = np.divide(self.use, self.energy, out=np.zeros_like(self.use), where=known)
        made = _powers(term.rows.maximum(0), counts) * _powers(-term.rows.minimum(0), self.energy)
        return np.asarray(made).reshape(term.gain.shape)

    def made(self, table: Exponents, energy: Floats) -> None:
        """Units get energy from rows of a weight, or entries of a vector."""
        place, unknown, power = _entries(table)
        np.add.at(self.energy, unknown, np.minimum(energy.ravel()[place] ** (1 / power), np.exp(_FAR)))

    def used(self, term: Term, made: Floats) -> None:
        """Units count for what a weight makes of them, and for what multiplies them; ``made``: energy of its rows."""
        out = term.moment * term.counts()
        place, unknown, _ = _entries(-term.columns)
        np.add.at(self.use, unknown, out.ravel()[place])
        partner = -term.rows.minimum(0)
        place, unknown, _ = _entries(partner)
        rows = made.ravel() * _powers(partner, self.energy)
        np.add.at(self.use, unknown, rows[place])


def _powers(table: Exponents, known: Floats) -> Floats:
    """Return products of powers; what is not known (0) counts as 1."""
    logs = np.log(known, out=np.zeros_like(known), where=known > 0)
    return np.asarray(np.exp(np.clip(table @ logs, -_FAR, _FAR)))


def _entries(table: Exponents) -> tuple[Labels, Labels, Floats]:
    """Return places, unknowns and exponents of the positive entries."""
    entries = table.tocoo()
    positive = entries.data > 0
    place, unknown = (np.asarray(axis[positive], np.int64) for axis in entries.coords)
    return place, unknown, np.asarray(entries.data[positive], np.float64)


def _weigh(members: Members, terms: Mapping[int, Term], given: Collection[str]) -> None:
    """Fill in the moments, but for those of weights in ``given``, and what outputs count; in graph order and back."""
    flow = _Flow(members.count * max(members.scales, 1))
    made: dict[int, Floats] = {}
    for leaf, found in members.on_leaf.items():
        term = terms.get(leaf)
        if term is not None:
            if term.name not in given:
                term.moment = flow.moment(term)
            made[leaf] = term.grid.made(term.moment)
            flow.made(term.rows, made[leaf])
        elif members.analysis.walk.leaves[leaf].dtype in _FLOATS:
            for m in found:
                if m.line and m.epsilon is None and members.finite(leaf):
                    square = np.square(members.array(leaf).astype(np.float64))
                    flow.made(_table(members, m), np.resize(square.ravel(), len(m.classes)))
    for leaf, term in reversed(list(terms.items())):
        term.gain = flow.gain(term)
        flow.used(term, made[leaf])


def frozen(members: Members, terms: Sequence[Term]) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Unknowns that stay, and why: dead units (a weight has a row or column of zeros), and weights that are no numbers.

    With exact scales also those of half precision, which a power of two may make subnormal.
    """
    names: dict[str, list[str]] = {}
    still = np.zeros(members.count * max(members.scales, 1), bool)
    for term in terms:
        for table, _, alive in term.ends:
            dead = table[np.flatnonzero(alive.ravel() == 0)].indices
            still[dead] = True
            if len(dead) and term.name not in names.setdefault("it has rows or columns of zeros", []):
                names["it has rows or columns of zeros"].append(term.name)
    for leaf, found in members.on_leaf.items():
        kind = members.analysis.walk.leaves[leaf].dtype
        if not kind.is_floating_point():
            continue
        narrow = members.exact and kind.itemsize < 4 and kind != ir.DataType.BFLOAT16
        if narrow or not members.finite(leaf):
            for m in found:
                still[_table(members, m).indices] = True
            why = f"{kind.name.lower()} may round; exact=false scales it" if narrow else "it holds NaN or infinities"
            names.setdefault(why, []).append(members.analysis.walk.leaves[leaf].name)
    return still, [f"units of {listed(found)} keep their scale ({why})" for why, found in names.items()]


def indices(terms: Sequence[Term]) -> Labels:
    """Unknowns that some term depends on."""
    parts = [table.indices for term in terms for table in (term.rows, term.columns)]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
