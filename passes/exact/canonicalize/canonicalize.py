"""The pass `canonicalize`: the representative of a model's orbit under its symmetry group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cipm_ir.algebra import Element
from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.gauge import Gauge
from cipm_ir.passes.exact.canonicalize.members import Members
from cipm_ir.passes.exact.canonicalize.order import Ordering
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import idle, rounding
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space


@register("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring every hidden space into a canonical scale, sign and order; models of one orbit become equal bit by bit.

    1. Scale and sign of every unit are fixed by its first row that is not zero (see `canonical_gauge`).
    2. Units, and blocks with what they hold, are sorted by their rows (see `canonical_order`).

    With ``exact``, scales are powers of two, and directions in which even those round (the epsilon of a normalization)
    stay as they are; the result is the same bit by bit for every model that differs by permutations, signs and powers
    of two. Without, rows get norm 1, and the result agrees to about 1e-6 for any scales.
    The order stays as it came in among units that nothing tells apart. The witness holds an element per space.
    """

    exact: bool = option(True, "scale by powers of two only, so that every bit is kept; false: rows of norm 1")
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Find the elements, and act with them."""
        ctx.progress("canonicalize", None)
        elements = canonical_elements(program, exact=self.exact)
        notes = [note for note in (rounding(program) if self.exact else "",) if note]
        if not elements:
            what = "already canonical" if program.spaces else "there is no space to bring into canonical form"
            return PassResult(program, changed=False, summary="; ".join([idle(program, what), *notes]))
        moved = sum(space.size for space in elements)
        witness = {space.name: as_lists(element) for space, element in elements.items()}
        summary = f"{len(elements)} of {len(program.spaces)} spaces brought into canonical form ({moved} classes)"
        metrics = {"spaces": len(elements), "classes": moved}
        return PassResult(program.act(elements), True, "; ".join([summary, *notes]), witness, metrics)


def canonical_elements(program: Program, *, exact: bool = True) -> dict[Space, Element]:
    """Return the element per space that takes a program to the canonical form of its orbit.

    Spaces that stay are left out.
    """
    members = Members(program, exact=exact)
    gauge = Gauge(members)
    gauge.fix()
    colour = Ordering(members, gauge).run()
    found = {}
    for space, raw in zip(program.spaces, program.analysis.spaces, strict=True):
        element = _element(space, raw.table[:, 0], colour, gauge)
        if not element.is_identity:
            found[space] = element
    return found


def _element(space: Space, classes: Labels, colour: Labels, gauge: Gauge) -> Element:
    group = space.group
    perm = np.argsort(colour[classes], kind="stable") if group.permutes else np.arange(space.size)
    new = classes[perm]
    scale = np.exp2(gauge.scale[new, : group.scales].T)
    return Element(perm, scale, gauge.sign[new, : group.signs].T)


def undo(program: Program, witness: Mapping[str, Mapping[str, Any]]) -> Program:
    """Take a canonicalized program back to the labels and the gauge of the model that the witness was made for.

    Exact where the scales are powers of two.

    Raises:
        SymmetryError: the program lacks a space of the witness.
    """
    unknown = set(witness) - {space.name for space in program.spaces}
    if unknown:
        raise SymmetryError(f"The witness names space {min(unknown)!r}, which this program does not have.")
    spaces = program.analysis.spaces
    units: list[str] = []
    # An element on all spaces moves units first, then blocks from inner to outer: go back the other way.
    for space, raw in reversed(list(zip(program.spaces, spaces, strict=True))):
        if space.name not in witness:
            continue
        if raw.kind != "blocks" and raw.table.shape[1] == 1:
            units.append(space.name)
        else:
            program = program.act({program.space(space.name): _from_lists(witness[space.name]).inverse()})
    return program.act({program.space(name): _from_lists(witness[name]).inverse() for name in units})


def as_lists(element: Element) -> dict[str, Any]:
    """Return an element as a witness holds it."""
    return {"perm": element.perm.tolist(), "scale": element.scale.tolist(), "sign": element.sign.tolist()}


def _from_lists(entry: Mapping[str, Any]) -> Element:
    perm = np.asarray(entry["perm"], np.int64)
    scale = np.asarray(entry["scale"], np.float64).reshape(-1, len(perm))
    return Element(perm, scale, np.asarray(entry["sign"], np.int8).reshape(-1, len(perm)))
