"""ONNX nodes as torch calls: the emitter, the table of operators, and whole models as a GraphModule.

One entry per ONNX operator stands in `to_torch_ops_*.py`, registered by `emits`. Integer chains that compute sizes stay
Python integers in the fx graph (`x.size(0)`, `operator.mul`), so that what is emitted can be traced and exported with
dynamic shapes; they become tensors only where a tensor is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx, nn

from cipm_ir.backends.torch.arguments import part_arguments
from cipm_ir.backends.torch.facts import Facts, Int, argument_default, held_tensor, is_default, refuse
from cipm_ir.backends.torch.ops.sizes import size_entries, tensor_of_sizes
from cipm_ir.backends.torch.places import attribute_at, free_path, identifier, register
from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.constants import LIMIT
from cipm_ir.ir.parameters import note_ir_version

__all__ = ["Emitter", "Int", "emits", "graph_module", "refuse", "supported"]

Entry: TypeAlias = "Callable[[Emitter, ir.Node], fx.Node | Sequence[fx.Node | None]]"

FAMILIES = (
    "elementwise", "linear", "convolution", "pooling", "normalization", "reduction", "shaping", "moving", "indexing",
    "creation", "resize", "recurrent", "attention", "quantized",
)  # fmt: skip
_TABLE: dict[tuple[str, str], Entry] = {}
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")
_STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that torch keeps as buffers: it has no derivative for them."""


def emits(*op_types: str, domain: str = "") -> Callable[[Entry], Entry]:
    """Register an entry for operators: it takes (emitter, node) and returns the fx node of each output.

    ValueError when an operator has an entry already.
    """

    def register(entry: Entry) -> Entry:
        for name in op_types:
            if (domain, name) in _TABLE:
                raise ValueError(f"operator {domain}::{name} has a torch entry already")
            _TABLE[(domain, name)] = entry
        return entry

    return register


def supported() -> frozenset[tuple[str, str]]:
    """(domain, operator) of everything that has an entry, or is written as numbers and constants."""
    _load()
    return frozenset(_TABLE) | {("", name) for name in ("Constant", "Shape", "Size")}


def _load() -> None:
    for family in FAMILIES:
        importlib.import_module(f"cipm_ir.backends.torch.ops.{family}")


class Emitter(Facts):
    """Writes nodes of an ONNX graph into a torch.fx graph, at the graph's insertion point.

    Where several nodes are emitted at different places, go in graph order: parameters are fetched once, at first use.

    Attributes:
        known: value name -> node of the fx graph that computes it (inputs, or what was emitted before).
        sizes: value name -> object array of `Int`, for integer values that are kept as Python integers.
        version: the version of the default operator set (see `Facts` for what is known without writing anything).
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, model: ir.Model, known: dict[str, fx.Node] | None = None
    ) -> None:
        _load()
        super().__init__(model)
        self.root, self.graph = root, graph
        self.known: dict[str, fx.Node] = {} if known is None else known
        self.fixed: frozenset[str] = frozenset()
        self.sizes: dict[str, np.ndarray] = {}
        self.nonnegative: set[fx.Node] = set()
        self._paths: dict[str, str] = {}
        self._dims: dict[tuple[fx.Node, int], fx.Node] = {}
        self._device: fx.Node | None = None
        self._hint: str | None = None

    # ------------------------------------------------------------ sizes
    def ints(self, v: ir.Value | None) -> list[Int] | None:
        """Return the entries of an integer value as sizes, flat; None where they are known only as a tensor."""
        if v is None:
            return None
        constant = self.constant(v)
        if constant is not None:
            return [int(i) for i in constant.ravel()]
        self._ensure(v)
        entries = self.size_array(v)
        return None if entries is None else list(entries.ravel())

    def size_array(self, v: ir.Value) -> np.ndarray | None:
        """Return a resolved integer value as an object array of `Int`; None where it is a tensor."""
        name = _name(v)
        if name in self.sizes:
            return self.sizes[name]
        folded = self._folded.get(name)
        if folded is None and (held := held_tensor(v)) is not None and held.size <= LIMIT:
            folded = np.asarray(held.numpy()) if held.dtype.is_integer() else None
        if folded is not None:
            return folded.astype(object) if folded.dtype.kind in "iu" else None
        node = self.known.get(name)
        seen = None if node is None else node.meta.get("val", node.meta.get("example_value"))
        if isinstance(seen, (int, torch.SymInt)) and not isinstance(seen, bool):
            return np.array(node, dtype=object)
        return None

    def size(self, v: ir.Value, axis: int) -> Int:
        """Return the size of a value along an axis: a number where it is static, else a node."""
        shape = self.shape(v)
        static = shape[axis] if shape is not None else None
        return static if static is not None else self.dim(self.value(v), axis)

    def dim(self, x: fx.Node, axis: int) -> fx.Node:
        """Return the node of `x.size(axis)`."""
        if (x, axis) not in self._dims:
            node = self.graph.call_method("size", (x, axis))
            self.nonnegative.add(node)
            self._dims[(x, axis)] = node
        return self._dims[(x, axis)]

    # ------------------------------------------------------------ writing
    def value(self, v: ir.Value) -> fx.Node:
        """Return the node that computes a value.

        Known, fetched from the root, or emitted together with what it needs.
        """
        name = _name(v)
        if name not in self.known:
            self._ensure(v)
        if name not in self.known:
            self.known[name] = self._materialized(v)
        return self.known[name]

    def optional(self, v: ir.Value | None) -> fx.Node | None:
        """`value`, or None for an input that is not given."""
        return None if v is None else self.value(v)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Return a call of a function, named after the ONNX value that is being computed."""
        return self.graph.create_node("call_function", target, args, kwargs, name=self._hint)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a call of a method of the first argument."""
        return self.graph.create_node("call_method", name, args, kwargs, name=self._hint)

    def module(self, hint: str, module: nn.Module, *args: Any) -> fx.Node:
        """Return a call of a new submodule of the root, in the root's mode."""
        path = free_path(self.root, identifier(hint))
        module.train(self.root.training)
        self.root.add_module(path, module)
        return self.graph.call_module(path, args)

    def buffer(self, array: np.ndarray, hint: str = "constant") -> fx.Node:
        """Return a new buffer of the root that holds the array."""
        path = register(self.root, hint, ir.tensor(array), trainable=False)
        return self.graph.get_attr(path)

    def device(self) -> dict[str, fx.Node]:
        """`{"device": ...}` for calls that make tensors: that of the first input, a float one if there is any."""
        if self._device is None:
            inputs = [(v, self.known.get(_name(v))) for v in self.model.graph.inputs]
            found = [(v, n) for v, n in inputs if n is not None and n.op == "placeholder"]
            found.sort(key=lambda pair: pair[0].dtype is None or not pair[0].dtype.is_floating_point())
            if not found:
                return {}
            last = found[0][1]
            while last.next.op == "placeholder":  # a graph keeps its placeholders together
                last = last.next
            with self.graph.inserting_after(last):
                self._device = self.graph.call_function(getattr, (found[0][1], "device"))
        return {"device": self._device}

    def emit(self, node: ir.Node) -> None:
        """Write one node through the table (and what it needs); `known` then holds each of its outputs."""
        for v in node.inputs:
            if v is not None:
                self._ensure(v)
        self.visit(node)
        for v in node.outputs:
            if v.name:
                self.value(v)

    def visit(self, node: ir.Node) -> None:
        """As `emit`, for a node whose inputs are resolved; constants and sizes stay unwritten until they are needed."""
        if len(node.outputs) == 1 and self.constant(node.outputs[0]) is not None:
            return
        entries = size_entries(self, node)
        if entries is not None:
            name = _name(node.outputs[0])
            if any(isinstance(n, fx.Node) for n in entries.ravel()):
                self.sizes[name] = entries
            else:
                self._folded[name] = np.array(entries.tolist(), bool if node.op_type == "Equal" else np.int64)
            return
        entry = _TABLE.get((node.domain, node.op_type))
        if entry is None:
            raise _missing(node)
        self._hint = identifier(node.outputs[0].name or node.op_type)
        made = entry(self, node)
        self._hint = None
        parts = [made] if isinstance(made, fx.Node) else list(made)
        for k, v in enumerate(node.outputs):
            part = parts[k] if k < len(parts) else None
            if part is not None and v.name:
                self.known[v.name] = part
            elif v.name and (v.uses() or v.is_graph_output()):
                raise refuse(node, f"output {k} ({v.name!r}) has no counterpart in torch; remove what reads it")

    # ------------------------------------------------------------ inside
    def _resolved(self, v: ir.Value) -> bool:
        name = _name(v)
        return (
            name in self.known or name in self.sizes or self._folded.get(name) is not None or held_tensor(v) is not None
        )

    def _ensure(self, v: ir.Value) -> None:
        stack = [v]
        while stack:
            top = stack[-1]
            if self._resolved(top) or self.constant(top) is not None:
                stack.pop()
                continue
            node = top.producer()
            if node is None:
                raise InputError(f"Value {top.name!r} is an input that has no node in the torch graph.")
            pending = [i for i in node.inputs if i is not None and not self._resolved(i) and self.constant(i) is None]
            stack.extend(pending)
            if not pending:
                self.visit(node)
                stack.pop()

    def _materialized(self, v: ir.Value) -> fx.Node:
        name = _name(v)
        if name in self.sizes:
            return tensor_of_sizes(self, self.sizes[name])
        held, trainable = held_tensor(v), False
        if held is not None and v.is_initializer():
            trainable = held.dtype.is_floating_point() and not _is_statistic(v) and name not in self.fixed
        if held is None:
            held = ir.tensor(np.array(self._folded[name], order="C"))
        if name not in self._paths:
            existing = attribute_at(self.root, name)
            path = f"constants.{identifier(name)}" if name in self.fixed else name
            self._paths[name] = name if existing is not None else register(self.root, path, held, trainable)
        return self.graph.get_attr(self._paths[name])


def _name(v: ir.Value) -> str:
    return v.name or ""


def _is_statistic(v: ir.Value) -> bool:
    return any(use.idx in _STATISTICS.get(use.node.op_type, ()) for use in v.uses())


def _missing(node: ir.Node) -> UnsupportedError:
    if node.op_type in _CONTROL and is_default(node):
        return refuse(node, "it runs a subgraph, which torch.fx cannot hold; keep the model in ONNX")
    if not is_default(node):
        return refuse(node, f"domain {node.domain!r} has no torch entry; replace it by standard operators")
    return refuse(node, "the operator has no torch entry; register one with to_torch_emitter.emits")


def needed_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Return the nodes that the outputs depend on, in graph order."""
    wanted: set[ir.Node] = set()
    stack = [v.producer() for v in graph.outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in wanted:
            wanted.add(node)
            stack.extend(v.producer() for v in node.inputs if v is not None)
    return (node for node in graph if node in wanted)


def _drop_unused(graph: fx.Graph) -> None:
    """Erase nodes without users; no call that is written here has a side effect."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def given_or(given: Any, default: Any) -> Any:
    """Return an argument, or its default where it is not given."""
    return default if given is None else given


def graph_module(model: ir.Model) -> fx.GraphModule:
    """Return the whole model as a GraphModule in eval mode; the model is not changed.

    Inputs become placeholders under their names made identifiers; the result is one tensor, or a tuple of several.
    Float initializers become parameters and the others buffers, under their own names where these are attribute paths
    (a dot makes a submodule). An input of floats with a default is an argument behind the others that may be left out,
    with a parameter or buffer for its default. Functions are inlined.

    Raises:
        UnsupportedError: a node cannot be written; the message names it.
    """
    if model.functions:
        model = InlinePass()(model.clone()).model
    graph, root = fx.Graph(), nn.Module()
    known: dict[str, fx.Node] = {}
    taken: set[str] = set()
    note_ir_version(model)
    optional = {v: held for v in model.graph.inputs if (held := argument_default(v)) is not None}
    for v in [*(v for v in model.graph.inputs if v.const_value is None), *optional]:
        name = identifier(_name(v))
        while name in taken:
            name += "_"
        taken.add(name)
        known[_name(v)] = graph.placeholder(name, **({"default_value": None} if v in optional else {}))
    for v, held in optional.items():
        path = register(root, _name(v), held, not _is_statistic(v))
        known[_name(v)] = graph.call_function(given_or, (known[_name(v)], graph.get_attr(path)))
    emitter = Emitter(root, graph, model, known)
    for node in needed_nodes(model.graph):
        emitter.visit(node)
    outputs = [emitter.value(v) for v in model.graph.outputs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    _drop_unused(graph)
    part_arguments(graph)
    graph.lint()
    return fx.GraphModule(root, graph, class_name=identifier(model.graph.name or "GraphModule")).eval()
