"""Witnesses: what a pass did, so that others can check it, and how exact passes are undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        spaces: names of all spaces of the program that it received, in order: weights that a pass makes anew may give a
            space another name.
    """

    name: str
    kind: Kind
    data: Mapping[str, Any]
    elements: Elements = field(default_factory=dict)
    keeps_units: bool = False
    spaces: tuple[str, ...] = ()


def undo(program: Program, elements: Elements, spaces: Sequence[str] = ()) -> Program:
    """Act with the inverse of what a pass acted with.

    Bit for bit where the elements are permutations, signs and powers of two; otherwise weights round once more.

    Args:
        program: with the units where the pass put them.
        elements: what it acted with.
        spaces: names of all spaces that it saw, in order. A space that has another name by now is found by its place.

    Raises:
        SymmetryError: the program lacks a space, or has it in another size.
    """
    elements = _renamed(program, elements, spaces)
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


def _renamed(program: Program, elements: Elements, spaces: Sequence[str]) -> Elements:
    """Return the elements by the names that the spaces have now."""
    names = [space.name for space in program.spaces]
    if len(names) != len(spaces):
        return elements
    now = {old: old if old in names else new for old, new in zip(spaces, names, strict=True)}
    return {now.get(name, name): element for name, element in elements.items()}


def undo_all(program: Program, witnesses: Iterable[Witness]) -> Program:
    """Undo passes, the last one first, so that every unit is where it was before the first one.

    Rewrites of the graph that keep all units in place stay as they are.

    Raises:
        SymmetryError: a pass cannot be undone: it removed or merged units, or does not say what it did to them.
    """
    for one in reversed(list(witnesses)):
        if one.elements:
            program = undo(program, one.elements, one.spaces)
        elif not one.keeps_units:
            raise SymmetryError(
                f"{one.name} cannot be undone: it removed, merged or changed units, or does not say how it moved them; "
                "undo the passes behind it alone, or run without it."
            )
    return program
