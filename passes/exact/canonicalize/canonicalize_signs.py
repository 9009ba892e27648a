"""The pass `canonicalize-signs`: which of its two signs each hidden unit gets, where it is odd or linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cipm_ir.algebra import Element
from cipm_ir.passes.exact.canonicalize.gauge import Gauge
from cipm_ir.passes.exact.canonicalize.members import Members
from cipm_ir.passes.exact.canonicalize.sign_ranges import Signs
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import idle
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space


@register("canonicalize-signs")
@dataclass(frozen=True)
class CanonicalizeSigns(Pass):
    """Choose the sign of every hidden unit that has one: behind Tanh and other odd functions, or no activation at all.

    1. ``by=bias``: in the first vector that carries a unit's sign (its bias), the entry of largest magnitude becomes
       positive. If all vectors are zero, the first nonzero row decides (its weights).
    2. ``by=range``: then units are flipped, the best one first, as long as the range of the weights for asymmetric
       quantization shrinks: the sum over all matrices of log(max(0, largest) - min(0, smallest)), so that a decibel of
       one tensor counts as much as one of another. If the original signs are better than the result, they stay.

    Only signs change, so the result is the same bit for bit, also in front of a normalization's epsilon. Models that
    differ by signs alone become equal. The witness holds the flipped units of each space, one list per direction.
    """

    by: str = option("bias", "what decides: the entry of largest magnitude, or ranges", choices=("bias", "range"))
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Find the signs, and act with them."""
        ctx.progress("signs", None)
        signs = Signs(Members(program, exact=True))
        signs.fix()
        metrics: dict[str, Any] = {}
        if self.by == "range":
            before, after = signs.shrink_ranges()
            metrics = {"range_before": before, "range_after": after}
        elements = sign_elements(program, signs)
        flipped = {space.name: [np.flatnonzero(row < 0) for row in e.sign] for space, e in elements.items()}
        units = sum(len(rows) for space in flipped.values() for rows in space)
        metrics = {"flipped": units, "spaces": len(elements), **metrics}
        if not elements:
            signed = any(space.group.signs for space in program.spaces)
            what = "no sign to change" if signed else "no space admits signs"
            return PassResult(program, False, idle(program, what), metrics=metrics)
        summary = f"{units} signs of units in {len(elements)} spaces changed"
        if self.by == "range" and metrics["range_after"] < metrics["range_before"]:
            share = 1 - np.exp(metrics["range_after"] - metrics["range_before"])
            summary += f"; ranges of weights {100 * share:.1f}% smaller on average"
        witness = {name: [rows.tolist() for rows in table] for name, table in flipped.items()}
        return PassResult(
            program.act(elements),
            True,
            summary,
            witness,
            metrics,
            bit_exact=True,
            elements={s.name: g for s, g in elements.items()},
        )


def sign_elements(program: Program, signs: Gauge) -> dict[Space, Element]:
    """Return the element per space that multiplies every class by its sign in a table.

    Spaces that stay are left out.
    """
    found = {}
    for space, raw in zip(program.spaces, program.analysis.spaces, strict=True):
        if raw.kind == "blocks" or raw.table.shape[1] > 1 or not space.group.signs:
            continue
        table = signs.sign[raw.table[:, 0], : space.group.signs].T
        if (table < 0).any():
            found[space] = Element(np.arange(space.size), space.identity().scale, table)
    return found
