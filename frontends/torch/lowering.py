"""Walks a torch graph once: each node becomes ONNX nodes by the table, or an opaque one in the domain ``pkg.torch``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from cipm_ir.errors import UnsupportedError, UnsupportedPattern
from cipm_ir.frontends.torch.call import call_of
from cipm_ir.frontends.torch.capture import Traced, is_changed
from cipm_ir.frontends.torch.counts import count_call
from cipm_ir.frontends.torch.memory import Memory
from cipm_ir.frontends.torch.parameters import Parameters
from cipm_ir.frontends.torch.table import Entry, bare_name, bind, function_entry, module_entry, written
from cipm_ir.frontends.torch.values import (
    OPAQUE,
    Lowering,
    Number,
    Tensor,
    attribute_of,
    leaves,
    onnx_dtype,
    static_shape,
)
from cipm_ir.ir.capture import Capture, Results
from cipm_ir.runtime.torch_shapes import ShapeError, is_tensor, rerun

OPSET = 23
_ABSENT = object()


class Lowerer:
    """Walks the torch graph once."""

    def __init__(self, traced: Traced, source: Any, kind: Any, args: Any, dynamic: Any) -> None:
        self.traced, self.source, self.kind, self.args, self.dynamic = traced, source, kind, args, dynamic
        self.graph = ir.Graph([], [], nodes=[], name=type(source).__name__, opset_imports={"": OPSET, OPAQUE: 1})
        self.parameters = Parameters(traced, self.graph)
        self.lowering = Lowering(self.graph, self.parameters.tensor)
        self.env: dict[fx.Node, Any] = {}
        self.results: dict[str, Results] = {}
        self.inputs: dict[str, Any] = {}
        self.placeholders: dict[str, Any] = {}
        root = traced.root
        self.modules = {} if root is None else dict(root.named_modules(remove_duplicate=False))
        self.memory = Memory(traced, self.modules)
        self.refused_writes = False

    def run(self) -> Capture:
        """Lower every node; the graph's outputs are the tensors that the program returns or writes back."""
        for node in self.traced.graph.nodes:
            self._visit(node)
        _remove_dead(self.graph)
        used = {k: v for k, v in self.parameters.names.items() if v in self.graph.initializers}
        model = ir.Model(self.graph, ir_version=11, producer_name="cipm-ir")
        traced = self.traced
        return Capture(
            self.kind, self.source, traced.graph, traced.root, traced.exported, traced.method, model, self.results,
            used, self.parameters.layouts, self.inputs, self.placeholders, self.args, self.dynamic, traced.notes,
        )  # fmt: skip

    # ------------------------------------------------------------ nodes
    def _visit(self, node: fx.Node) -> None:
        b = self.lowering
        b.name, b.count, b.made, b.constants = node.name, 0, [], []
        if node.op == "placeholder":
            self.env[node] = self._placeholder(node)
            return
        if node.op == "get_attr":
            self.env[node] = self._attribute(str(node.target))
            self.memory.mark(node, ("state", str(node.target)))
            return
        if node.op == "output":
            self._outputs(node)
            return
        b.out = self.traced.fakes.get(node)
        args = fx.node.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.env.__getitem__)
        targets = self.memory.written(node)
        try:
            if targets:
                self.memory.check(node, targets)
            made = self._lowered(node, args, kwargs)
            own = self._named(node, made)
            if targets:
                self.env[targets[0]] = made
        except UnsupportedPattern as reason:
            self._undo()
            made = self._opaque(node, args, kwargs, str(reason), getattr(reason, "attributes", {}))
            own = self._named(node, made)
            for target in targets:
                own += self._overwritten(node, target, (args, kwargs))
        self.env[node] = made
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        self.memory.share(node, made, own, targets, None if first is None else self.env[first])
        self.results[node.name] = Results(_names(made), own, bool(targets))

    def _lowered(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self._call_module(self.modules[str(node.target)], str(node.target), args, kwargs)
        if bare_name(node.target)[0] == "wrap_with_set_grad_enabled":
            return self._inlined(node.name, args[1], args[2:])
        entry = function_entry(node.target)
        if entry is None:
            raise UnsupportedPattern("no rule for this operation")
        bound = bind(entry, args, kwargs)
        return self._call(entry, bound.args, bound.kwargs)

    def _inlined(self, name: str, inner: fx.GraphModule, operands: tuple[Any, ...]) -> Any:
        """Return what a nested graph computes; all its nodes must be known."""
        b, env, given = self.lowering, dict[fx.Node, Any](), iter(operands)
        out = b.out
        for node in inner.graph.nodes:
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                b.name, b.out = name, out
                return args[0]
            elif node.op == "call_function" and not written(node.target, node.args, node.kwargs):
                b.name, b.out = f"{name}/{node.name}", node.meta.get("val")
                env[node] = self._lowered(node, args, kwargs)
            else:
                raise UnsupportedPattern(f"a nested graph with {node.op} {node.target}")
        raise UnsupportedPattern("a nested graph without a result")

    def _call_module(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = module_entry(type(module))
        if entry is None:
            raise UnsupportedPattern("no rule for this module")
        if is_changed(module):
            raise UnsupportedPattern("the module has hooks, or a forward of its own")
        if len(args) > entry.inputs:
            raise UnsupportedPattern("the module is called with more arguments than are known")
        given = dict(kwargs)
        for name in entry.attributes:
            if name in entry.fixed:
                given[name] = entry.fixed[name]
            elif name == "module":
                given[name] = module
            elif name == "path":
                given[name] = path
            elif (value := getattr(module, name, _ABSENT)) is not _ABSENT:
                given[name] = self.parameters.tensor(f"{path}.{name}") if isinstance(value, torch.Tensor) else value
        if kwargs:
            bound = bind(entry.entry, args, given)
            args, given = bound.args, bound.kwargs
        return self._call(entry.entry, args, given)

    def _call(self, entry: Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            return entry.lower(self.lowering, *args, **kwargs)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise UnsupportedPattern(f"its rule does not fit this use ({error})") from error

    def _undo(self) -> None:
        """Take back what a refused entry had added."""
        b = self.lowering
        for made in reversed(b.made):
            self.graph.remove(made, safe=True)
        for value in b.constants:
            self.graph.initializers.pop(value.name or "", None)
        b.made, b.constants = [], []
        for number in list(pytree.tree_leaves(list(self.env.values()), is_leaf=lambda x: isinstance(x, Number))):
            if isinstance(number, Number) and number.built is not None and _dead(number.built):
                number.built = None

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any, reason: str, through: Mapping[str, Any]) -> Any:
        """Return a node that takes every tensor it could read; what reaches it can move as far as ``through`` says."""
        b = self.lowering
        operands = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor | Number)]
        name = bare_name(node.target)[0]
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            name = type(module).__name__
            state = (*module.named_parameters(), *module.named_buffers())
            operands += [self.parameters.tensor(f"{node.target}.{k}") for k, _ in state]
        fakes = [x for x in pytree.tree_leaves(b.out) if is_tensor(x)]
        try:
            outputs = [b.fresh(name, x.dtype, static_shape(x)) for x in fakes]
        except UnsupportedPattern:
            outputs = [Tensor(ir.Value(name=f"{node.name}/{k}"), x.dtype, static_shape(x)) for k, x in enumerate(fakes)]
        if not outputs:
            return None
        known = bool(through) and is_tensor(b.out)
        attributes = [attribute_of(name, value) for name, value in through.items()] if known else []
        entries = _entries(b.out, operands, through) if known else None
        cost = {} if entries is None else {"entries": str(entries)}
        made = ir.Node(
            OPAQUE, name, [x.value for x in operands], attributes, outputs=[x.value for x in outputs],
            name=node.name,
            metadata_props={"reason": reason, "call": call_of(node, self.modules), **self._cost(node), **cost},
        )  # fmt: skip
        self.graph.append(made)
        b.made.append(made)
        found = iter(outputs)
        return pytree.tree_map(lambda x: next(found) if is_tensor(x) else x, b.out, is_leaf=is_tensor)

    def _cost(self, node: fx.Node) -> dict[str, str]:
        """Return what an opaque call costs, for `cipm_ir.ops.costs`."""
        try:
            run = rerun(self.traced.root, node, self.traced.fakes)
        except ShapeError as error:
            return {"uncounted": str(error)}
        macs, why = count_call(bare_name(node.target)[0], run)
        return {"uncounted": why} if macs is None else {"macs": str(macs)}

    def _named(self, node: fx.Node, made: Any) -> tuple[str, ...]:
        """Give the values that this node computes the node's name, and the shapes that torch says."""
        fresh = {id(v) for n in self.lowering.made for v in n.outputs}
        out = self.lowering.out
        tensors = [made] if isinstance(made, Tensor) else [x for x in leaves(made) if isinstance(x, Tensor)]
        fakes = [out] if is_tensor(out) else [x for x in pytree.tree_leaves(out, is_leaf=is_tensor) if is_tensor(x)]
        if fakes and len(fakes) != len(tensors):
            raise UnsupportedPattern(f"it has {len(fakes)} results where its rule makes {len(tensors)}")
        own = []
        for k, x in enumerate(tensors):
            if fakes:
                self._check(x, fakes[k])
            if id(x.value) in fresh and x.value.name not in own:
                x.value.name = self._free(node.name if len(tensors) == 1 else f"{node.name}.{k}")
                own.append(x.value.name)
        return tuple(own)

    def _free(self, name: str) -> str:
        """Return a name for a value that no parameter has."""
        while name in self.parameters.state:
            name += "_"
        return name

    def _check(self, x: Tensor, fake: torch.Tensor) -> None:
        shape = static_shape(fake)
        if x.shape == shape:
            differ = False
        elif x.shape is not None and len(x.shape) == len(shape):
            differ = any(a is not None and b is not None and a != b for a, b in zip(x.shape, shape, strict=True))
        else:
            differ = x.shape is not None
        if differ:
            raise UnsupportedPattern(f"its rule makes the shape {x.shape}, torch {shape}")
        if x.dtype != fake.dtype:
            raise UnsupportedPattern(f"its rule makes {x.dtype}, torch {fake.dtype}")
        value, x.shape = x.value, shape
        if value.const_value is None and (value.shape is None or value.shape.dims != shape):
            value.shape = ir.Shape(shape)

    def _overwritten(self, node: fx.Node, target: Any, operands: Any) -> tuple[str, ...]:
        """Return a write that cannot be expressed: the memory that shares it has unknown contents afterwards."""
        self.refused_writes = True
        if not isinstance(target, fx.Node):
            raise UnsupportedError(f"Node {node.name!r} ({node.target}) changes something in place that is not known.")
        sources = [x.value for x in leaves(operands) if isinstance(x, Tensor)]
        names = []

        def unknown(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            value = ir.Value(name=self._free(f"{node.name}/{x.value.name}"), type=x.value.type, shape=x.value.shape)
            inputs = [x.value, *(v for v in sources if v is not x.value)]
            made = ir.Node(
                OPAQUE, bare_name(node.target)[0], inputs, outputs=[value], name=value.name,
                metadata_props={
                    "reason": "it is changed in place", "call": call_of(node, self.modules), "macs": "0",
                },
            )  # fmt: skip
            self.graph.append(made)
            names.append(value.name or "")
            return Tensor(value, x.dtype, x.shape)

        for other in self.memory.sharing(target):
            if other.op.startswith("call") and not self.memory.read_after(other, node):
                continue
            self.env[other] = pytree.tree_map(unknown, self.env[other], is_leaf=lambda x: isinstance(x, Tensor))
            if self.memory.state(other) in self.parameters.values:
                self.parameters.values[self.memory.state(other)] = self.env[other]
        return tuple(names)

    # ------------------------------------------------------------ values
    def _placeholder(self, node: fx.Node) -> Any:
        self.memory.mark(node, self.memory.position[node])
        if node.name in self.traced.lifted:
            made: Any = self._attribute(self.traced.lifted[node.name])
            self.results[node.name] = Results(_names(made), ())
            return made
        fake = self.placeholders[node.name] = self.traced.fakes.get(node)
        if is_tensor(fake):
            assert fake is not None
            value = ir.Value(
                name=self._free(node.name),
                type=ir.TensorType(onnx_dtype(fake.dtype)),
                shape=_named_shape(node.name, fake),
            )
            self.graph.inputs.append(value)
            self.inputs[value.name or ""] = fake
            made = Tensor(value, fake.dtype, static_shape(fake))
        elif isinstance(fake, torch.SymInt):
            value = ir.Value(name=node.name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(()))
            self.graph.inputs.append(value)
            self.inputs[node.name] = fake
            made = Number(lambda: value, None)
        elif leaves(fake) and any(is_tensor(x) for x in leaves(fake)):
            raise UnsupportedError(f"Input {node.name!r} is a structure of tensors; use method='export'.")
        else:
            made = fake
        self.results[node.name] = Results(_names(made), (made.value.name or "",) if isinstance(made, Tensor) else ())
        return made

    def _attribute(self, path: str) -> Any:
        if path not in self.parameters.state and self.traced.exported is not None:
            return getattr(self.traced.exported.graph_module, path, None)
        found = self.parameters.state.get(path)
        return self.parameters.tensor(path) if isinstance(found, torch.Tensor) else found

    # ------------------------------------------------------------ outputs
    def _outputs(self, node: fx.Node) -> None:
        made = fx.node.map_arg(node.args, self.env.__getitem__)
        seen = set()
        for k, x in enumerate(y for y in leaves(made) if isinstance(y, Tensor | Number)):
            value = x.value
            if value.producer() is None or value in seen:
                copy = ir.Node("", "Identity", [value], num_outputs=1, name=f"output.{k}")
                self.graph.append(copy)
                out = copy.outputs[0]
                out.name, out.type, out.shape = f"output.{k}", value.type, value.shape
                value = out
            seen.add(value)
            self.graph.outputs.append(value)


def _entries(out: Any, operands: list[Any], through: Mapping[str, Any]) -> int | None:
    """Return entries that a call costs in proportion to; see `cipm_ir.ops.costs`. None where a size is dynamic."""
    sizes = [*static_shape(out), *([operands[0].dims[-1]] if "stacked" in through else [])]
    known = [n for n in sizes if n is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _remove_dead(graph: ir.Graph) -> None:
    """Drop nodes that nothing reads: they would tie what they touch. Opaque nodes stay."""
    for node in reversed(list(graph)):
        if node.domain != OPAQUE and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _named_shape(name: str, fake: Any) -> ir.Shape:
    """Dynamic sizes by name: inputs that share a size share its name."""
    dims = []
    for axis, d in enumerate(fake.shape if isinstance(fake, torch.Tensor) else fake.names):
        symbol = str(d) if str(d).isidentifier() else f"{name}_{axis}"
        dims.append(int(d) if type(d) is int else symbol)
    return ir.Shape(dims)


def _names(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.value.name
    if isinstance(value, tuple | list):
        return tuple(_names(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _names(v) for k, v in value.items()}
    return None


def _dead(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.graph is None
