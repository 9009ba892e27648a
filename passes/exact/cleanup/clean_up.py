"""Generic clean-up: constants are folded, and nodes without effect, equal nodes and what nothing needs are removed.

What may go, and on which condition, is listed where it is decided: `no_ops` (nodes), `node_pairs` (pairs of nodes),
`fold_constants` (what is evaluated), `merge_nodes` (what is equal), `replace_values` (which names stay).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.nested import nodes_within, subgraphs
from cipm_ir.ir.opsets import standard_version
from cipm_ir.ir.parameters import named, parameter_tensor, unlist_parameters
from cipm_ir.passes.exact.affine.batch_norm import fold_batch_norms
from cipm_ir.passes.exact.cleanup.default_inputs import drop_defaults
from cipm_ir.passes.exact.cleanup.fold_constants import ConstantFolder, scalar_bounds
from cipm_ir.passes.exact.cleanup.graph_facts import GraphFacts
from cipm_ir.passes.exact.cleanup.merge_nodes import merge_nodes
from cipm_ir.passes.exact.cleanup.no_ops import copied_input
from cipm_ir.passes.exact.cleanup.node_pairs import join_pair, shape_of_input
from cipm_ir.passes.exact.cleanup.replace_values import remove_if_unused, remove_unused, replace_value
from cipm_ir.passes.exact.cleanup.reshapes import write_target
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.registry import register
from cipm_ir.runtime.checks import check_shapes
from cipm_ir.runtime.graphs import all_graphs
from cipm_ir.symmetry.program import Program


@register("fold-batch-norm")
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalizations (inference) into the Conv, ConvTranspose or Gemm before them.

    1. ``BatchNormalization(Conv(x, W, b))`` becomes ``Conv(x, W·s, (b - mean)·s + bias)`` with
       s = scale / sqrt(var + ε), computed in double precision and rounded once; ConvTranspose and Gemm likewise.
    2. Constants and Identity copies in place of W, b or the normalization's parameters are written as initializers.
       A weight that another node consumes too is copied first.

    Left alone, with the reason in the summary: a normalization in training mode, of opset 6 or earlier, or in a
    subgraph; one whose input has another consumer; parameters that are computed or that the caller may override; and
    new weights that do not fit into the type of the old ones. In files of IR version 3, where every initializer is also
    an input, the inputs become plain initializers first (IR version 4).
    """

    kind: ClassVar[Kind] = Kind.EXACT
    keeps_units: ClassVar[bool] = True
    ensures: ClassVar[frozenset[str]] = frozenset({"batch-norm-folded"})

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Fold what can be folded."""
        model = program.emit()
        lifted = unlist_parameters(model)
        folded, kept = fold_batch_norms(model)
        metrics = {"folded": folded, "left": kept.total(), "kept": dict(kept)}
        if not folded:
            return PassResult(program, False, _left(kept) if kept else "no batch normalization", metrics=metrics)
        summary = f"{_count(folded, 'batch normalization')} folded"
        summary += f"; {_left(kept)}" if kept else ""
        summary += f"; {lifted} initializers are no longer inputs" if lifted else ""
        return PassResult(Program.of(model, origin=program.origin, own=True), True, summary, metrics=metrics)


def _left(kept: Counter[str]) -> str:
    said = "; ".join(reason if len(kept) == 1 else f"{number}: {reason}" for reason, number in kept.items())
    return f"{_count(kept.total(), 'batch normalization')} kept ({said})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@register("clean-up")
@dataclass(frozen=True)
class CleanUp(Pass):
    """Fold constants and remove nodes without effect: identities, no-op casts and shape changes, unused nodes.

    1. Nodes whose result is the same in every run are evaluated, within the size limits. Quantized weights stay
       quantized, and nothing random is folded. An If with a constant condition becomes the branch that it takes.
    2. Nodes that return an input unchanged are removed, and some pairs become one node. Zero and one must be exact, a
       cast is removed only if it keeps the type, and shapes must be proven.
    3. With ``merge``, nodes of a graph that compute the same, bit for bit, are merged. Unused nodes are removed.

    Names, types and shapes of inputs and outputs stay, and so do names of initializers. Functions stay functions, and
    batch normalizations stay nodes. Initializers that callers may override are inputs: never folded, never removed.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    keeps_units: ClassVar[bool] = True
    input_size_limit: int = option(8192, "constants with more entries are not folded", low=1)
    output_size_limit: int = option(
        262144, "results with more entries are not stored, unless they replace larger constants", low=1
    )
    merge: bool = option(True, "merge nodes that compute the same")

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Clean a copy; without effect, the program that came in is returned."""
        model = program.emit()
        before = _signature(model)
        unlist_parameters(model)
        ctx.progress("constants and identities", 0.1)
        cleaner = _Cleaner(model, self.input_size_limit, self.output_size_limit)
        if not cleaner.run() and not _consistent(model):
            # An output has another shape than the file says. Where nothing can tell, such a file is valid; it stays so.
            model = program.emit()
            unlist_parameters(model)
            _Cleaner(model, self.input_size_limit, self.output_size_limit, write_targets=False).run()
        ctx.progress("equal nodes", 0.8)
        if self.merge:
            merge_nodes(model)
        remove_unused(model)
        after = _signature(model)
        if after == before:
            return PassResult(program, False, "nothing to clean")
        metrics = {"gone": before.total() - after.total()}
        return PassResult(
            Program.of(model, origin=program.origin, own=True), True, _summary(before, after), metrics=metrics
        )


class _Cleaner:
    """One walk over all graphs of a model in topological order, which folds, removes and joins as it goes."""

    def __init__(self, model: ir.Model, input_limit: int, output_limit: int, *, write_targets: bool = True) -> None:
        self.model, self.write_targets = model, write_targets
        self.facts = GraphFacts(model)
        self.folder = ConstantFolder(model, self.facts, input_limit, output_limit)
        self.taken = Counter(_names(model))

    def run(self) -> bool:
        """Clean everything; return whether the shapes that the file states for outputs agree with what is proven."""
        self._graph(list(self.model.graph), dict(self.model.opset_imports), in_function=False)
        for function in self.model.functions.values():
            self._graph(list(function), dict(function.opset_imports), in_function=True)
        remove_unused(self.model)
        for graph in all_graphs(self.model):
            for node in graph:
                shape_of_input(node, self.facts)
        wrong = [value for graph in all_graphs(self.model) for value in self._wrong_shapes(graph)]
        for value in wrong:
            if not value.is_graph_output():
                value.shape = None
        return not any(value.is_graph_output() for value in wrong)

    def _wrong_shapes(self, graph: ir.Graph) -> Iterator[ir.Value]:
        for value in (value for node in graph for value in node.outputs):
            stated, proven = value.shape, self.facts.shape(value)
            if stated is None or proven is None:
                continue
            pairs = [(a, b) for a, b in zip(stated, proven, strict=False) if isinstance(a, int) and isinstance(b, int)]
            if len(stated) != len(proven) or any(a != b for a, b in pairs):
                yield value

    def _graph(self, nodes: list[ir.Node], domains: dict[str, int], *, in_function: bool) -> None:
        for node in nodes:
            branch = _taken_branch(node, in_function=in_function)
            if branch is not None:
                self._graph(self._inlined(node, branch), domains, in_function=in_function)
            else:
                self._node(node, domains, in_function=in_function)

    def _node(self, node: ir.Node, domains: dict[str, int], *, in_function: bool) -> None:
        version = node.version or domains.get(node.domain, standard_version(domains, 1))
        scalar_bounds(node, self._name)
        drop_defaults(node)
        self.facts.learn(node, version)
        if self.write_targets:
            write_target(node, self.facts, version, self._name)
        same = join_pair(node, self.facts, version, self._name)
        if same is None:
            same = copied_input(node, self.facts, version)
        if same is not None and (maker := same.producer()) is not None and self.facts.shape(same) is None:
            self.facts.learn(maker, version)
        if same is not None and replace_value(node.outputs[0], same):
            remove_if_unused(node)
            return
        if not self.folder.fold(node, domains, in_function=in_function):
            for inner in subgraphs(node):
                self._graph(list(inner), domains, in_function=in_function)

    def _inlined(self, node: ir.Node, branch: ir.Graph) -> list[ir.Node]:
        """Move the nodes of the branch that an If always takes to its place; return them, and what keeps names."""
        graph = node.graph
        assert graph is not None
        results = list(branch.outputs)
        branch.outputs.clear()
        initializers, nodes = list(branch.initializers.values()), list(branch)
        branch.initializers.clear()
        branch.remove(nodes)
        # The other branch, or a graph that has nothing to do with this one, may use the same names.
        for value in (*initializers, *(v for inner in nodes for v in inner.outputs)):
            if value.name and self.taken[value.name] > 1:
                fresh = self._name(value.name)
                if value.const_value is not None:  # a tensor of its own: renaming a value renames its tensor
                    value.const_value = named(value.const_value, fresh)
                value.name = fresh
        for value in initializers:
            graph.register_initializer(value)
        graph.insert_before(node, nodes)
        for out, result in zip(node.outputs, results, strict=True):
            if not replace_value(out, result):
                copy = ir.Node("", "Identity", [result], num_outputs=1)
                copy.outputs[0].name = self._name("copy")
                copy.outputs[0].type = out.type
                graph.insert_before(node, copy)
                replace_value(out, copy.outputs[0])
                nodes.append(copy)
        remove_if_unused(node)
        return nodes

    def _name(self, base: str) -> str:
        name = next(n for k in itertools.count(1) if (n := f"{base}_{k}") not in self.taken)
        self.taken[name] += 1
        return name


def _consistent(model: ir.Model) -> bool:
    try:
        check_shapes(model)
    except InputError:
        return False
    return True


def _taken_branch(node: ir.Node, *, in_function: bool) -> ir.Graph | None:
    """Return the branch of an If whose condition is constant; functions have no place for a branch's initializers."""
    tensor = parameter_tensor(node.inputs[0]) if node.op_type == "If" and not node.domain else None
    if tensor is None or tensor.size != 1:
        return None
    branch = node.attributes["then_branch" if bool(np.asarray(tensor.numpy()).reshape(())) else "else_branch"]
    if branch.is_ref() or (in_function and branch.as_graph().initializers):
        return None
    return branch.as_graph()


def _names(model: ir.Model) -> Iterator[str]:
    for graph in all_graphs(model):
        values = {*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)}
        yield from (value.name for value in values if value.name)


def _signature(model: ir.Model) -> Counter[str]:
    """Return nodes with their inputs and outputs, and initializers, of all graphs: what a clean-up can change."""
    return Counter(_entries(model))


def _entries(model: ir.Model) -> Iterator[str]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in nodes_within(graph):
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
