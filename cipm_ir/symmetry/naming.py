"""Names and members of spaces: stable, readable, taken from the parameters that move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cipm_ir.symmetry.analysis import Analysis

_ENDINGS = (".weight", ".bias", "_weight", "_bias", ".kernel", "_w_0", "_b_0", "_W", "_B")


@dataclass(frozen=True)
class Note:
    """Name of a space and its members, ``tensor[axis]``, producers first."""

    name: str
    members: tuple[str, ...]


def describe_spaces(analysis: Analysis) -> list[Note]:
    """Return a note per raw space.

    Names are unique, and start with the body that holds a space: ``If_12.then/conv1``.
    """
    walk, classes = analysis.walk, analysis.classes
    position = np.full(classes.count, -1, np.int64)
    owner: dict[int, list[int]] = {}
    for k, raw in enumerate(analysis.spaces):
        if raw.kind != "blocks" and raw.table.shape[1] == 1:
            position[raw.table[:, 0]] = k
        for c in raw.table[0].tolist() if raw.kind == "blocks" or raw.table.shape[1] > 1 else ():
            owner.setdefault(c, []).append(k)
    owned = np.zeros(classes.count, bool)
    owned[list(owner)] = True
    part_of = classes.parts.of
    members: dict[int, dict[str, None]] = {}
    for f in walk.leaf_factors:
        if not f.active:
            continue
        label = f"{walk.leaves[f.leaf].name}[{f.axes[-1]}]"
        here = classes.of[f.base : f.base + f.size]
        for k in _distinct(position[here]):
            if k >= 0:
                members.setdefault(k, {})[label] = None
        held = here if part_of is None else np.r_[here, part_of[f.base : f.base + f.size]]
        for c in _distinct(held[(held >= 0) & owned[held]]) if owner else ():
            for k in owner.get(c, ()):
                members.setdefault(k, {})[label] = None
    used: set[str] = set()
    notes = []
    place = _places(analysis)
    for k, raw in enumerate(analysis.spaces):
        names = tuple(members.get(k, {}))
        tensors = [name.rpartition("[")[0] for name in names]
        stem = _stem(tensors[0]) if names else f"space{k}"
        within = {place.get(tensor, "") for tensor in tensors}
        if len(within) == 1 and (path := within.pop()) and not stem.startswith(f"{path}/"):
            stem = f"{path}/{stem}"
        if analysis.part_atoms(k) is not None:
            stem += ".queries"
        elif raw.kind == "blocks":
            stem += ".blocks"
        elif raw.kind == "cells":
            stem += ".cells"
        name, n = stem, 1
        while name in used:
            n += 1
            name = f"{stem}#{n}"
        used.add(name)
        notes.append(Note(name, names))
    return notes


def _places(analysis: Analysis) -> dict[str, str]:
    """Return the body that all uses of a tensor stand in, by name of the tensor.

    "" for the main graph or several bodies.
    """
    walk, found = analysis.walk, dict[str, str]()
    for leaf in walk.leaves if any(walk.paths) else ():
        for path in {walk.paths[node] for node, _ in leaf.uses}:
            found[leaf.name] = path if found.get(leaf.name, path) == path else ""
    return found


def _distinct(numbers: np.ndarray) -> list[int]:
    """Different entries; most axes lie in one space."""
    if not len(numbers) or (numbers == numbers[0]).all():
        numbers = numbers[:1]
    return [int(k) for k in np.unique(numbers)]


def _stem(name: str) -> str:
    for ending in _ENDINGS:
        if name.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name
