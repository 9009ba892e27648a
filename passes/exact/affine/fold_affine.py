"""The pass `fold-affine`: constant scales and shifts go into the products before or after them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.opsets import standard_version
from cipm_ir.ir.parameters import unlist_parameters
from cipm_ir.passes.exact.affine.affine_maps import Map, affine_map, by_channel
from cipm_ir.passes.exact.affine.batch_norm import fold_batch_norms, give_output
from cipm_ir.passes.exact.affine.products import (
    PRODUCTS,
    Names,
    bias_of,
    channels,
    constant,
    copies,
    drop_unused,
    names_of,
    scale_input,
    scale_output,
)
from cipm_ir.passes.exact.cleanup.graph_facts import GraphFacts
from cipm_ir.passes.exact.cleanup.replace_values import remove_if_unused
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.program import Program

_VISIBLE = 2.0**-10
"""A shift that is smaller beside the bias than this may be an epsilon, which rounding would take away."""


@register("fold-affine")
@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold constant scales and shifts, batch normalizations among them, into the products before or after them.

    1. Batch normalizations (inference) as in `fold-batch-norm`.
    2. Mul, Div, Add and Sub with a constant, and Neg, behind a Conv, ConvTranspose, Gemm or MatMul are folded into its
       weight and bias. An Add behind a MatMul of matrices makes it a Gemm.
    3. The same operators, and normalizations, in front of a product that is their only consumer; a shift only if
       nothing is padded.

    A constant must be one number, or one for each channel. New weights are computed in double precision and rounded
    once. Left alone: values with another consumer, constants that are computed or may be overridden, weights that the
    new values do not fit into, a shift that is tiny compared with the bias (an epsilon), and everything inside
    subgraphs.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    keeps_units: ClassVar[bool] = True
    ensures: ClassVar[frozenset[str]] = frozenset({"batch-norm-folded"})

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Fold what can be folded."""
        model = program.emit()
        lifted = unlist_parameters(model)
        norms, kept = fold_batch_norms(model)
        done = _Folder(model).run()
        if done:  # behind what was folded, more normalizations may follow a product
            more, kept = fold_batch_norms(model)
            norms += more
        metrics = {"batch_norms": norms, "maps": done, "left": kept.total(), "kept": dict(kept)}
        left = "; ".join(f"{number} batch normalizations kept: {why}" for why, number in kept.items())
        if not norms and not done:
            return PassResult(
                program, False, left or "no constant scale or shift that a product can take", metrics=metrics
            )
        summary = f"{norms} batch normalizations and {done} scales and shifts folded"
        summary += f"; {left}" if left else ""
        summary += f"; {lifted} initializers are no longer inputs" if lifted else ""
        return PassResult(Program.of(model, origin=program.origin, own=True), True, summary, metrics=metrics)


class _Folder:
    """Folds scales and shifts of the main graph: forward into what is before, then backward into what is after."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.version = standard_version(self.graph.opset_imports)
        self.unused = {value for value in self.graph.initializers.values() if not value.uses()}
        self.sources: list[ir.Node] = []
        self._facts: GraphFacts | None = None

    def run(self) -> int:
        """Fold; return how many nodes went."""
        if self.version < 7:  # broadcasting by attributes
            return 0
        count = 0
        for step in (self._into_before, self._into_after, self._into_before):
            order = list(self.graph) if step is self._into_before else list(self.graph)[::-1]
            for node in order:
                found = affine_map(node, self.version) if node.graph is self.graph else None
                count += found is not None and step(node, found)
        if count:
            drop_unused([self.graph], self.unused, self.sources)
        return count

    def _into_before(self, node: ir.Node, found: Map) -> bool:
        value = found.source
        before = value.producer()
        if before is None or not self._alone(value) or sum(out is node.outputs[0] for out in self.graph.outputs) > 1:
            return False
        if found.norm or not self._has_constants(before, found):
            return False
        rank = self._rank(before)
        size = channels(before)[1]
        pair = [by_channel(part, size, rank, _axis(before), norm=found.norm) for part in found.parts]
        if any(vector is None and part is not None for vector, part in zip(pair, found.parts, strict=True)):
            return False
        factor, shift = pair
        if shift is not None and not _visible(shift, bias_of(before), factor):
            return False
        if shift is not None and before.op_type == "MatMul" and not self._made_gemm(before):
            return False
        if scale_output(before, factor, shift, self.names):
            return False
        self._note(node)
        give_output(node, before)
        return True

    def _into_after(self, node: ir.Node, found: Map) -> bool:
        out = node.outputs[0]
        after = next((use.node for use in out.uses()), None)
        if after is None or not self._alone(out) or after.inputs[0] is not out or not self._has_constants(after, found):
            return False
        if after.op_type == "Gemm" and attribute(after, "transA", 0):
            return False
        size, rank = channels(after)[0], self._rank(after)
        if rank is None and after.op_type == "MatMul":
            shape = self.facts.shape(found.source)
            rank = None if shape is None else len(shape)
        pair = [by_channel(part, size, rank, _axis(after), norm=found.norm) for part in found.parts]
        if any(vector is None and part is not None for vector, part in zip(pair, found.parts, strict=True)):
            return False
        factor, shift = pair
        if shift is not None and not _takes_shift(after):
            return False
        if scale_input(after, factor, shift, self.names):
            return False
        self._note(node)
        after.replace_input_with(0, found.source)
        remove_if_unused(node)
        return True

    # ------------------------------------------------------------ conditions
    def _alone(self, value: ir.Value) -> bool:
        """Return whether exactly one node reads a value of the main graph, and no output."""
        uses = list(value.uses())
        return len(uses) == 1 and not value.is_graph_output() and uses[0].node.graph is self.graph

    def _has_constants(self, node: ir.Node, found: Map) -> bool:
        """Return whether a node is a product whose weight and bias are constants of one type that may be changed."""
        if node.op_type not in PRODUCTS or node.domain or node.graph is not self.graph:
            return False
        if any(a.is_ref() for a in node.attributes.values()) or node.inputs[0] is None:
            return False
        weight = constant(node.inputs[1])
        if (
            weight is None
            or not weight.dtype.is_floating_point()
            or (node.op_type == "MatMul" and len(weight.shape) != 2)
        ):
            return False
        if found.factor is not None and len(node.inputs[1].uses()) > 1:  # type: ignore[union-attr]
            return False
        value = node.inputs[2] if len(node.inputs) > 2 else None
        bias = constant(value)
        if value is None:
            return True
        return bias is not None and bias.dtype == weight.dtype and bias.shape.numpy() == (channels(node)[1],)

    def _rank(self, node: ir.Node) -> int | None:
        """Return the number of axes of what a product takes and gives, which is known but for MatMul."""
        weight = constant(node.inputs[1])
        if node.op_type in ("Conv", "ConvTranspose") and weight is not None:
            return len(weight.shape)
        if node.op_type == "Gemm":
            return 2
        shape = self.facts.shape(node.inputs[0])
        return None if shape is None else len(shape)

    def _made_gemm(self, node: ir.Node) -> bool:
        """Make a MatMul of two matrices a Gemm, in place."""
        if self._rank(node) != 2:
            return False
        node.op_type = "Gemm"
        return True

    @cached_property
    def names(self) -> Names:
        """The names of all values; only the folding adds to them."""
        return names_of(self.graph)

    @property
    def facts(self) -> GraphFacts:
        """What is proven about the graph as it came in."""
        if self._facts is None:
            self._facts = GraphFacts(self.model)
            for node in self.graph:
                self._facts.learn(node, node.version or self.version)
        return self._facts

    def _note(self, node: ir.Node) -> None:
        """Remember what held the constants of a node, which may be needed no more."""
        self.sources += [copy for value in node.inputs for copy in copies(value)]


def _axis(node: ir.Node) -> int:
    """Return the axis of channels of what a product takes and gives."""
    return -1 if node.op_type in ("Gemm", "MatMul") else 1


def _takes_shift(node: ir.Node) -> bool:
    """Return whether a shift of all that a product takes is the same shift of all that it gives, which it can hold."""
    if node.op_type == "Gemm":
        return True
    unpadded = attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(attribute(node, "pads", ()))
    return node.op_type == "Conv" and unpadded


def _visible(shift: np.ndarray, bias: np.ndarray | None, factor: np.ndarray | None) -> bool:
    """Return whether no entry of a shift would vanish in the bias that is there."""
    if bias is None:
        return True
    there = np.abs(bias if factor is None else bias * factor)
    return bool(((shift == 0) | (np.abs(shift) >= _VISIBLE * there)).all())
