"""How alike the units of each space are, from weights or from activations, in the form that ordering takes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import OptionError
from cipm_ir.passes.clustering.weights import Weights
from cipm_ir.passes.framework.base import Progress
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.runtime.statistics.collect import collect
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Floats = npt.NDArray[np.float64]
_LARGE = 1 << 24
"""Matrices of so many bytes lie in files."""


@dataclass(frozen=True)
class Measure:
    """What a measure can be taken of."""

    weights: bool
    activations: bool
    what: str


MEASURES = {
    "correlation": Measure(True, True, "Pearson correlation, of activations or of the entries of rows"),
    "cosine": Measure(True, True, "the same without taking the mean off"),
    "distance": Measure(True, False, "L1 distance of the rows, as in Neural Metamorphosis"),
    "spearman": Measure(False, True, "correlation of the ranks"),
    "cofiring": Measure(False, True, "correlation of firing, that is, of being above zero"),
    "information": Measure(False, True, "mutual information, as the correlation of a Gaussian pair with as much"),
    "lagged": Measure(False, True, "correlation with the next token, column or sample"),
}
"""Measures by name."""


@dataclass
class Affinities:
    """Spaces and, for each, the matrices.

    Attributes:
        by: "weights" or "activations".
        spaces: those that could be compared.
        signed: (n, n) with signs, positive semidefinite but for measures that are not: for the effective dimension.
        affinity: (n, n), 0 to 1.
        remarks: what people should know, one sentence each.
    """

    by: str
    spaces: list[Space] = field(default_factory=list)
    signed: list[Floats] = field(default_factory=list)
    affinity: list[Floats] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, space: Space, signed: Floats, affinity: Floats) -> None:
        """Take in one more space."""
        self.spaces.append(space)
        self.signed.append(_put_aside(signed))
        self.affinity.append(_put_aside(affinity))


def _put_aside(matrix: Floats) -> Floats:
    """Return a matrix, or where it is large a mapping of a temporary file with its entries.

    A network has many of them.
    """
    if matrix.nbytes < _LARGE:
        return matrix
    try:
        with tempfile.TemporaryFile(prefix="cipm-ir-") as file:
            kept = np.memmap(file, matrix.dtype, "w+", shape=matrix.shape)
    except OSError:  # no room there: memory may have more
        return matrix
    kept[:] = matrix
    return np.asarray(kept)


def weight_affinities(program: Program, spaces: Sequence[Space], measure: str, progress: Progress) -> Affinities:
    """By weights: correlation, cosine or distance of rows.

    Raises:
        OptionError: a measure that needs data.
    """
    if not MEASURES[measure].weights:
        raise OptionError(f"measure={measure} compares activations; use by=activations and give data=.")
    weights, found = Weights(program), Affinities("weights")
    for k, space in enumerate(spaces):
        progress("compare weights", k / len(spaces))
        like = weights.likeness(space, measure)
        if like is not None:
            found.add(space, like.signed, like.affinity)
    return found


def activation_affinities(
    program: Program, spaces: Sequence[Space], measure: str, data: Data, limit: int, progress: Progress
) -> Affinities:
    """By activations on at most ``limit`` samples; a space whose units no value shows is compared by its weights.

    Raises:
        OptionError: a measure of weights.
        InputError: data that does not fit.
    """
    if not MEASURES[measure].activations:
        raise OptionError(f"measure={measure} compares weights; use by=weights.")
    asked = (measure,) if measure in ("spearman", "cofiring", "information") else ()
    lags = (1,) if measure == "lagged" else ()
    made = collect(program, data, measures=asked, lags=lags, limit=limit, progress=progress)
    weights, found, hidden, still = Weights(program), Affinities("activations"), [], []
    for space in spaces:
        if space.name in made and made[space.name].constant.all():
            still.append(space.name)
        elif space.name in made:
            matrix = _symmetric(made[space.name].similarity(measure))
            found.add(space, matrix, np.abs(matrix))
        elif (like := weights.likeness(space, "correlation")) is not None:
            found.add(space, like.signed, like.affinity)
            hidden.append(space.name)
    if hidden:
        found.remarks.append(f"{_names(hidden)} compared by weights, since no value shows the units")
    if still:
        found.remarks.append(
            f"left as they are: {_names(still)}, whose units are constant on the data, which says nothing about them"
        )
    chosen = [made[space.name] for space in found.spaces if space.name in made]
    short = [one.name for one in chosen if one.count <= one.size]
    if short:
        found.remarks.append(f"fewer rows than units for {_names(short)}; give more data")
    return found


def _symmetric(matrix: npt.NDArray[np.floating]) -> Floats:
    """Of a lagged measure, which is not symmetric, the larger of both directions."""
    clean = np.asarray(matrix, np.float64)
    return np.where(np.abs(clean) >= np.abs(clean.T), clean, clean.T)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"@{names[0]}{more}"
