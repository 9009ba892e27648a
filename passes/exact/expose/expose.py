"""The pass `expose`: rewrites of the graph after which more of it may be scaled, signed or rotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from cipm_ir.ir.parameters import unlist_parameters
from cipm_ir.passes.exact.affine.batch_norm import fold_batch_norms
from cipm_ir.passes.exact.expose.centre import centre_streams
from cipm_ir.passes.exact.expose.clip import write_bounds
from cipm_ir.passes.exact.expose.gain import directions
from cipm_ir.passes.exact.expose.norm import fold_norms
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter
from cipm_ir.passes.exact.expose.scale import fold_scales
from cipm_ir.passes.exact.expose.shared import split_shared
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.program import Program

# The count of free scales falls by these, which is said so that it is not mistaken for a loss.
_FOLDED = "folded, and the scales between it and its product with it"


@register("expose")
@dataclass(frozen=True)
class Expose(Pass):
    """Rewrite the graph, exactly, so that its symmetry group is larger and free of rounding.

    1. ``shared``: each consumer of a shared vector gets its own copy; with "all" also of a matrix, if that frees
       symmetry.
    2. ``batch_norm``: batch normalizations are folded into the product before them (see `fold-batch-norm`).
    3. ``norm``: gamma and beta of a layer or RMS normalization, one operator or spelled out, are folded into the
       products that consume it, through reshapes and transposes. Gamma becomes ones (it still carries scales), beta is
       removed.
    4. ``layer_scale``: a constant vector that multiplies the output of a product unit by unit is folded into the
       product.
    5. ``centre``: if the input of layer normalizations is written by products, biases and tables alone, and nothing
       else consumes it, the mean is removed from the writers and the normalizations become RMS normalizations. This is
       done where it frees signs (with equal gammas: rotations). An RMS normalization is also faster.
    6. ``relu6``: Clip(x, 0, 6), or between other constants, becomes Relu and Min with a bound for each unit, equal bit
       for bit, if the analysis then finds scales. ``hardtanh``: Clip(x, -c, c) too, which gives up its signs.

    Left alone, with the reason in the summary: a normalization that anything but products consumes, weights that are
    computed, quantized, shared (see ``shared``) or would round in half precision, and everything inside subgraphs.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    keeps_units: ClassVar[bool] = True
    ensures: ClassVar[frozenset[str]] = frozenset({"exposed"})

    batch_norm: bool = option(True, "fold batch normalizations into the products before them")
    norm: bool = option(True, "fold gamma and beta of layer and RMS normalizations into the products that read them")
    layer_scale: bool = option(True, "fold constants that multiply a product unit by unit into the product")
    centre: bool = option(True, "centre the streams that layer normalizations read, and make these RMS normalizations")
    shared: Literal["vectors", "all", "none"] = option("vectors", "which shared constants may be split; costs memory")
    # Off: onnxruntime's convolutions take a Clip in and no Min, which costs MobileNetV2 three quarters more time.
    relu6: bool = option(False, "give each unit of a Clip from 0 to 6, or between other constants, a bound of its own")
    hardtanh: bool = option(False, "the same for a Clip from -c to c, whose units then lose their signs")

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rewrite a copy, one kind after the other."""
        model, done = _plain_copy(program), _Done()
        if self.batch_norm:
            ctx.progress("batch normalizations", 0.1)
            folded, kept = fold_batch_norms(model)
            done.note("batch_norms", folded, "batch normalization", _FOLDED, dict(kept))
        draft = GraphRewriter(model, self.shared)
        self._rewrite(draft, ctx, done)
        if not any(done.counts.values()):
            return PassResult(program, False, "; ".join(done.said) or "nothing to expose", metrics=done.metrics)
        draft.sweep()
        result = Program.of(model, origin=program.origin)
        before, after = directions(program), directions(result)
        grown = [f"{what.replace('_', ' ')} {n} to {after[what]}" for what, n in before.items() if after[what] != n]
        summary = "; ".join([*done.said, *([", ".join(grown)] if grown else [])])
        return PassResult(result, True, summary, metrics={**done.metrics, "before": before, "after": after})

    def _rewrite(self, draft: GraphRewriter, ctx: Context, done: _Done) -> None:
        if self.shared != "none":
            ctx.progress("shared constants", 0.2)
            split = split_shared(draft)
            done.note("split", len(split.names), "shared constant", f"split ({split.bytes} bytes more)", {})
        if self.layer_scale:
            ctx.progress("layer scales", 0.3)
            scaled = fold_scales(draft)
            draft.sweep()  # what is left over would still read the streams
            done.note("layer_scales", scaled.scales, "scale by unit", "folded into the product before", scaled.kept)
        if self.norm:
            ctx.progress("normalizations", 0.4)
            folded = fold_norms(draft)
            done.note("norms", folded.norms, "gamma", f"folded into {_number(folded.products, 'product')}", folded.kept)
        if self.centre:
            ctx.progress("streams", 0.6)
            centred = centre_streams(draft)
            done.note("centred", centred.norms, "layer normalization", "made RMS", centred.kept)
        if self.relu6 or self.hardtanh:
            ctx.progress("clips", 0.8)
            clips = write_bounds(draft, relu6=self.relu6, hardtanh=self.hardtanh)
            done.note("clips", clips.clips, "clip", "given bounds by unit", clips.kept)


@dataclass
class _Done:
    """What was rewritten and what was kept, in numbers and in words."""

    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def note(self, key: str, count: int, what: str, did: str, kept: Mapping[str, int]) -> None:
        """Count one kind of rewrite; the two commonest reasons against it are listed, the others counted."""
        self.counts[key] = count
        reasons = Counter({reason: number for reason, number in kept.items() if number})
        if count:
            self.said.append(f"{_number(count, what)} {did}")
        if not reasons:
            return
        self.kept[key] = dict(reasons)
        common = reasons.most_common(2)
        self.said += [f"{_number(number, what)} kept: {reason}" for reason, number in common]
        rest = reasons.total() - sum(number for _, number in common)
        self.said += [f"{_number(rest, what)} kept for other reasons"] if rest else []

    @property
    def metrics(self) -> dict[str, Any]:
        """For the report."""
        return {**self.counts, **({"kept": self.kept} if self.kept else {})}


def _plain_copy(program: Program) -> ir.Model:
    """Return the model without functions, and with initializers that are no inputs (ir_version 3 had them be both)."""
    model = program.emit()
    if model.functions:
        model = InlinePass()(model).model
    unlist_parameters(model)
    return model


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
