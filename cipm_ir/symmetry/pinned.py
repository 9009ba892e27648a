"""What an opaque node costs: the units that nothing but that node pins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.leaves import OpaqueNode


def costs_of_opaque(analysis: Analysis) -> list[tuple[OpaqueNode, int]]:
    """Return the opaque nodes with the number of units that each one costs, the dearest first.

    A unit is a coupled class that holds a position of a parameter. It costs a node one where all pins on it are that
    node's: were the node to let pass what reaches it, the unit would be free. This is a lower bound on what a rule
    would bring. A unit that two opaque nodes pin counts for neither; weights behind a node, whose input is taken as
    fixed, count for the products that pin them.
    """
    at = [node.position for node in analysis.walk.opaque]
    counts = _pinned_only_by(analysis, [{position} for position in at])
    order = sorted(range(len(at)), key=lambda k: (-counts[k], k))
    return [(analysis.walk.opaque[k], counts[k]) for k in order]


def pinned_by_opaque(analysis: Analysis) -> int:
    """Return the number of units that only opaque nodes pin, one of them or several."""
    return _pinned_only_by(analysis, [{node.position for node in analysis.walk.opaque}])[0]


def opaque_summary(analysis: Analysis) -> list[str]:
    """Return lines for people: how many units all opaque nodes cost, and how many each does."""
    costs = costs_of_opaque(analysis)
    if not costs:
        return []
    first = f"opaque: {len(costs)} node{'s' * (len(costs) > 1)}, which cost {pinned_by_opaque(analysis)} units in all"
    return [first, *(f"opaque, {units} units by itself: {node}" for node, units in costs)]


def _pinned_only_by(analysis: Analysis, groups: Sequence[set[int]]) -> list[int]:
    """Return how many units have pins of the nodes in each group, and no others."""
    classes, pins = analysis.classes, analysis.walk.rec.pins
    if not pins or not groups:
        return [0] * len(groups)
    owner = {position: k for k, group in enumerate(groups) for position in group}
    held = np.concatenate([classes.of[pin.labels] for pin in pins])
    by = np.repeat([owner.get(pin.node, -1) for pin in pins], [pin.labels.size for pin in pins])
    low, high = np.full(classes.count, len(groups), np.int64), np.full(classes.count, -2, np.int64)
    np.minimum.at(low, held, by)
    np.maximum.at(high, held, by)
    only = classes.real & (low == high) & (high >= 0)
    return [int(n) for n in np.bincount(high[only], minlength=len(groups))]
