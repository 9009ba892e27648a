"""What `equalize` minimizes, tensor by tensor: the noise that quantizing a weight adds to the product it takes part in.

A weight W with rows r (outputs) and columns c (what is summed) becomes W exp(e_r + e_c), where e is linear in the
unknown log-scales. Quantized with step D, its error seen in the original gauge has the energy

    D^2 / 12 * sum_r g_r exp(-2 e_r) * sum_c a_c exp(-2 e_c),    D ~ max over the quantized group of |W| exp(e_r + e_c),

with ``a`` the second moment of what is multiplied and ``g`` what an output counts: 1 over its own energy. The logarithm
is a maximum of linear functions plus logarithms of sums of exponentials of linear functions: convex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy import sparse

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.canonical_members import Floats, Member, Members
from cipm_ir.symmetry.leaves import Leaf

Exponents = sparse.csr_array
_BALANCE = 30
_SETTLED = 0.02
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Term:
    """One weight as a stack of matrices, one for each group of a convolution.

    Attributes:
        name: of the parameter.
        size: (groups, rows, columns), the largest magnitude over all other axes (the taps of a kernel).
        energy: the same, sum of squares; ``count`` entries make one of these.
        rows, columns: exponents of each row and column: (groups * rows or columns, unknowns).
        gain, moment: (groups, rows) and (groups, columns), the weights g and a.
        source: name of the value that is multiplied, where that is one activation; else None.
        peak: (groups, columns), the largest magnitude of what is multiplied; None without data.
    """

    name: str
    size: Floats
    energy: Floats
    count: int
    rows: Exponents
    columns: Exponents
    gain: Floats
    moment: Floats
    source: str | None
    peak: Floats | None = None

    def levels(self, t: Floats) -> tuple[Floats, Floats]:
        """e_r and e_c at some log-scales: (groups, rows), (groups, columns)."""
        return (self.rows @ t).reshape(self.gain.shape), (self.columns @ t).reshape(self.moment.shape)

    def scaled(self, t: Floats) -> tuple[Floats, Floats]:
        """Largest magnitudes and energies of the weight at some log-scales."""
        r, c = self.levels(t)
        both = np.exp(r[:, :, None] + c[:, None, :])
        return self.size * both, self.energy * both**2


def terms_of(members: Members, observed: Mapping[str, tuple[Floats, Floats]] | None = None) -> list[Term]:
    """Every weight matrix or kernel that some scale moves.

    Args:
        members: all axes of all parameters.
        observed: by name of a value, second moment and largest magnitude of each of its channels.
    """
    made = []
    for leaf, found in members.on_leaf.items():
        one = members.analysis.walk.leaves[leaf]
        if one.dtype in _FLOATS and any(m.scale.any() for m in found):
            roles = _roles(members.analysis.walk.nodes, one)
            if roles is not None:
                made.append(_term(members, leaf, found, roles, observed))
    return [term for term in made if term is not None]


def _roles(nodes: Sequence[ir.Node], leaf: Leaf) -> tuple[int, int] | None:
    """The axes of a parameter that its first reader gives out, and sums over; None for what is no weight of a product.

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


def _term(
    members: Members,
    leaf: int,
    found: list[Member],
    roles: tuple[int, int],
    observed: Mapping[str, tuple[Floats, Floats]] | None,
) -> Term | None:
    """Rows: the axis that is given out and all other axes that move; columns: the axis that is summed."""
    one = members.analysis.walk.leaves[leaf]
    array = np.abs(members.array(leaf).astype(np.float64))
    if not np.isfinite(array).all() or not array.any():
        return None
    grouped = next((m.groups for m in found if m.groups), 0)
    out, summed = roles
    kept = [out, *sorted({m.axis for m in found} - {out, summed})]
    rest = tuple(a for a in range(array.ndim) if a not in (*kept, summed))
    laid = np.moveaxis(array, [*kept, summed, *rest], range(array.ndim))
    shape = [one.shape[a] for a in kept]
    groups = grouped or 1
    split = (groups, int(np.prod(shape)) // groups, one.shape[summed])
    over = tuple(range(len(kept) + 1, array.ndim))
    size, energy = laid.max(over).reshape(split), np.square(laid).sum(over).reshape(split)
    unknowns = members.count * max(members.scales, 1)
    where = np.unravel_index(np.arange(int(np.prod(shape))), shape)
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
    seen = None if observed is None or source is None else observed.get(source)
    per_group = None if seen is None or seen[0].size != split[0] * split[2] else [v.reshape(split[0], -1) for v in seen]
    moment, gain = _weights(energy, None if per_group is None else per_group[0])
    return Term(
        one.name, size, energy, array.size // energy.size, rows.tocsr(), columns.tocsr(), gain, moment, source,
        None if per_group is None else per_group[1],
    )  # fmt: skip


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


def _weights(energy: Floats, moment: Floats | None) -> tuple[Floats, Floats]:
    """Moments of the inputs and what outputs count; without data, moments for which every input counts the same.

    Both follow when the weight is rescaled, so that the result does not depend on the gauge that a model comes in.
    """
    given = moment is not None
    a: Floats = (energy.sum(1) > 0).astype(np.float64) if moment is None else np.maximum(moment, 0.0)
    g = _inverse((energy @ a[:, :, None])[:, :, 0])
    for _ in range(0 if given else _BALANCE):
        last, a = a, _inverse((g[:, None, :] @ energy)[:, 0])
        g = _inverse((energy @ a[:, :, None])[:, :, 0])
        if np.abs(np.log(np.maximum(a, 1e-300) / np.maximum(last, 1e-300))).max(initial=0.0) < _SETTLED:
            break
    return a / max(a.mean(), 1e-300), g / max(g.mean(), 1e-300)


def _inverse(x: Floats) -> Floats:
    return np.divide(1.0, x, out=np.zeros_like(x), where=x > 0)


def frozen(members: Members, terms: Sequence[Term]) -> npt.NDArray[np.bool_]:
    """Unknowns that stay: of dead units (a weight has a row or column of zeros), and of weights that are no numbers."""
    still = np.zeros(members.count * max(members.scales, 1), bool)
    for term in terms:
        for table, alive in ((term.rows, term.energy.sum(2)), (term.columns, term.energy.sum(1))):
            still[table[np.flatnonzero(alive.ravel() == 0)].indices] = True
    for leaf, found in members.on_leaf.items():
        array = members.array(leaf)
        kind = members.analysis.walk.leaves[leaf].dtype
        if not kind.is_floating_point():
            continue
        narrow = members.exact and kind.itemsize < 4 and kind != ir.DataType.BFLOAT16
        if narrow or not np.isfinite(array if array.dtype.kind == "f" else array.astype(np.float32)).all():
            for m in found:
                still[_table(members, m).indices] = True
    return still


def indices(terms: Sequence[Term]) -> Labels:
    """Unknowns that some term depends on."""
    parts = [table.indices for term in terms for table in (term.rows, term.columns)]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
