"""Why a budget cannot be met or counted: nodes without a count, spaces that may not shrink, nodes that pin axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.report import pinned_note
from cipm_ir.symmetry.counting import Count, named
from cipm_ir.symmetry.program import Program

_NAMED = 3


def check_counted(name: str, counted: Count, instead: str) -> None:
    """Refuse a budget of multiply-accumulates that nodes without a count could change.

    Raises: `SymmetryError` naming the nodes; ``instead``: the budgets that need no count.
    """
    if counted.doubtful:
        raise SymmetryError(
            f"{name}: the multiply-accumulates of {len(counted.doubtful)} "
            f"node{'s' * (len(counted.doubtful) > 1)} cannot be counted, and they could matter: "
            f"{named(counted.doubtful)}; give the budget as {instead} instead."
        )


def within(what: str, cost: float, original: float, budget: float) -> str:
    """Why a budget asks for nothing: how much there is, and how much there may be."""
    if not original:
        return f"nothing to remove: the model has no {what}"
    return (
        f"nothing to remove: {cost / original:.3g} of the {what} are there, within the budget of {budget / original:.3g}"
    )


def listed(names: Sequence[str], limit: int = _NAMED) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def pins(program: Program) -> list[str]:
    """What keeps the axes of weights from being a space: the nodes that pin most of them, with the reason."""
    analysis = program.analysis
    walk, classes = analysis.walk, analysis.classes
    why = np.full(classes.count, -1, np.int64)
    for k in range(len(walk.rec.pins) - 1, -1, -1):
        why[classes.of[walk.rec.pins[k].labels]] = k
    by_pin: dict[tuple[str, str], list[str]] = {}
    for f in walk.leaf_factors:
        leaf = walk.leaves[f.leaf]
        if not f.active or len(leaf.shape) < 2 or not leaf.dtype.is_floating_point():
            continue
        found = why[classes.of[f.base : f.base + f.size]]
        found = found[found >= 0]
        if not len(found):
            continue
        pin = walk.rec.pins[int(found[0])]
        node = walk.nodes[pin.node] if pin.node >= 0 else None
        where = "" if node is None else f"{node.op_type} {node.name or (node.outputs[0].name or '')!r}"
        by_pin.setdefault((pin.reason, where), []).append(f"{leaf.name}[{f.axes[-1]}]")
    ranked = sorted(by_pin.items(), key=lambda item: -len(item[1]))
    notes = [
        f"{listed(tensors)} pinned{f' by {where}' if where else ''} ({reason})" for (reason, where), tensors in ranked
    ]
    return [*pinned_note(program), *([listed(notes)] if notes else [])]
