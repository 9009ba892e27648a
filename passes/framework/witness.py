"""Witnesses: what a pass did, so that others can check it, and how exact passes are undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from cipm_ir.algebra import DenseElement, Element
from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Kind
from cipm_ir.symmetry.program import Program

Elements: TypeAlias = Mapping[str, Element | DenseElement]
"""An element for each of some spaces, by the name of the space."""


@dataclass(frozen=True)
class Witness:
    """What one pass did.

    Attributes:
        name: of the pass, with its options.
        kind: what it promised.
        data: what it did, in the labels of the program that it received.
        elements: the elements that it acted with, where that is all that it did.
        keeps_units: every unit is where it was: the pass rewrote the graph around them.
    """

    name: str
    kind: Kind
    data: Mapping[str, Any]
    elements: Elements = field(default_factory=dict)
    keeps_units: bool = False


def undo(program: Program, elements: Elements) -> Program:
    """Act with the inverse of what a pass acted with.

    Bit for bit where the elements are permutations, signs and powers of two; otherwise weights round once more.

    Raises:
        SymmetryError: the program lacks a space, or has it in another size.
    """
    known = {space.name: space for space in program.spaces}
    for name, element in elements.items():
        if name not in known:
            raise SymmetryError(f"The witness names space {name!r}, which this program does not have.")
        if known[name].size != element.n:
            raise SymmetryError(f"Space @{name} has {known[name].size} units, but the witness moves {element.n}.")
        if isinstance(element, Element) and element not in known[name].group:
            raise SymmetryError(
                f"Space @{name} no longer admits what it was moved by: its group is {known[name].group} since a later "
                "pass rewrote the graph; undo before that pass."
            )
    units: list[str] = []
    # An element on all spaces moves units first, then blocks from inner to outer: go back the other way.
    for space, raw in reversed(list(zip(program.spaces, program.analysis.spaces, strict=True))):
        if space.name not in elements:
            continue
        if raw.kind != "blocks" and raw.table.shape[1] == 1:
            units.append(space.name)
        else:
            program = program.act({program.space(space.name): elements[space.name].inverse()})
    return program.act({program.space(name): elements[name].inverse() for name in units})


def undo_all(program: Program, witnesses: Iterable[Witness]) -> Program:
    """Undo passes, the last one first, so that every unit is where it was before the first one.

    Rewrites of the graph that keep all units in place stay as they are.

    Raises:
        SymmetryError: a pass cannot be undone: it removed or merged units, or does not say what it did to them.
    """
    for one in reversed(list(witnesses)):
        if one.elements:
            program = undo(program, one.elements)
        elif not one.keeps_units:
            raise SymmetryError(
                f"{one.name} cannot be undone: it removed, merged or changed units, or does not say how it moved them; "
                "undo the passes behind it alone, or run without it."
            )
    return program
