"""The order in which kept units arrive, where a restriction leaves other positions in each row of an interleaved grid.

A channel shuffle flattens a grid (groups, width) column by column. When the rows keep different columns, the k-th kept
entries of all rows still come one after the other, which need not be the order of the old positions. The classes of the
restricted graph say which positions really meet; the slices of the parameters are reordered to agree with them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels, occurrence_rank
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.classes import Classes, find_classes
from cipm_ir.symmetry.leaves import Leaf, LeafFactor
from cipm_ir.symmetry.primitives.sizes import outer_first
from cipm_ir.symmetry.walk import Walk, walk


def interleaved(analysis: Analysis, keep: Labels) -> bool:
    """Return whether some grid that is not laid out row by row keeps different columns in its rows."""
    seen: set[int] = set()
    for state in analysis.walk.states.values():
        for f in state.factors:
            if f.labels.ndim < 2 or id(f.labels) in seen:
                continue
            seen.add(id(f.labels))
            if outer_first(f.labels) == list(range(f.labels.ndim)):
                continue
            mask = keep[f.labels]
            sides = np.ones((), bool)
            for k in range(mask.ndim):
                some = mask.any(axis=tuple(a for a in range(mask.ndim) if a != k))
                sides = sides[..., None] & some
            if (mask != sides).any():
                return True
    return False


def arrival_order(model: ir.Model, analysis: Analysis, keep: Labels) -> dict[int, Labels]:
    """Return the slices that must be reordered: for the base of a parameter's factor, the kept atoms in the order of
    arrival.

    ``model`` is the graph restricted by slices in the old order.

    Raises:
        SymmetryError: no order would do.
    """
    walked = walk(model)
    classes = find_classes(walked)
    became = np.full(analysis.classes.count, -1, np.int64)  # classes may merge: with one head left, heads are no blocks
    order: dict[int, Labels] = {}
    for leaf, old, new in _pairs(analysis.walk, walked):
        was = old.base + np.flatnonzero(keep[old.base : old.base + old.size])
        if len(was) != new.size:
            continue
        now, before = classes.of[new.base : new.base + new.size], analysis.classes.of[was]
        unknown = became[before] < 0
        became[before[unknown]] = now[unknown]
        have = became[before]
        if (have == now).all():
            continue
        order[old.base] = _rearranged(was, have, now, leaf)
        _same_rows(order[old.base], was, old, leaf)
        _free(classes, now[have != now], leaf)
    return order


def _pairs(old: Walk, new: Walk) -> Iterator[tuple[Leaf, LeafFactor, LeafFactor]]:
    """Corresponding factors of the parameters of both graphs; nodes are known by their first output."""
    found = {(new.nodes[node].outputs[0].name, index): leaf for (node, index), leaf in new.use_leaf.items()}
    for leaf in old.leaves:
        node, index = leaf.uses[0]
        twin = found.get((old.nodes[node].outputs[0].name, index))
        # by the axis they label: a grouped factor is a plain one where a single group remains
        factors = {} if twin is None else {f.axes[-1]: f for f in new.leaves[twin].factors if f.active}
        for f in leaf.factors:
            match = factors.get(f.axes[-1])
            if f.active and match is not None:
                yield leaf, f, match


def _rearranged(atoms: Labels, have: Labels, want: Labels, leaf: Leaf) -> Labels:
    """``atoms``, whose classes are ``have``, so that these come as in ``want``; the k-th of a class stays the k-th."""
    source, target = np.lexsort((occurrence_rank(have), have)), np.lexsort((occurrence_rank(want), want))
    if (have[source] != want[target]).any():
        raise SymmetryError(
            f"What is kept along {leaf.name} does not fit the order in which a shuffle delivers it; "
            "keep other numbers per group."
        )
    out = np.empty_like(atoms)
    out[target] = atoms[source]
    return out


def _same_rows(order: Labels, was: Labels, f: LeafFactor, leaf: Leaf) -> None:
    if f.groups and ((order - f.base) // f.shape[1] != (was - f.base) // f.shape[1]).any():
        raise SymmetryError(
            f"What is kept along {leaf.name} would move to another group; keep other numbers per group."
        )


def _free(classes: Classes, moved: Labels, leaf: Leaf) -> None:
    if not classes.free[moved].all():
        raise SymmetryError(
            f"What is kept along {leaf.name} would be reordered where the order is fixed; "
            "keep the same positions in every group."
        )
