"""Generic clean-up and the folding of batch normalizations, delegated to onnxscript's optimizer and onnx_ir's passes.

What is done here is to say which nodes they may touch, and to prepare the graph so that they can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
)

from cipm_ir.passes.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.batch_norm import fold_batch_norms
from cipm_ir.passes.registry import register
from cipm_ir.runtime.graphs import quiet
from cipm_ir.symmetry.program import Program

# Kept out of onnxscript's fold of constants as a whole: each of these draws anew in every run.
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


@register("fold-batch-norm")
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds batch normalizations (inference) into the Conv, ConvTranspose or Gemm before them.

    1. ``BatchNormalization(Conv(x, W, b))`` becomes ``Conv(x, W·s, (b - mean)·s + bias)`` with
       s = scale / sqrt(var + ε); ConvTranspose and Gemm likewise.
    2. Constants and Identity copies that stand for W, b or the normalization's parameters are written as initializers;
       a weight that another node reads too is copied first.

    Refused, and left as it is: a normalization in training mode or of opset 6 and before, an inner value that something
    else reads too, parameters that are computed, may be overridden by the caller, or have another type than the
    weights. In files of ir_version 3, where every initializer is an input too, the inputs become plain initializers
    first (ir_version 4). Rewriting: onnxscript.rewriter.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    ensures: ClassVar[frozenset[str]] = frozenset({"batch-norm-folded"})

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Fold what can be folded."""
        model = program.emit()
        lifted = _free_initializers(model)
        folded, left = fold_batch_norms(model)
        if not folded:
            return PassResult(program, False, _left(left) if left else "no batch normalization")
        summary = f"{_count(folded, 'batch normalization')} folded"
        summary += f"; {_left(left)}" if left else ""
        summary += f"; {lifted} initializers are no longer inputs" if lifted else ""
        metrics = {"folded": folded, "left": left}
        return PassResult(Program.of(model, origin=program.origin), True, summary, metrics=metrics)


def _left(left: int) -> str:
    return f"{_count(left, 'batch normalization')} kept, as nothing before it can take it"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@register("clean-up")
@dataclass(frozen=True)
class CleanUp(Pass):
    """Folds constants and removes what has no effect: identities, no-op casts and shape changes, unused nodes.

    1. Nodes of constants only are evaluated, within the size limits (onnxscript.optimizer.fold_constants); quantized
       weights stay quantized, and nothing random is folded.
    2. Identity, x + 0, x · 1, casts, transposes and reshapes without effect, and pairs of these go
       (onnxscript.rewriter).
    3. Nodes that compute the same are merged, if asked (onnx_ir); nodes and initializers that nothing reads go.

    Names of inputs, outputs and initializers stay, functions stay functions, batch normalizations stay nodes.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    input_size_limit: int = option(8192, "constants with more entries are not folded", low=1)
    output_size_limit: int = option(
        262144, "results with more entries are not stored, unless they replace larger constants", low=1
    )
    merge: bool = option(True, "merge nodes that compute the same")

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Clean a copy; without effect, the program that came in is given back."""
        model = program.emit()
        before = _signature(model)
        names = [value.name for value in model.graph.outputs]
        _free_initializers(model)
        ctx.progress("constants", 0.1)
        _fold_constants(model, self.input_size_limit, self.output_size_limit)
        ctx.progress("rewriting", 0.6)
        _remove_no_ops(model)
        if self.merge:
            CommonSubexpressionEliminationPass()(model)
        IdentityEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        for value, name in zip(model.graph.outputs, names, strict=True):
            value.name = name
        after = _signature(model)
        if after == before:
            return PassResult(program, False, "nothing to clean")
        metrics = {"gone": before.total() - after.total()}
        return PassResult(Program.of(model, origin=program.origin), True, _summary(before, after), metrics=metrics)


def _free_initializers(model: ir.Model) -> int:
    """In ir_version 3 every initializer had to be a graph input too: make them plain, and count them."""
    if model.ir_version >= 4:
        return 0
    before = len(model.graph.inputs)
    model.ir_version = 4
    RemoveInitializersFromInputsPass()(model)
    return before - len(model.graph.inputs)


def _fold_constants(model: ir.Model, input_limit: int, output_limit: int) -> None:
    from onnxscript.optimizer import fold_constants

    def should_fold(node: ir.Node) -> bool | None:
        return False if node.op_type in _RANDOM else None

    with quiet("onnxscript"):  # warns of each node that it tries to fold and cannot
        fold_constants(model, input_size_limit=input_limit, output_size_limit=output_limit, should_fold=should_fold)


def _remove_no_ops(model: ir.Model) -> None:
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common

    # Only rules that take nodes away; those that fuse or choose other operators are a matter of taste or of the target.
    rules = [
        common.add_0_rule,
        common.sub_0_rule,
        common.mul_by_1_rule,
        common.div_by_1_rule,
        common.dropout_zero_rule,
        common.dropout_inference_rule,
        common.cast_cast_rule,
        common.no_op_cast_rule,
        common.no_op_expand_rule,
        common.no_op_transpose_rule,
        common.transpose_transpose_rule,
        common.reshape_reshape_rule,
        common.unsqueeze_unsqueeze_rule,
    ]
    RewritePass(rules)(model)


def _signature(model: ir.Model) -> Counter[str]:
    """Nodes with their inputs and outputs, and initializers, of all graphs: what a clean-up can change."""
    return Counter(_entries(model))


def _entries(model: ir.Model) -> Iterator[str]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            names = [value.name if value is not None else "" for value in (*node.inputs, *node.outputs)]
            yield f"node {node.domain}::{node.op_type} {names} {sorted(node.attributes)}"
        yield from (f"initializer {name}" for name in graph.initializers)


def _summary(before: Counter[str], after: Counter[str]) -> str:
    def count(entries: Counter[str], what: str) -> int:
        return sum(number for entry, number in entries.items() if entry.startswith(what))

    return ", ".join(
        f"{count(before, what)} to {count(after, what)} {plural}"
        for what, plural in (("node", "nodes"), ("initializer", "initializers"))
    )
