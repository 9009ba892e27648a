"""The pass `cluster`: units that belong together become neighbours, and the modules of every space are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cipm_ir.algebra import Element
from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.passes.clustering.affinity import MEASURES, Affinities, activation_affinities, weight_affinities
from cipm_ir.passes.clustering.order import METHODS
from cipm_ir.passes.clustering.report import Shown, by_chance, figures_of, measure_all, summary_of
from cipm_ir.passes.clustering.scales import Arrangement, arrange
from cipm_ir.passes.clustering.weights import Weights
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import idle
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space


@register("cluster")
@dataclass(frozen=True)
class Cluster(Pass):
    """Reorder the units of every space so that similar ones are neighbours and modules become contiguous; exact.

    1. The similarity of two units is |correlation| of their activations on the data (`by="activations"`), or of their
       rows in all weights that move with them (`by="weights"`). For heads and groups the norms of their contents are
       compared.
    2. The method orders the units. The modules are the stretches of that order with the greatest modularity.
    3. `act` applies these permutations. Scales, signs and the function stay.

    Spaces of fewer than `smallest` units, and cells, stay as they are. The witness holds the permutation of each space
    and the module of each unit, both in the labels of the program before the pass. The metrics say how much of the
    weights' mass lies in blocks, the bandwidth and modularity before and after, and the effective dimension. Sources:
    Yang et al. 2024 (path), Atkins et al. 1998 (spectral), Bar-Joseph et al. 2001 (leaf order), Blondel et al. 2008
    (communities).
    """

    by: str = option(
        "auto",
        "what tells units apart; auto: activations where there is data",
        choices=("auto", "activations", "weights"),
    )
    method: str = option("leaf-order", "how units are ordered", choices=tuple(METHODS))
    scale: str = option(
        "layer",
        "each space alone, aligned with the spaces it shares weights with, or the network as one matrix",
        choices=("layer", "aligned", "network"),
    )
    measure: str = option(
        "correlation", "of likeness; distance needs weights, the last four data", choices=tuple(MEASURES)
    )
    resolution: float = option(1.0, "above 1: more and smaller modules", above=0.0)
    strength: float = option(0.5, "aligned, network: what weights between spaces count", low=0.0, high=1.0)
    hierarchical: bool | None = option(None, "network: order modules instead of units; none: where there are over 3000")
    smallest: int = option(3, "spaces with fewer units stay", low=2)
    control: bool = option(False, "also order shuffled matrices: what modularity and mass chance alone gives")
    limit: int = option(2048, "samples of the data at most", low=2)
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Compare, order, act, measure."""
        spaces = [s for s in program.spaces if s.kind != "cells" and s.group.permutes and s.size >= self.smallest]
        found = self._affinities(program, spaces, ctx)
        if not found.spaces:
            return PassResult(
                program, False, "; ".join([idle(program, "no space of units that could be ordered"), *found.remarks])
            )
        couplings = {} if self.scale == "layer" else Weights(program).couplings(tuple(found.spaces))

        def tick(done: int, count: int) -> None:
            ctx.progress(f"order units by {self.method}", done / max(count, 1))

        made = arrange(
            found.affinity,
            couplings,
            scale=self.scale,
            method=self.method,
            resolution=self.resolution,
            strength=self.strength,
            hierarchical=self.hierarchical,
            tick=tick,
        )
        made.remarks += found.remarks
        shown = Shown(found, made, couplings)
        metrics = {"by": found.by, "measure": self.measure, **measure_all(shown)}
        if self.control:
            metrics["chance"] = by_chance(found, self.method, self.resolution, ctx.rng)
        witness = _witness(found.spaces, made)
        elements = _elements(found.spaces, made)
        summary = summary_of(shown, metrics, len(elements))
        after = program.act(elements) if elements else program
        moved = {space.name: element for space, element in elements.items()}
        return PassResult(
            after, bool(elements), summary, witness, metrics, figures=figures_of(shown, metrics), elements=moved
        )

    def _affinities(self, program: Program, spaces: Sequence[Space], ctx: Context) -> Affinities:
        by = self.by if self.by != "auto" else ("weights" if ctx.data is None else "activations")
        if by == "weights":
            if self.by == "auto" and not MEASURES[self.measure].weights:
                raise InputError(
                    f"cluster by measure={self.measure} compares activations; give data= to run the model."
                )
            return weight_affinities(program, spaces, self.measure, ctx.progress)
        if ctx.data is None:
            raise InputError("cluster by activations runs the model; give data=, or use by=weights.")
        try:
            return activation_affinities(program, spaces, self.measure, ctx.data, self.limit, ctx.progress)
        except UnsupportedError as refusal:
            raise UnsupportedError(f"{str(refusal).rstrip('.')}; by=weights runs nothing.") from refusal


def _elements(spaces: Sequence[Space], made: Arrangement) -> dict[Space, Element]:
    elements = {}
    for space, order in zip(spaces, made.orders, strict=True):
        neutral = space.identity()
        element = Element(order, neutral.scale, neutral.sign)
        if not element.is_identity:
            elements[space] = element
    return elements


def _witness(spaces: Sequence[Space], made: Arrangement) -> dict[str, Any]:
    """Per space the permutation, and the module of each unit by its old place."""
    found = {}
    for space, order, label in zip(spaces, made.orders, made.modules, strict=True):
        module = np.empty(len(order), np.int64)
        module[order] = label
        found[space.name] = {"perm": order.tolist(), "module": module.tolist()}
    return found
