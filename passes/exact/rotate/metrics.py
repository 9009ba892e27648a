"""What a rotation does to weights: how far entries stand out, and what rounding to four bits costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.passes.framework.figures import Bars
from cipm_ir.symmetry.dense import leaf_array
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import products

Matrix = npt.NDArray[np.float64]
LEVELS = 7
"""Largest magnitude of a symmetric four-bit integer."""
_SHOWN = 40
_PART = 1 << 20
"""Entries that are looked at together."""


@dataclass(frozen=True)
class Spread:
    """How the entries of a tensor are spread.

    Attributes:
        outlier: largest magnitude over root mean square.
        square: sum of squares.
        error: sum of squared errors of four-bit integers, symmetric, one scale per output channel.
    """

    outlier: float
    square: float
    error: float


def spread(array: npt.NDArray[Any], channels: int) -> Spread:
    """Figures of a tensor whose output channels lie along an axis."""
    by_channel = np.moveaxis(np.asarray(array), channels, 0)
    count = max(1, _PART * len(by_channel) // max(array.size, 1))
    square = error = top = 0.0
    for lo in range(0, len(by_channel), count):
        part = by_channel[lo : lo + count]
        rows = part.astype(np.float64).reshape(len(part), -1)
        square += float(np.square(rows).sum())
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        step = np.where(largest > 0, largest / LEVELS, 1.0)
        error += float(np.square(rows - np.rint(rows / step) * step).sum())
        top = max(top, float(largest.max(initial=0.0)))
    mean = square / max(array.size, 1)
    return Spread(float(top / np.sqrt(mean)) if mean else 0.0, square, error)


@dataclass(frozen=True)
class Comparison:
    """Weights that move, by name, before and after."""

    before: Mapping[str, Spread]
    after: Mapping[str, Spread]

    def metrics(self) -> dict[str, Any]:
        """Return mean and largest outlier ratio, and the relative four-bit error of all weights together."""
        found: dict[str, Any] = {"tensors": len(self.before)}
        for when, side in (("before", self.before), ("after", self.after)):
            ratios = [one.outlier for one in side.values()] or [0.0]
            found[f"outlier_{when}"] = float(np.mean(ratios))
            found[f"largest_outlier_{when}"] = max(ratios)
            found[f"int4_error_{when}"] = relative_error(side)
        return found

    def figures(self) -> tuple[Bars, ...]:
        """Outlier ratios per weight; none where there are too many to read."""
        names = list(self.before)
        if not 0 < len(names) <= _SHOWN:
            return ()
        sides = {"before": self.before, "after": self.after}
        series = {when: np.asarray([side[n].outlier for n in names]) for when, side in sides.items()}
        return (Bars("Largest entry over root mean square, per weight", names, series, "max / rms"),)


def relative_error(side: Mapping[str, Spread]) -> float:
    """Norm of the four-bit rounding error over the norm of the weights, all together."""
    square = sum(one.square for one in side.values())
    return float(np.sqrt(sum(one.error for one in side.values()) / square)) if square else 0.0


def compare(program: Program, edits: Mapping[int, Edit]) -> Comparison:
    """Figures of the weights (two axes or more) that some edits change, before and after."""
    analysis = program.analysis
    nodes = nodes_in_order(program.model.graph)
    summed = {one.leaf: one.axis for one in products(program)}
    before: dict[str, Spread] = {}
    after: dict[str, Spread] = {}
    for number in sorted(edits):
        leaf = analysis.walk.leaves[number]
        array = None if leaf.filled or sum(n > 1 for n in leaf.shape) < 2 else leaf_array(analysis, nodes, number)
        if array is None:
            continue
        # a matrix read along its first axis has its output channels along the second
        channels = 1 if summed.get(number) == 0 and len(leaf.shape) == 2 else 0
        name = leaf.name if leaf.name not in before else f"{leaf.name}#{number}"
        before[name], after[name] = spread(array, channels), spread(edits[number].apply(array), channels)
    return Comparison(before, after)
