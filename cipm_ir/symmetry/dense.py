"""Dense groups: which spaces admit O(n) or GL(n), and the action of a matrix on the parameters of such a space.

O(n): everything on the space is linear, an inner product, or a normalization by the length of the whole vector whose
gamma has equal entries (Ashkboos et al. 2024, SliceGPT). GL(n): linear alone, and every vector meets covectors only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from cipm_ir.algebra import DenseElement
from cipm_ir.errors import SymmetryError
from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.labels import Array
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.linearity import GAMMA, REAL, VECTOR, LinearityAnalysis
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.scales import Directions
from cipm_ir.symmetry.spaces import Linearity, RawSpace


def linearities(analysis: Analysis) -> list[Linearity]:
    """Return what the structure admits, per space. Depends on no weights; kept by the analysis."""
    if analysis.linear is None:
        analysis.linear = _surveyed(analysis)
    return analysis.linear


class LinearityTable:
    """What each space admits in a model with these weights, found when first asked for."""

    def __init__(self, analysis: Analysis, model: ir.Model) -> None:
        self._found: list[Linearity] | None = None
        self._source: tuple[Analysis, ir.Model] | None = (analysis, model)

    def __getitem__(self, space: int) -> Linearity:
        if self._found is None:
            if self._source is None:
                raise IndexError(space)
            self._found, self._source = dense_levels(*self._source), None
        return self._found[space]

    def __getstate__(self) -> dict[str, object]:
        self[0]  # models cannot be pickled
        return self.__dict__


def dense_levels(analysis: Analysis, model: ir.Model) -> list[Linearity]:
    """Return what each space admits: the structure, and gammas read where it depends on their entries."""
    found = linearities(analysis)
    if not any(one.gammas for one in found):
        return found
    nodes = nodes_in_order(model.graph)
    return [_with_gammas(analysis, nodes, k, one) if one.gammas else one for k, one in enumerate(found)]


def _with_gammas(analysis: Analysis, nodes: list[ir.Node], space: int, found: Linearity) -> Linearity:
    members = analysis.spaces[space].table[:, 0]
    for number in found.gammas:
        leaf = analysis.walk.leaves[number]
        array = None if leaf.filled else leaf_array(analysis, nodes, number)
        if leaf.filled:
            continue
        for f in leaf.factors if array is not None else ():
            positions = analysis.factor_positions(f, members)
            entries = np.moveaxis(np.asarray(array), f.axes[0], -1)[..., positions]
            if (entries != entries[..., :1, :]).any():
                return Linearity("", found.gammas, found.normalized, f"the entries of {leaf.name} are not equal")
        if array is None:
            return Linearity("", found.gammas, found.normalized, f"the entries of {leaf.name} are not known")
    return found


def leaf_array(analysis: Analysis, nodes: list[ir.Node], leaf: int) -> Array | None:
    """Return the entries of a parameter in a graph with these nodes; None where they are not in it."""
    node, index = analysis.walk.leaves[leaf].uses[0]
    value = nodes[node].inputs[index]
    tensor = parameter_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


# ---------------------------------------------------------------- detection
def _is_candidate(analysis: Analysis, k: int, raw: RawSpace) -> bool:
    free = analysis.directions[k]
    return raw.kind == "units" and raw.table.shape[1] == 1 and len(raw.table) > 1 and free.signs > 0


def _surveyed(analysis: Analysis) -> list[Linearity]:
    candidates = [k for k, raw in enumerate(analysis.spaces) if _is_candidate(analysis, k, raw)]
    notes = [Linearity(reason="its units admit no signs")] * len(analysis.spaces)
    if not candidates:
        return notes
    survey = LinearityAnalysis(analysis, candidates)
    survey.run()
    members = _members(analysis, survey)
    for k in candidates:
        normalized, factors = k in survey.normalized, members[k]
        if k not in survey.alive:
            notes[k] = Linearity("", (), normalized, survey.reasons[k])
            continue
        gammas = tuple(dict.fromkeys(f.leaf for f in factors if survey.roles[f.leaf] == GAMMA))
        general = not normalized and not gammas and _paired(analysis.directions[k], factors)
        notes[k] = Linearity("GL" if general else "O", gammas, normalized)
    return notes


def _members(analysis: Analysis, survey: LinearityAnalysis) -> dict[int, list[LeafFactor]]:
    """Return factors of parameters by space; ends spaces with a parameter whose part in it is not known."""
    found: dict[int, list[LeafFactor]] = {k: [] for k in (*survey.alive, *survey.reasons)}
    walk = analysis.walk
    for f in walk.leaf_factors:
        leaf = walk.leaves[f.leaf]
        role = survey.roles.get(f.leaf)
        known = f.epsilon is None and leaf.dtype in REAL and role is not None
        for k in survey.spaces_among(slice(f.base, f.base + f.size)) if f.active else ():
            found[k].append(f)
            stacked = role == VECTOR and f.groups == leaf.shape[0] and _in_rows(analysis, f, k)
            if k in survey.alive and not (known and (stacked or (not f.groups and len(f.axes) == 1))):
                survey.alive.discard(k)
                survey.reasons[k] = f"what {leaf.name} does to it is not known to be linear"
    return found


def _in_rows(analysis: Analysis, f: LeafFactor, space: int) -> bool:
    """Return whether the units of a space lie in one matrix of a stack each time that they occur in it."""
    row = analysis.factor_positions(f, analysis.spaces[space].table[:, 0]) // f.shape[1]
    return bool((row == row[:1]).all())


def _paired(free: Directions, factors: list[LeafFactor]) -> bool:
    """Return whether one scale direction tells vectors from covectors.

    Every parameter takes it once, or by its inverse.
    """
    return free.scales == 1 and all(free.scale.get(f.scale_var) in ((1,), (-1,)) for f in factors)


# ---------------------------------------------------------------- action
def add_dense_edits(analysis: Analysis, edits: dict[int, Edit], elements: Mapping[int, DenseElement]) -> None:
    """Let matrices act on the parameters of their spaces: ``A`` on vectors, its dual on covectors."""
    found = linearities(analysis)
    factors = [f for f in analysis.walk.leaf_factors if f.active]
    base = np.asarray([f.base for f in factors], np.int64)  # ascending: in order of allocation
    for k, element in elements.items():
        free, note = analysis.directions[k], found[k]
        if not element.belongs_to(note.level):
            raise SymmetryError(f"A matrix on {element.n} classes does not act on a space that admits {note.level!r}.")
        forth = element.matrix.T  # positions are multiplied from the right
        back = element.dual().matrix.T if note.level == "GL" else forth
        atoms = analysis.atoms_of(analysis.spaces[k].table[:, 0])
        owner = np.searchsorted(base, atoms[0], side="right") - 1
        for number in np.unique(owner[owner >= 0]).tolist():
            f = factors[number]
            inside = (owner == number) & (atoms[0] < f.base + f.size)
            if f.leaf in note.gammas or not inside.any():
                continue
            matrix = back if note.level == "GL" and free.scale[f.scale_var] == (-1,) else forth
            edit = edits.setdefault(f.leaf, Edit(epsilon=f.epsilon))
            places = atoms[:, inside] - f.base
            if not f.groups:
                edit.mix.setdefault(f.axes[0], []).append((places, matrix))
                continue
            for column in places.T:  # one matrix of a stack for each occurrence
                row, place = np.divmod(column, f.shape[1])
                edit.inner_mix.setdefault(f.axes[1], []).append((int(row[0]), place[:, None], matrix))
