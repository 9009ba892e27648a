"""Why a budget cannot be met or counted: nodes without a count, spaces that may not shrink, nodes that pin axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.report import pinned_note
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
    """Return why a budget asks for nothing: how much there is, and how much there may be."""
    if not original:
        return f"nothing to remove: the model has no {what}"
    share, allowed = cost / original, budget / original
    return f"nothing to remove: {share:.3g} of the {what} are there, within the budget of {allowed:.3g}"


def listed(names: Sequence[str], limit: int = _NAMED) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def left_alone(refused: Mapping[str, str]) -> str:
    """Return spaces that stay as they are, by reason, in one line; ``refused``: the reason for each by name."""
    by_reason: dict[str, list[str]] = {}
    for name, why in refused.items():
        by_reason.setdefault(why.rstrip("."), []).append(f"@{name}")
    parts = [f"{listed(names)} ({why})" for why, names in by_reason.items()]
    more = f"; {len(parts) - _NAMED} more reasons" if len(parts) > _NAMED else ""
    return f"left as they are: {'; '.join(parts[:_NAMED])}{more}" if parts else ""


def idle(program: Program, what: str) -> str:
    """Return why a pass that moves spaces had nothing to do.

    What it looked for, and what keeps axes from being spaces.
    """
    return "; ".join([what, *(pinned_note(program) if program.spaces else pins(program))])


def rounding(program: Program) -> str:
    """Return spaces with scales that exact passes leave alone, since powers of two round.

    Empty where there are none.
    """
    kept = [f"@{s.name}" for s in program.spaces if not all(s.exact)]
    return f"scales of {listed(kept)} stay, since powers of two round behind an epsilon" if kept else ""


def pins(program: Program) -> list[str]:
    """Return what keeps the axes of weights from being a space: the nodes that pin most of them, with the reason."""
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
