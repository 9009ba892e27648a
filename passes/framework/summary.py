"""What `cipm inspect` begins with: layers, costs, spaces by kind, what is pinned and what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from cipm_ir.ir.places import Place
from cipm_ir.passes.framework.report import Totals
from cipm_ir.symmetry.counting import node_macs
from cipm_ir.symmetry.pinned import opaque_summary
from cipm_ir.symmetry.program import Program

_NAMED = 4


def summary_lines(program: Program) -> list[str]:
    """Return the summary of a program, a line for each of its parts."""
    totals, walk = Totals.of(program), program.analysis.walk
    weights = [leaf for leaf in walk.leaves if leaf.dtype.is_floating_point()]
    weighted = {id(walk.nodes[position]) for leaf in walk.leaves for position, _ in leaf.uses}
    places = _with_bodies(program.count({}).places)
    layers = Counter(place.node.op_type for place in places if id(place.node) in weighted and node_macs(place))
    named = [f"{count} {op}" for op, count in layers.most_common(_NAMED)]
    more = sum(layers.values()) - sum(count for _, count in layers.most_common(_NAMED))
    kinds = ", ".join([*named, *([f"{more} others"] if more else [])])
    lines = [
        f"{totals.nodes:,} nodes, {sum(layers.values())} that multiply by weights" + (f" ({kinds})" if kinds else "")
    ]
    lines += totals.costs
    found = Counter(space.kind for space in program.spaces)
    spaces = [
        f"{found[kind]} of {kind}" + (f" ({totals.units:,} free units)" if kind == "units" else "")
        for kind in ("units", "blocks", "cells")
        if found[kind]
    ]
    lines.append(f"spaces: {', '.join(spaces) or 'none'}")
    moving = {member for space in program.spaces for member in space.members}
    axes = {f"{leaf.name}[{axis}]" for leaf in weights for axis, size in enumerate(leaf.shape) if size > 1}
    lines.append(
        f"{len(axes & moving)} of {len(axes)} axes of float weights move with a space; "
        "the others are kernel taps, ends of the model, or pinned"
    )
    return [*lines, *opaque_summary(program.analysis)]


def _with_bodies(places: Iterable[Place]) -> Iterator[Place]:
    for place in places:
        yield place
        for body in place.bodies:
            yield from _with_bodies(body)
