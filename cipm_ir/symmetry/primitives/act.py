"""The primitive `act`: elements on spaces become gathers, scales and matrices on every axis of every parameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cipm_ir.algebra import DenseElement, Element
from cipm_ir.ir.labels import Array, Labels
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.dense import add_dense_edits
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.primitives.edits import Edit


def act_edits(analysis: Analysis, elements: Mapping[int, Element | DenseElement]) -> dict[int, Edit]:
    """Return one edit per parameter that moves. Matrices act first, on the places before anything is exchanged."""
    edits = _monomial_edits(analysis, {k: g for k, g in elements.items() if isinstance(g, Element)})
    add_dense_edits(analysis, edits, {k: g for k, g in elements.items() if isinstance(g, DenseElement)})
    return edits


def _monomial_edits(analysis: Analysis, elements: dict[int, Element]) -> dict[int, Edit]:
    source = analysis.atom_source(elements)
    scale = analysis.atom_scale(elements)
    edits: dict[int, Edit] = {}
    for f in analysis.walk.leaf_factors:
        if not f.active:
            continue
        span = slice(f.base, f.base + f.size)
        index, factor = source[span] - f.base, scale[span]
        moved = not np.array_equal(index, np.arange(f.size))
        scaled = bool((factor != 1.0).any())
        if moved or scaled:
            edit = edits.setdefault(f.leaf, Edit(epsilon=f.epsilon))
            _place(analysis, f, edit, index if moved else None, factor if scaled else None)
    return edits


def _place(analysis: Analysis, f: LeafFactor, edit: Edit, index: Labels | None, factor: Array | None) -> None:
    if not f.groups:
        if index is not None:
            edit.take[f.axes[0]] = index
        if factor is not None:
            edit.scale[f.axes[0]] = factor
        return
    rows = analysis.walk.leaves[f.leaf].shape[0]
    group = np.arange(rows) * f.groups // rows
    if index is not None:
        edit.inner[f.axes[1]] = (index.reshape(f.shape) % f.shape[1])[group]
    if factor is not None:
        edit.inner_scale[f.axes[1]] = factor.reshape(f.shape)[group]
