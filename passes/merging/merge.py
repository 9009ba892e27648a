"""Carrying out merges: what makes the units is averaged, what reads them absorbs the mixing, then all shrink at once.

Everything goes through the primitives. Sizes stay as they are until the end, so that linked spaces (sibling heads) can
be merged one after the other.
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
    """The program with the units of some spaces (by index) merged.

    Errors: `SymmetryError` where a space refuses.
    """
    keep = {k: merge.kept for k, merge in merges.items()}
    for k in sorted(merges):
        program = mix_units(program, k, merges[k])
    return program.restrict({program.spaces[k]: kept for k, kept in keep.items()})


def mix_units(program: Program, index: int, merge: Merge) -> Program:
    """The program of the same shapes in which nothing reads the units of a space that are not kept."""
    space = program.spaces[index]
    if merge.cluster is not None:
        program = _averaged(program, index, merge)
    full = np.zeros((space.size, space.size), merge.mixing.dtype)
    full[:, merge.kept] = merge.mixing
    made = program.absorb(program.spaces[index], np.arange(space.size), full)
    if len(made.spaces) != len(program.spaces) or made.spaces[index].size != space.size:
        raise SymmetryError(f"Space @{space.name} did not survive the mixing of its consumers.")
    return made


def _averaged(program: Program, index: int, merge: Merge) -> Program:
    """Each tensor that makes the units of a space holds the mean over the cluster at each kept unit."""
    assert merge.cluster is not None
    members = Members(program, exact=False)
    rows = unit_rows(members, index)
    weight = np.zeros((len(merge.kept), len(merge.cluster)))
    weight[merge.cluster, np.arange(len(merge.cluster))] = 1.0
    weight /= weight.sum(axis=1, keepdims=True)
    new: dict[int, Array] = {}
    for row in rows.producers:
        gain = merge.gain if is_norm_scale(program, row.member) else None
        old = new.get(row.leaf, members.array(row.leaf))
        new[row.leaf] = _mean(old, row.member, row.places, weight, merge.kept, gain)
    changed = {leaf: array for leaf, array in new.items() if not np.array_equal(array, members.array(leaf))}
    for leaf in changed:
        _check_sole(program, leaf)
    return program.refit({program.analysis.walk.leaves[leaf].name: array for leaf, array in changed.items()})


def _mean(array: Array, m: Member, places: Labels, weight: Floats, kept: Labels, gain: Floats | None) -> Array:
    flat = by_position(array.astype(np.float64), m).copy()
    mean = np.tensordot(weight, flat[places], axes=1)
    if gain is not None:
        mean *= gain.reshape(-1, *(1,) * (mean.ndim - 1))
    flat[places[kept]] = mean
    return from_positions(flat, m).astype(array.dtype)


def is_norm_scale(program: Program, member: Member) -> bool:
    """Whether a tensor is the scale of a batch normalization."""
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
