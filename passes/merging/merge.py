"""Carrying out merges: what makes the units is averaged, what reads them absorbs the mixing, then all shrink at once.

Everything goes through the primitives. Sizes stay as they are until all spaces are mixed, so that linked spaces
(sibling heads) shrink together and the graph is copied and analysed once, however many spaces are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.passes.exact.canonicalize.members import Floats, Member, Members
from cipm_ir.passes.merging.rows import by_position, from_positions, unit_rows
from cipm_ir.symmetry.program import Program


@dataclass(frozen=True, eq=False)
class Merge:
    """What becomes of the units of a space: h is replaced by ``mixing @ h[kept]``.

    Attributes:
        kept: (k,) sorted.
        mixing: (units, k) float64, or uint8 where it only adds up.
        cluster: (units,) which kept unit each goes to; what makes the kept unit becomes the mean over its cluster.
            None leaves the makers as they are.
        gain: (k,) by which the scale of batch normalization is multiplied after averaging.
    """

    kept: Labels
    mixing: Array
    cluster: Labels | None = None
    gain: Floats | None = None


def merge_spaces(program: Program, merges: Mapping[int, Merge]) -> Program:
    """Return the program with the units of some spaces (by index) merged.

    Raises:
        SymmetryError: a space refuses.
    """
    program = _averaged(program, merges)
    mixings = {}
    for k, merge in merges.items():
        size = program.spaces[k].size
        mixings[program.spaces[k]] = full = np.zeros((size, size), merge.mixing.dtype)
        full[:, merge.kept] = merge.mixing
    made = program.mix(mixings)
    if [space.size for space in made.spaces] != [space.size for space in program.spaces]:
        names = ", ".join(f"@{program.spaces[k].name}" for k in merges)
        raise SymmetryError(f"The spaces did not survive the mixing of the consumers of {names}.")
    return made.restrict({made.spaces[k]: merge.kept for k, merge in merges.items()})


def _averaged(program: Program, merges: Mapping[int, Merge]) -> Program:
    """Each tensor that makes the units of a space holds the mean over the cluster at each kept unit."""
    merges = {k: merge for k, merge in merges.items() if merge.cluster is not None}
    if not merges:
        return program
    members = Members(program, exact=False)
    new: dict[int, Array] = {}
    for k in sorted(merges):
        _average_rows(members, k, merges[k], new)
    changed = {leaf: array for leaf, array in new.items() if not np.array_equal(array, members.array(leaf))}
    for leaf in changed:
        _check_sole(program, leaf)
    return program.refit({program.analysis.walk.leaves[leaf].name: array for leaf, array in changed.items()})


def _average_rows(members: Members, index: int, merge: Merge, new: dict[int, Array]) -> None:
    """Set the producers' rows of one space to means, in ``new`` by leaf."""
    assert merge.cluster is not None
    rows = unit_rows(members, index)
    weight = np.zeros((len(merge.kept), len(merge.cluster)))
    weight[merge.cluster, np.arange(len(merge.cluster))] = 1.0
    weight /= weight.sum(axis=1, keepdims=True)
    for row in rows.producers:
        gain = merge.gain if is_norm_scale(members.program, row.member) else None
        old = new.get(row.leaf, members.array(row.leaf))
        new[row.leaf] = _mean(old, row.member, row.places, weight, merge.kept, gain)


def _mean(array: Array, m: Member, places: Labels, weight: Floats, kept: Labels, gain: Floats | None) -> Array:
    flat = by_position(array.astype(np.float64), m).copy()
    mean = np.tensordot(weight, flat[places], axes=1)
    if gain is not None:
        mean *= gain.reshape(-1, *(1,) * (mean.ndim - 1))
    flat[places[kept]] = mean
    return from_positions(flat, m).astype(array.dtype)


def is_norm_scale(program: Program, member: Member) -> bool:
    """Return whether a tensor is the scale of a batch normalization."""
    node, index = program.analysis.walk.leaves[member.factor.leaf].uses[0]
    return program.analysis.walk.nodes[node].op_type == "BatchNormalization" and index == 1


def _check_sole(program: Program, leaf: int) -> None:
    """Setting the values of a tensor that something else reads as well would change that, too."""
    one = program.analysis.walk.leaves[leaf]
    if not one.dtype.is_floating_point():
        raise SymmetryError(f"{one.name} holds {one.dtype.name.lower()} numbers, which have no mean.")
    others = [other for k, other in enumerate(program.analysis.walk.leaves) if other.name == one.name and k != leaf]
    if others or len({node for node, _ in one.uses}) > 1:
        raise SymmetryError(f"{one.name} is read in several places; untie it before averaging its rows.")
