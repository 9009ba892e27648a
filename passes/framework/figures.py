"""Pictures that a pass gives with its result: plain numbers; `cipm_ir.passes.framework.html` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One or two matrices side by side, on one colour scale that is symmetric about zero.

    Attributes:
        title: one line above the picture.
        before: the matrix, (rows, columns), of finite numbers.
        after: the same after the pass; None: only one matrix.
        bounds: where lines are drawn between the modules of ``after`` (of ``before`` where that is None), 0 to 1.
        note: a line below.
    """

    title: str
    before: npt.ArrayLike
    after: npt.ArrayLike | None = None
    bounds: Sequence[float] = ()
    note: str = ""


@dataclass(frozen=True, eq=False)
class Bars:
    """Bars in groups: one group per label, one bar in it per series, each as long as ``labels``."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, npt.ArrayLike]
    y_label: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Curves:
    """Lines through points: by name a pair (x, y) of equally long vectors."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Rows:
    """A table: ``head`` names the columns, each row has as many cells; the first ``texts`` columns hold words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    note: str = ""


Figure: TypeAlias = HeatMap | Bars | Curves | Rows
"""What `PassResult.figures` holds."""


def pooled(matrix: npt.ArrayLike, cells: int = 256) -> npt.NDArray[np.float32]:
    """Return a matrix of at most ``cells`` rows and columns: means over stretches of equal length, up to one row."""
    made = np.asarray(matrix, np.float64)
    for axis in (0, 1):
        size = made.shape[axis]
        if size > cells:
            starts = np.arange(cells) * size // cells
            width = np.diff(np.r_[starts, size])
            made = np.add.reduceat(made, starts, axis=axis) / (width if axis else width[:, None])
    return made.astype(np.float32)
