"""Which bodies of If, Loop and Scan inputs enter, and models in which an If takes a branch whatever its condition says.

A comparison on inputs says nothing of a branch that none of them takes. To find out, every If, Loop and Scan gets one
more output: how often each body below it ran. Bodies go by their paths (`cipm_ir.ir.bodies`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from cipm_ir.ir.bodies import bodies, body_graphs, body_path, is_control_flow
from cipm_ir.ir.nested import graphs_within, nodes_within
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.runtime.content import add_graph, add_tensor
from cipm_ir.runtime.inputs.generate import Feeds
from cipm_ir.runtime.session import Backend, Runner

_COUNTS = "cipm_ir.entered"


def has_bodies(model: ir.Model) -> bool:
    """Return whether a model, or a function of it, holds an If, Loop or Scan."""
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    return any(is_control_flow(node) for graph in graphs for node in nodes_within(graph))


def without_functions(model: ir.Model) -> ir.Model:
    """Return the model, or a copy with its functions inlined where one of them holds a body."""
    inside = any(
        is_control_flow(node) for function in model.functions.values() for node in nodes_within(function.graph)
    )
    return InlinePass()(model.clone()).model if inside else model


class EntryCounter:
    """Runs a model and tells how often each of its bodies ran; use it as a context manager.

    Args:
        model: without functions that hold bodies, see `without_functions`; not changed.
        backend: see `Runner`.

    Raises:
        InputError, UnsupportedError: the model with its counters cannot be opened.
    """

    def __init__(self, model: ir.Model, backend: Backend | None) -> None:
        copy = model.clone()
        counter = _Counter(int(copy.opset_imports.get("", 1)))
        self.paths, counts = counter.instrument(copy.graph, "")
        if counts is not None:
            counts.name = _COUNTS
            copy.graph.outputs.append(counts)
        self._runner = Runner(copy, backend=backend)

    def __call__(self, feeds: Feeds) -> dict[str, int]:
        """Return how often each body ran, by path.

        Raises:
            InputError: the run failed.
        """
        if not self.paths:
            return {}
        counts = np.asarray(self._runner.run(feeds, [_COUNTS])[_COUNTS], np.int64)
        return dict(zip(self.paths, counts.tolist(), strict=True))

    def __enter__(self) -> EntryCounter:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()


class _Counter:
    """Adds counters to graphs; a vector of counts has an entry for each body below a graph, in the order of paths."""

    def __init__(self, opset: int) -> None:
        self._opset, self._made = opset, 0

    def instrument(self, graph: ir.Graph, path: str) -> tuple[list[str], ir.Value | None]:
        """Return the paths of all bodies below a graph, and the vector of their counts in it; None without bodies."""
        paths: list[str] = []
        parts: list[ir.Value] = []
        for node in list(graph):
            if is_control_flow(node):
                below, part = self._node(node, path)
                paths += below
                parts.append(part)
        return paths, self._joined(graph, parts) if parts else None

    def _node(self, node: ir.Node, path: str) -> tuple[list[str], ir.Value]:
        """Let every body of a node give out its counts: 1 for itself, and what is below it."""
        below = [(body, body_path(path, node, key)) for key, body in bodies(node)]
        found = [(body, own, *self.instrument(body, own)) for body, own in below]
        paths = [one for _, own, inner, _ in found for one in (own, *inner)]
        for place, (body, _, inner, counts) in enumerate(found):
            before = sum(1 + len(paths_) for _, _, paths_, _ in found[:place])
            after = len(paths) - before - 1 - len(inner)
            one = [self._constant(body, np.r_[np.zeros(before, np.int64), np.int64(1)])]
            middle = [counts] if counts is not None else []
            body.outputs.append(self._joined(body, [*one, *middle, self._constant(body, np.zeros(after, np.int64))]))
        node.resize_outputs(len(node.outputs) + 1)
        out = node.outputs[-1]
        out.name, out.type = self._name(), ir.TensorType(ir.DataType.INT64)
        if node.op_type == "If":
            return paths, out
        for name in ("scan_output_axes", "scan_output_directions"):
            if name in node.attributes:
                values = [*node.attributes[name].as_ints(), 0]
                node.attributes[name] = ir.AttrInt64s(name, values)
        assert node.graph is not None
        return paths, self._summed(node.graph, out)

    def _summed(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """Return the sum over all runs of a body."""
        attributes: dict[str, Any] = {"keepdims": 0}
        inputs = [value]
        if self._opset < 13:
            attributes["axes"] = [0]
        else:
            inputs.append(self._constant(graph, np.zeros(1, np.int64)))
        return self._added(graph, ir.node("ReduceSum", inputs, attributes))

    def _joined(self, graph: ir.Graph, parts: Sequence[ir.Value]) -> ir.Value:
        return self._added(graph, ir.node("Concat", list(parts), {"axis": 0}))

    def _constant(self, graph: ir.Graph, array: np.ndarray) -> ir.Value:
        made = ir.node("Constant", [], {"value": ir.tensor(array)})
        graph.insert_before(graph[0], made) if len(graph) else graph.append(made)
        return self._named(made)

    def _added(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        graph.append(node)
        return self._named(node)

    def _named(self, node: ir.Node) -> ir.Value:
        node.outputs[0].name, node.outputs[0].type = self._name(), ir.TensorType(ir.DataType.INT64)
        return node.outputs[0]

    def _name(self) -> str:
        self._made += 1
        return f"{_COUNTS}.{self._made}"


def forced(model: ir.Model, path: str) -> ir.Model | None:
    """Return a copy in which an If always takes the branch with this path; None where the model has no such branch."""
    copy = model.clone()
    for node, outer in _holders(copy.graph, ""):
        for key, _ in bodies(node):
            if node.op_type == "If" and body_path(outer, node, key) == path and node.graph is not None:
                # computed from the condition: runtimes that see a constant there rewrite the graph
                made = [ir.node("Xor", [node.inputs[0], node.inputs[0]])]
                if key == "then_branch":
                    made.append(ir.node("Not", [made[0].outputs[0]]))
                for count, one in enumerate(made):
                    one.outputs[0].name = f"{path}.taken.{count}"
                    node.graph.insert_before(node, one)
                node.replace_input_with(0, made[-1].outputs[0])
                return copy
    return None


def _holders(graph: ir.Graph, path: str) -> list[tuple[ir.Node, str]]:
    found: list[tuple[ir.Node, str]] = []
    for node in graph:
        for key, body in bodies(node):
            found += _holders(body, body_path(path, node, key))
        if is_control_flow(node):
            found.append((node, path))
    return found


def body_hash(model: ir.Model, path: str) -> bytes:
    """Return a hash of a body: its nodes, names and weights, and the weights that it uses of the graphs around it.

    Empty where the model has no body with this path.
    """
    graph = next((body for known, _, body in body_graphs(model.graph) if known == path), None)
    if graph is None:
        return b""
    digest = hashlib.sha256()
    add_graph(digest, graph)
    inside = set(graphs_within(graph))
    for node in nodes_within(graph):
        for value in node.inputs:
            tensor = parameter_tensor(value)
            if value is not None and tensor is not None and value.graph not in inside:
                add_tensor(digest, tensor)
    return digest.digest()
