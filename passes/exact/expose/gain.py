"""How large a program's group is, and which of its parameters take part in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from cipm_ir.symmetry.program import Program


def directions(program: Program) -> Mapping[str, int]:
    """Over all spaces: free scales, those exact for powers of two, sign bits, units to exchange, units to rotate."""
    units = [space for space in program.spaces if space.kind != "blocks"]
    return {
        "free_scales": sum(space.size * space.group.scales for space in units),
        "exact_scales": sum(space.size * sum(space.exact) for space in units),
        "signs": sum(space.size * space.group.signs for space in units),
        "units": sum(space.size for space in units if space.group.permutes),
        "rotatable_units": sum(space.size for space in units if space.dense),
    }


def free_parameters(program: Program, what: Literal["scale", "sign"]) -> set[str]:
    """Return names of the parameters that some free scaling, or sign, changes along at least one axis."""
    analysis = program.analysis
    free = {var for one in analysis.directions for var, exponents in getattr(one, what).items() if any(exponents)}
    walk = analysis.walk
    return {walk.leaves[f.leaf].name for f in walk.leaf_factors if f.active and f.scale_var in free}
