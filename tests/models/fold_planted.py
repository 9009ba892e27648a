"""Programs with planted duplicates: some units made like others, and moved out of gauge by a random element."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipm_ir.algebra import Element
from cipm_ir.passes.exact.canonicalize.members import Members
from cipm_ir.passes.merging.rows import by_position, from_positions, unit_rows
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]


def array_of(program: Program, name: str) -> Array:
    """A parameter's values."""
    tensor = program.model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def changed(program: Program, name: str, index: Any, values: Any) -> Program:
    """The program with some entries of a parameter set."""
    array = array_of(program, name)
    array[index] = values
    return program.refit({name: array})


def planted(program: Program, space: Space, pairs: dict[int, int], *, noise: float = 0.0) -> Program:
    """Unit i is made by the weights of unit ``pairs[i]``, up to a relative change of ``noise`` in every row."""
    members = Members(program, exact=False)
    rng = np.random.default_rng(1)
    copies, originals = list(pairs), list(pairs.values())
    new: dict[str, Array] = {}
    for row in unit_rows(members, program.index(space)).producers:
        name = program.analysis.walk.leaves[row.leaf].name
        array = new.get(name, members.array(row.leaf)).astype(np.float64)
        flat = by_position(array, row.member).copy()
        rows = flat[row.places[originals]]
        flat[row.places[copies]] = rows * (1 + noise * rng.standard_normal(rows.shape))
        new[name] = from_positions(flat, row.member).astype(members.array(row.leaf).dtype)
    return program.refit(new)


def out_of_gauge(program: Program, space: Space, units: list[int], rng: np.random.Generator) -> Program:
    """Some units multiplied by random scales and signs of the group; the same function."""
    element = space.random(rng)
    chosen = np.isin(np.arange(space.size), units)
    scale, sign = np.where(chosen, element.scale, 1.0), np.where(chosen, element.sign, 1).astype(np.int8)
    return program.act({program.space(space.name): Element(np.arange(space.size), scale, sign)})
