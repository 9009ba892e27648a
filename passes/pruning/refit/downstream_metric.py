"""How the outputs of a product are read further on: the metric in which its errors count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.passes.pruning.refit.layers import Layer
from cipm_ir.symmetry.consumers import Incidence
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import summed_classes

Matrix = npt.NDArray[np.float64]
_FLOOR = 1e-3
"""Part of the mean that directions which nothing reads still count."""


class DownstreamMetric:
    """For each product, ``M = sum of W Wᵀ / |W|²`` over the products that read its outputs later.

    An error e of the outputs moves what is read next by about ``eᵀ M e``; what lies between (Relu, norms) is left
    out. The best weights do not depend on it, the choice of units does.
    """

    def __init__(self, program: Program, layers: Sequence[Layer]) -> None:
        self._program = program
        self._layers = layers
        self._classes = [summed_classes(program, layer.reader) for layer in layers]
        self._by_class = Incidence.of(classes[classes >= 0] for classes in self._classes)
        self._rows: dict[int, Matrix] = {}
        self._known: dict[int, Matrix | None] = {}

    def root(self, layer: Layer) -> Matrix | None:
        """Return the square root of M, (outputs, outputs); None where no product reads the outputs."""
        node = layer.reader.key
        if node not in self._known:
            self._known[node] = self._root(layer)
        return self._known[node]

    def _root(self, layer: Layer) -> Matrix | None:
        of = self._outputs(layer)
        place = np.full(self._program.analysis.classes.count, -1)
        if of is None:
            return None
        place[of] = np.arange(len(of))
        metric = np.zeros((len(of), len(of)))
        for k in self._by_class.holding(of).tolist():
            later, classes = self._layers[k], self._classes[k]
            read = np.flatnonzero(classes >= 0)
            read = read[place[classes[read]] >= 0]
            if later.reader.node <= layer.reader.node:
                continue
            rows = self._weight(k)
            summed = np.zeros((len(of), rows.shape[1]))
            np.add.at(summed, place[classes[read]], rows[read])
            metric += summed @ summed.T / max(float(np.square(rows).sum()), 1e-30)
        mean = float(np.trace(metric)) / len(metric)
        if mean <= 0:
            return None
        values, vectors = np.linalg.eigh(metric)
        return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0) + _FLOOR * mean)) @ vectors.T)

    def _outputs(self, layer: Layer) -> npt.NDArray[np.int64] | None:
        """Return the class of each output, where the axis may move and each class has one place."""
        analysis = self._program.analysis
        found = analysis.consumers.axis(layer.reader.leaf, 1 - layer.reader.axis)
        return None if found is None else analysis.classes.of[found.base : found.base + found.size]

    def _weight(self, k: int) -> Matrix:
        """(summed places, all else) of a weight."""
        if k not in self._rows:
            layer = self._layers[k]
            matrix = layer.linear.matrix(parameter_array(self._program, layer.reader.weight)).astype(np.float64)
            self._rows[k] = matrix.reshape(layer.linear.shape[layer.linear.axis], -1)
        return self._rows[k]
