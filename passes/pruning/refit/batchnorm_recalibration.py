"""Running statistics of batch normalizations, moved as far as what they normalize has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.parameters import parameters
from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.passes.pruning.refit.layers import Layer
from cipm_ir.runtime.activations.cache import ActivationCache, moving
from cipm_ir.runtime.activations.linear_geometry import Array
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import weight_uses

_MOST = 4.0
"""A variance is changed by at most this factor."""


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization whose statistics nothing else uses."""

    node: int
    source: str
    mean: str
    variance: str
    epsilon: float


def norms_of(program: Program, layers: Sequence[Layer]) -> list[Norm]:
    """Batch normalizations of what no refitted product gives: that one has the right mean by itself, and the variance
    which least squares found best.
    """
    fitted = {layer.reader.output for layer in layers}
    uses, live = weight_uses(program), moving(program.model)
    found = []
    walk = program.analysis.walk
    for k, node in enumerate(walk.nodes):
        if walk.paths[k] or node.op_type != "BatchNormalization" or node.domain or attribute(node, "training_mode", 0):
            continue
        names = [v.name or "" for v in node.inputs if v is not None]
        known = parameters(program.model.graph)
        if len(names) != 5 or names[0] not in live or names[0] in fitted:
            continue
        if all(name in known and uses.get(name) == 1 for name in names[3:]):
            found.append(Norm(k, names[0], names[3], names[4], float(attribute(node, "epsilon", 1e-5))))
    return found


def re_estimated(program: Program, norm: Norm, now: ActivationCache, dense: ActivationCache) -> dict[str, Array]:
    """Return mean and variance after the same change as on the data: calibration need not look like training did.

    The variance (with epsilon) grows by the ratio of the variances; the mean goes along, and by the difference of the
    means: ``m' = m_after + sqrt(ratio) (m - m_before)``, so that a shift and a scaling of the input are undone.
    """
    before, after = _statistics(dense, norm.source), _statistics(now, norm.source)
    old = parameter_array(program, norm.variance).astype(np.float64)
    ratio = np.clip((after[1] + norm.epsilon) / (before[1] + norm.epsilon), 1 / _MOST, _MOST)
    mean = after[0] + np.sqrt(ratio) * (parameter_array(program, norm.mean) - before[0])
    return {norm.mean: mean, norm.variance: np.maximum((old + norm.epsilon) * ratio - norm.epsilon, 0.0)}


def _statistics(frontier: ActivationCache, name: str) -> tuple[Array, Array]:
    """Return mean and variance over all but the channel axis."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for values in frontier.values:
        x = np.asarray(values[name], np.float64)
        rest = tuple(k for k in range(x.ndim) if k != 1)
        count += x.size // x.shape[1]
        total, squares = total + x.sum(axis=rest), squares + np.square(x).sum(axis=rest)
    mean = total / max(count, 1)
    return mean, np.maximum(squares / max(count, 1) - mean**2, 0.0)
