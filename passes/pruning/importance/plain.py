"""Criteria that need neither data nor gradients: the scales of batch normalization, and chance."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from cipm_ir.errors import InputError, SymmetryError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.importance.criteria import Scores, parameter_array, register_importance
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space


def batch_norm_scale(program: Program, space: Space, ctx: Context) -> Scores:
    """Return mean |γ| over the batch normalizations of a unit; a head or group adds up its units.

    Source: Liu et al. 2017, network slimming.

    Raises:
        SymmetryError: a space that no batch normalization scales.
    """
    analysis = program.analysis
    walk, element = analysis.walk, analysis.elements_of(program.index(space))
    total, layers = np.zeros(space.size), 0
    for position, node in enumerate(walk.nodes):
        if node.op_type != "BatchNormalization" or (position, 1) not in walk.use_leaf:
            continue
        leaf = walk.leaves[walk.use_leaf[position, 1]]
        for f in leaf.factors:
            owner = element[analysis.classes.refined(slice(f.base, f.base + f.size))]
            if f.active and (owner >= 0).any():
                gamma = np.abs(parameter_array(program, leaf.name)).astype(np.float64).ravel()
                np.add.at(total, owner[owner >= 0], gamma[owner >= 0])
                layers += 1
    if not layers:
        raise SymmetryError(
            f"No batch normalization scales @{space.name}, so the criterion 'batch-norm-scale' cannot rank it; "
            "leave it out with exclude, or choose another criterion."
        )
    if not np.isfinite(total).all():
        raise InputError(f"A batch normalization of @{space.name} holds NaN or infinity; repair the model first.")
    return total / layers


def chance(program: Program, space: Space, ctx: Context) -> Scores:
    """Uniform random numbers, the same for the same seed, pass and space: what every criterion should beat."""
    rng = np.random.default_rng([ctx.seed, ctx.step, crc32(space.name.encode())])
    return rng.uniform(0.5, 1.5, space.size)


register_importance("batch-norm-scale", batch_norm_scale)
register_importance("random", chance)
