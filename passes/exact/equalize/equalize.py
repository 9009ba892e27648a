"""The pass `equalize`: the scales of a whole graph that make its weights easy to quantize, as one convex programme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cipm_ir.algebra import Element
from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.passes.exact.canonicalize.canonicalize import as_lists
from cipm_ir.passes.exact.canonicalize.gauge_limits import give_up_rounding
from cipm_ir.passes.exact.canonicalize.members import Floats, Members
from cipm_ir.passes.exact.equalize.report import figures_of, metrics_of, summary_of
from cipm_ir.passes.exact.equalize.solve import Objective, rounded, solve
from cipm_ir.passes.exact.equalize.terms import frozen, indices, terms_of
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import idle, listed, rounding
from cipm_ir.passes.framework.registry import register
from cipm_ir.runtime.activations.observe import observe
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

_LOG2 = float(np.log(2.0))
_FARTHEST = 24
"""Log2-scales beyond this are cut off: activations take the scale too, and must neither overflow nor vanish."""


@register("equalize")
@dataclass(frozen=True)
class Equalize(Pass):
    """Choose the free scales of all units at once such that quantizing the weights does the least harm; exact.

    1. Unknown: a log-scale for each unit and scale direction of every space, residual streams, gates, heads, depthwise
       chains, concatenations and shared weights included.
    2. Objective: the sum over all weights of the log of the noise energy that rounding to equal steps adds to their
       products, with one step per tensor or per row; with data, inputs weighted by their second moments, and with
       ``alpha`` the noise of quantized activations as well (SmoothQuant). Convex: a geometric programme.
    3. Least squares in the logarithms as the start, then L-BFGS on norms of growing power.
    4. Rounded to powers of two, then improved in steps of one: every result stays the same bit for bit.

    Left alone: units of which a weight has only zeros, weights with infinite or NaN entries, float16 weights unless
    ``exact=false``, and scales that a weight could not take without rounding or overflow. Sources: Nagel et al. 2019
    (pairs of layers); Xiao et al. 2023 (SmoothQuant). The witness holds an element per space; `canonicalize.undo` takes
    it back.
    """

    per: Literal["tensor", "channel"] = option("tensor", "weights are quantized with a step per tensor, or per channel")
    exact: bool = option(True, "powers of two only, so that every bit is kept; false: real scales")
    alpha: float = option(0.5, "with data: share of the activations in the objective; 0: weights only", low=0, high=1)
    samples: int = option(512, "samples of the data at most", low=1)
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Read the weights and the data, solve, round, act."""
        ctx.progress("equalize", 0.0)
        members = Members(program, exact=self.exact)
        data = ctx.data
        look = None if data is None else lambda names: channels(program, names, data, self.samples)
        terms = terms_of(members, look)
        still, reasons = frozen(members, terms)
        free = np.setdiff1d(indices(terms), np.flatnonzero(still))
        notes = [*reasons, *([rounding(program)] if self.exact and rounding(program) else [])]
        hidden = [space.name for space in program.spaces if data is not None and program.unseen(space)]
        if hidden:
            notes.append(f"{listed([f'@{name}' for name in hidden])} by weights alone: values in bodies cannot be seen")
        if not len(free):
            return PassResult(program, False, "; ".join([idle(program, "no weight has a scale that is free"), *notes]))
        objective = Objective(terms, free, self.per, self.alpha if data is not None else 0.0)
        found = solve(objective, lambda done: ctx.progress("equalize", 0.9 * done))
        flat = np.zeros(members.count * max(members.scales, 1))
        flat[free] = rounded(objective, found) if self.exact else found / _LOG2
        scale = np.clip(flat, -_FARTHEST, _FARTHEST).reshape(members.count, -1)
        lost = give_up_rounding(members, scale)
        elements = _elements(program, scale)
        if not elements:
            what = "already equalized: no scale by a power of two would help"
            if lost:
                what = f"scales of {lost} units would help, but a weight could not take them exactly"
            return PassResult(program, False, "; ".join([what, *notes]))
        metrics = metrics_of(program, terms, scale, self.per)
        before, after = metrics["product_sqnr"]
        if not objective.alpha and after < before:  # what was cut off or given up may be what the rest rested on
            what = f"left alone: the mean SQNR of the weights' products would fall from {before:.2f} to {after:.2f} dB"
            return PassResult(program, False, "; ".join([what, *notes]))
        witness = {space.name: as_lists(element) for space, element in elements.items()}
        summary = "; ".join([summary_of(metrics, len(elements), lost), *notes])
        acted, pictures = program.act(elements), figures_of(metrics)
        return PassResult(
            acted,
            True,
            summary,
            witness,
            metrics,
            figures=pictures,
            bit_exact=self.exact,
            elements={s.name: g for s, g in elements.items()},
        )


def _elements(program: Program, scale: Floats) -> dict[Space, Element]:
    """Return an element for each space that is scaled."""
    found = {}
    for space, raw in zip(program.spaces, program.analysis.spaces, strict=True):
        chosen = scale[raw.table[:, 0], : space.group.scales].T
        if chosen.any():
            signs = np.ones((space.group.signs, space.size), np.int8)
            found[space] = Element(np.arange(space.size), np.exp2(chosen), signs)
    return found


def channels(program: Program, names: set[str], data: Data, limit: int) -> dict[str, tuple[Floats, Floats]]:
    """Second moment and largest magnitude of each channel of some values: axis 1 where a Conv reads it, else the last.

    Raises:
        InputError: data that does not fit.
    """
    own = {value.name for value in program.model.graph.inputs}
    own |= {value.name for node in program.model.graph for value in node.outputs}
    axis = {name: -1 for name in names if name in own}
    for node in nodes_in_order(program.model.graph):
        if node.op_type == "Conv" and node.inputs[0] is not None and node.inputs[0].name in axis:
            axis[node.inputs[0].name or ""] = 1
    if not axis:
        return {}
    sums: dict[str, Floats] = {}
    peaks: dict[str, Floats] = {}
    rows: dict[str, float] = {}
    for _, values in observe(program.model, sorted(axis), data, limit=limit, what="look at the activations"):
        for name, value in values.items():
            if not value.ndim:
                continue
            flat = np.moveaxis(value, axis[name], -1).reshape(-1, value.shape[axis[name]])
            sums[name] = sums.get(name, 0.0) + np.einsum("rc,rc->c", flat, flat, dtype=np.float64)
            peaks[name] = np.maximum(peaks.get(name, 0.0), np.abs(flat).max(0).astype(np.float64))
            rows[name] = rows.get(name, 0.0) + len(flat)
    return {name: (sums[name] / rows[name], peaks[name]) for name in sums}
