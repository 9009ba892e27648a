"""Choices of units that may be removed together, and the same program with those units made dead first."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tests import zoo

from cipm_ir.passes.pruning.budget.search import link_spaces
from cipm_ir.symmetry.leaves import Leaf
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Keep = dict[Space, NDArray[np.int64]]


def program_of(name: str) -> Program:
    """Program of a model of the zoo; skips where the model is unavailable."""
    return Program.of(ir.from_proto(zoo.build_or_skip(name)))


def outputs(program: Program, name: str, **dims: int) -> list[NDArray[Any]]:
    """Outputs of the program on the zoo's inputs for this model."""
    model = ir.to_proto(program.emit())
    return zoo.run(model, zoo.feeds(name, model, 0, dims), reference=zoo.entry(name).reference)


def distance(first: list[NDArray[Any]], second: list[NDArray[Any]]) -> float:
    """Largest difference, in units of the largest output."""
    assert [x.shape for x in first] == [x.shape for x in second]
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(first, second, strict=True)]
    scale = max(np.abs(x).max() for x, _ in pairs) or 1.0
    return float(max(np.abs(x - y).max() for x, y in pairs) / scale)


def random_keep(program: Program, rng: np.random.Generator, *, blocks: bool = True) -> Keep:
    """Random elements of every space that may shrink; linked spaces keep equal numbers of different ones.

    Spaces over which something normalizes are left alone: there a zero is not the same as nothing.
    """
    analysis = program.analysis
    classes = analysis.classes
    normalized = np.zeros(classes.count + len(classes.parts.cell_class), bool)
    for labels in analysis.walk.rec.normalized:
        normalized[classes.of[labels]] = normalized[classes.refined(labels)] = True
    links = link_spaces(analysis)
    keep: Keep = {}
    for group in links.groups:
        spaces = [program.spaces[k] for k in group]
        least = min(s.size for s in spaces)
        touched = any(normalized[analysis.places_of(k)[0]].any() for k in group)
        kinds = {"units", "blocks"} if blocks else {"units"}
        if touched or least < 2 or spaces[0].kind not in kinds or links.frozen & set(group):
            continue
        number = int(rng.integers(1, least))
        for s in spaces:
            keep[s] = np.sort(rng.choice(s.size, number, replace=False))
    return keep


def killed(program: Program, keep: Keep) -> Program:
    """The program with every weight of the units that `keep` drops set to zero, on the way in and on the way out."""
    stays = program.kept_classes(keep)
    gone = ~program.analysis.classes.stays(stays)[program.analysis.classes.refined()]
    weights: dict[str, NDArray[Any]] = {}
    for leaf in program.analysis.walk.leaves:
        value = program.model.graph.initializers.get(leaf.name)
        if value is None or value.const_value is None or not leaf.dtype.is_floating_point():
            continue
        mask = _positions(leaf, gone)
        if mask.any():
            old = weights.get(leaf.name, np.asarray(value.const_value.numpy()))
            weights[leaf.name] = np.where(mask, np.zeros((), old.dtype), old)
    return program.refit(weights)


def _positions(leaf: Leaf, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
    mask = np.zeros(leaf.shape, bool)
    for f in leaf.factors:
        if not f.active:
            continue
        hit = gone[f.base : f.base + f.size].reshape(f.shape)
        if f.groups:  # a row of the weight belongs to one group
            hit = np.repeat(hit, leaf.shape[0] // f.groups, axis=0)
        axes = (0, f.axes[1]) if f.groups else f.axes
        mask |= hit.reshape([leaf.shape[a] if a in axes else 1 for a in range(mask.ndim)])
    return mask


def restricted(program: Program, keep: Keep) -> Program:
    """`restrict`, for a program with the same spaces as the one that `keep` was made for."""
    return program.restrict({program.space(s.name): index for s, index in keep.items()})
