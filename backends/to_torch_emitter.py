"""ONNX nodes as torch calls: the emitter, the table of operators, and whole models as a GraphModule.

One entry per ONNX operator stands in `to_torch_ops_*.py`, registered by `emits`. Integer chains that compute sizes stay
Python integers in the fx graph (`x.size(0)`, `operator.mul`), so that what is emitted can be traced and exported with
dynamic shapes; they become tensors only where a tensor is asked for.
"""

from __future__ import annotations

import importlib
import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx, nn

from cipm_ir.backends.to_torch_tensors import torch_tensor
from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.constants import LIMIT, constant_tensor, evaluate
from cipm_ir.ir.shapes import Shapes, infer_shapes
from cipm_ir.runtime.graphs import describe_node

__all__ = ["Emitter", "Int", "emits", "graph_module", "refuse", "supported"]

Int: TypeAlias = "int | fx.Node"
"""A size: a Python integer, or the fx node that computes one."""
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
    """(domain, operator) of everything that has an entry."""
    _load()
    return frozenset(_TABLE)


def refuse(node: ir.Node, reason: str) -> UnsupportedError:
    """The error for a node that cannot be written exactly; `reason` says what is missing and what to do instead."""
    return UnsupportedError(f"{describe_node(node)} cannot be written as torch calls: {reason}.")


def _load() -> None:
    importlib.import_module("cipm_ir.backends.to_torch_sizes")
    for family in FAMILIES:
        importlib.import_module(f"cipm_ir.backends.to_torch_ops_{family}")


def identifier(name: str) -> str:
    """The name as a Python identifier."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    plain = f"v_{plain}" if plain[0].isdigit() else plain
    return f"{plain}_" if keyword.iskeyword(plain) else plain


class Emitter:
    """Writes nodes of an ONNX graph into a torch.fx graph, at the graph's insertion point.

    Where several nodes are emitted at different places, go in graph order: parameters are fetched once, at first use.

    Attributes:
        known: value name -> node of the fx graph that computes it (inputs, or what was emitted before).
        sizes: value name -> object array of `Int`, for integer values that are kept as Python integers.
        version: the version of the default operator set.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, model: ir.Model, known: dict[str, fx.Node] | None = None
    ) -> None:
        _load()
        self.root, self.graph, self.model = root, graph, model
        self.known: dict[str, fx.Node] = {} if known is None else known
        self.sizes: dict[str, np.ndarray] = {}
        self.nonnegative: set[fx.Node] = set()
        self.version = model.opset_imports.get("") or model.opset_imports.get("ai.onnx") or 1
        self._folded: dict[str, np.ndarray | None] = {}
        self._paths: dict[str, str] = {}
        self._dims: dict[tuple[fx.Node, int], fx.Node] = {}
        self._device: fx.Node | None = None
        self._inferred: Shapes | None = None
        self._hint: str | None = None

    # ------------------------------------------------------------ what is known before running
    def constant(self, v: ir.Value | None) -> np.ndarray | None:
        """The array that a value always holds: an initializer, a Constant, or small integer arithmetic on such."""
        if v is None:
            return None
        held = _held(v)
        if held is not None:
            return np.asarray(held.numpy())
        stack = [v]
        while stack:
            top = stack[-1]
            pending = [] if self._decided(top) else self._undecided_inputs(top)
            if pending:
                stack.extend(pending)
                continue
            if not self._decided(top):
                self._folded[_name(top)] = self._fold(top)
            stack.pop()
        return self._folded[_name(v)]

    def shape(self, v: ir.Value | None) -> tuple[int | None, ...] | None:
        """Static sizes of a value, None for a dynamic one; None where even the rank is unknown."""
        if v is None:
            return None
        if v.const_value is not None:
            return tuple(v.const_value.shape.numpy())
        if v.shape is not None and v.shape.is_static():
            return tuple(v.shape.numpy())
        shapes = self._shapes()
        first, second = shapes.first.get(_name(v)), shapes.second.get(_name(v))
        if first is not None and second is not None and len(first) == len(second):
            return tuple(a if a == b else None for a, b in zip(first, second, strict=True))
        return None if v.shape is None else tuple(d if isinstance(d, int) else None for d in v.shape)

    def rank(self, node: ir.Node, v: ir.Value | None) -> int:
        """Number of axes of a value; UnsupportedError where it cannot be inferred."""
        shape = self.shape(v)
        if shape is None:
            name = None if v is None else v.name
            raise refuse(node, f"the rank of {name!r} is unknown; run shape inference on the model first")
        return len(shape)

    def dtype(self, node: ir.Node, v: ir.Value | None) -> ir.DataType:
        """Element type of a value; UnsupportedError where it cannot be inferred."""
        found = None
        if v is not None:
            found = v.dtype or (v.const_value.dtype if v.const_value is not None else None)
            found = found or self._shapes().types.get(_name(v))
        if found is None:
            name = None if v is None else v.name
            raise refuse(node, f"the element type of {name!r} is unknown; run shape inference on the model first")
        return found

    # ------------------------------------------------------------ sizes
    def ints(self, v: ir.Value | None) -> list[Int] | None:
        """The entries of an integer value as sizes, flat; None where they are known only as a tensor."""
        if v is None:
            return None
        constant = self.constant(v)
        if constant is not None:
            return [int(i) for i in constant.ravel()]
        self._ensure(v)
        entries = self.size_array(v)
        return None if entries is None else list(entries.ravel())

    def size_array(self, v: ir.Value) -> np.ndarray | None:
        """A resolved integer value as an object array of `Int`; None where it is a tensor."""
        name = _name(v)
        if name in self.sizes:
            return self.sizes[name]
        folded = self._folded.get(name)
        if folded is None and (held := _held(v)) is not None and held.size <= LIMIT:
            folded = np.asarray(held.numpy()) if held.dtype.is_integer() else None
        if folded is not None:
            return folded.astype(object) if folded.dtype.kind in "iu" else None
        node = self.known.get(name)
        seen = None if node is None else node.meta.get("val", node.meta.get("example_value"))
        if isinstance(seen, (int, torch.SymInt)) and not isinstance(seen, bool):
            return np.array(node, dtype=object)
        return None

    def size(self, v: ir.Value, axis: int) -> Int:
        """Size of a value along an axis: a number where it is static, else a node."""
        shape = self.shape(v)
        static = shape[axis] if shape is not None else None
        return static if static is not None else self.dim(self.value(v), axis)

    def dim(self, x: fx.Node, axis: int) -> fx.Node:
        """The node of `x.size(axis)`."""
        if (x, axis) not in self._dims:
            node = self.graph.call_method("size", (x, axis))
            self.nonnegative.add(node)
            self._dims[(x, axis)] = node
        return self._dims[(x, axis)]

    # ------------------------------------------------------------ writing
    def value(self, v: ir.Value) -> fx.Node:
        """The node that computes a value: known, fetched from the root, or emitted together with what it needs."""
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
        """A call of a function, named after the ONNX value that is being computed."""
        return self.graph.create_node("call_function", target, args, kwargs, name=self._hint)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a method of the first argument."""
        return self.graph.create_node("call_method", name, args, kwargs, name=self._hint)

    def module(self, hint: str, module: nn.Module, *args: Any) -> fx.Node:
        """A call of a new submodule of the root."""
        path = self._free_path(identifier(hint))
        self.root.add_module(path, module)
        return self.graph.call_module(path, args)

    def buffer(self, array: np.ndarray, hint: str = "constant") -> fx.Node:
        """A new buffer of the root that holds the array."""
        path = self._register(hint, ir.tensor(array), trainable=False)
        return self.graph.get_attr(path)

    def device(self) -> dict[str, fx.Node]:
        """`{"device": ...}` for calls that make tensors: the device of the first input, nothing where there is none."""
        if self._device is None:
            tensors = (n for n in self.known.values() if not isinstance(n.meta.get("val"), (int, torch.SymInt)))
            first = next(tensors, None)
            if first is None:
                return {}
            with self.graph.inserting_after(_after_inputs(first)):
                self._device = self.graph.call_function(getattr, (first, "device"))
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
        from cipm_ir.backends.to_torch_sizes import size_entries

        if len(node.outputs) == 1 and self.constant(node.outputs[0]) is not None:
            return
        entries = size_entries(self, node)
        if entries is not None:
            self.sizes[_name(node.outputs[0])] = entries
            return
        entry = _TABLE.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
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
    def _shapes(self) -> Shapes:
        if self._inferred is None:
            self._inferred = infer_shapes(self.model)
        return self._inferred

    def _decided(self, v: ir.Value) -> bool:
        return _name(v) in self._folded or _held(v) is not None

    def _undecided_inputs(self, v: ir.Value) -> list[ir.Value]:
        node = v.producer()
        if node is None or not foldable(node):
            return []
        if node.op_type in ("Shape", "Size"):
            return []
        return [i for i in node.inputs if i is not None and not self._decided(i)]

    def _fold(self, v: ir.Value) -> np.ndarray | None:
        node = v.producer()
        if node is None or not foldable(node):
            return None
        shape = self.shape(node.inputs[0]) if node.op_type in ("Shape", "Size") else None
        static = None if shape is None or None in shape else tuple(d for d in shape if d is not None)
        args = [None if i is None else self._small(i) for i in node.inputs]
        return evaluate(node, [] if node.op_type in ("Shape", "Size") else args, static, self.version)

    def _small(self, v: ir.Value) -> np.ndarray | None:
        """A constant that may be folded: weights stay parameters."""
        held = _held(v)
        if held is None:
            return self._folded.get(_name(v))
        trained = v.is_initializer() and not (held.dtype.is_integer() or held.dtype == ir.DataType.BOOL)
        return None if trained or held.size > LIMIT else np.asarray(held.numpy())

    def _resolved(self, v: ir.Value) -> bool:
        name = _name(v)
        return name in self.known or name in self.sizes or self._folded.get(name) is not None or _held(v) is not None

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
        from cipm_ir.backends.to_torch_sizes import tensor_of_sizes

        name = _name(v)
        if name in self.sizes:
            return tensor_of_sizes(self, self.sizes[name])
        held, trainable = _held(v), False
        if held is not None and v.is_initializer():
            trainable = held.dtype.is_floating_point() and not _is_statistic(v)
        if held is None:
            held = ir.tensor(np.ascontiguousarray(self._folded[name]))
        if name not in self._paths:
            existing = attribute_at(self.root, name)
            self._paths[name] = name if existing is not None else self._register(name, held, trainable)
        return self.graph.get_attr(self._paths[name])

    def _register(self, name: str, held: ir.TensorProtocol, trainable: bool) -> str:
        path = self._free_path(name if _is_path(name) else identifier(name))
        *folders, leaf = path.split(".")
        module = self.root
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        tensor = torch_tensor(held)
        if trainable:
            module.register_parameter(leaf, nn.Parameter(tensor))
        else:
            module.register_buffer(leaf, tensor)
        return path

    def _free_path(self, path: str) -> str:
        candidate, k = path, 0
        while not _is_free(self.root, candidate):
            k += 1
            candidate = f"{path}_{k}"
        return candidate


def foldable(node: ir.Node) -> bool:
    """Whether a node may be part of a constant chain."""
    from cipm_ir.backends.to_torch_sizes import CHAIN

    return node.domain in ("", "ai.onnx") and len(node.outputs) == 1 and node.op_type in CHAIN


def _name(v: ir.Value) -> str:
    return v.name or ""


def _held(v: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant."""
    if v.const_value is not None:
        return v.const_value
    node = v.producer()
    return constant_tensor(node) if node is not None and node.op_type == "Constant" else None


def _is_statistic(v: ir.Value) -> bool:
    return any(use.idx in _STATISTICS.get(use.node.op_type, ()) for use in v.uses())


def _is_path(name: str) -> bool:
    return all(re.fullmatch(r"[A-Za-z_]\w*|\d+", part, flags=re.ASCII) for part in name.split("."))


def attribute_at(root: nn.Module, path: str) -> torch.Tensor | None:
    """The tensor at a dotted path below a module, or None."""
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None


def _is_free(root: nn.Module, path: str) -> bool:
    *folders, leaf = path.split(".")
    module = root
    for folder in folders:
        if folder not in module._modules:
            return not hasattr(module, folder)
        module = module.get_submodule(folder)
    return not hasattr(module, leaf)


def _after_inputs(first: fx.Node) -> fx.Node:
    """The last placeholder where `first` is one (a graph keeps them together), else `first`."""
    last = first
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    return last


def _missing(node: ir.Node) -> UnsupportedError:
    if node.op_type in _CONTROL and node.domain in ("", "ai.onnx"):
        return refuse(node, "it runs a subgraph, which torch.fx cannot hold; keep the model in ONNX")
    if node.domain not in ("", "ai.onnx"):
        return refuse(node, f"domain {node.domain!r} has no torch entry; replace it by standard operators")
    return refuse(node, "the operator has no torch entry; register one with to_torch_emitter.emits")


def _needed(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that the outputs depend on, in graph order."""
    wanted: set[ir.Node] = set()
    stack = [v.producer() for v in graph.outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in wanted:
            wanted.add(node)
            stack.extend(v.producer() for v in node.inputs if v is not None)
    return (node for node in graph if node in wanted)


def graph_module(model: ir.Model) -> fx.GraphModule:
    """The whole model as a GraphModule in eval mode; the model is not changed.

    Inputs become placeholders under their names made identifiers; the result is one tensor, or a tuple of several.
    Float initializers become parameters and the others buffers, under their own names where these are attribute paths
    (a dot makes a submodule). Functions are inlined. UnsupportedError names the node that cannot be written.
    """
    if model.functions:
        model = InlinePass()(model.clone()).model
    graph, root = fx.Graph(), nn.Module()
    known: dict[str, fx.Node] = {}
    taken: set[str] = set()
    for v in model.graph.inputs:
        if v.const_value is None:
            name = identifier(_name(v))
            while name in taken:
                name += "_"
            taken.add(name)
            known[_name(v)] = graph.placeholder(name)
    emitter = Emitter(root, graph, model, known)
    for node in _needed(model.graph):
        emitter.visit(node)
    outputs = [emitter.value(v) for v in model.graph.outputs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(root, graph, class_name=identifier(model.graph.name or "GraphModule")).eval()
