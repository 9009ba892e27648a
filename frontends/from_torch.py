"""The torch frontend: `nn.Module`, `torch.fx.GraphModule` and `torch.export.ExportedProgram` to the IR.

Every torch node becomes ONNX nodes by the table (`from_torch_table`), or an opaque node in the domain ``pkg.torch``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from inspect import BoundArguments
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx, nn
from torch.utils import _pytree as pytree

from cipm_ir.errors import CipmError, InputError, OptionError, UnsupportedError
from cipm_ir.frontends.from_torch_capture import METHODS, Traced, from_exported, from_graph_module, from_module
from cipm_ir.frontends.from_torch_table import (
    Entry,
    bare_name,
    bind,
    function_entry,
    module_entry,
    writes_in_place,
)
from cipm_ir.frontends.from_torch_values import Lowering, Number, Refused, Tensor, onnx_dtype, static_shape
from cipm_ir.ir.capture import Capture, Results

OPSET = 23
OPAQUE = "pkg.torch"
_ABSENT = object()


def load_torch(
    source: Any,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "auto",
) -> Capture:
    """Lower a torch program; it is never changed.

    Args:
        source: an `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example_inputs: the positional arguments, a tuple (one tensor may stand alone); only shapes and types matter.
        example_kwargs: the keyword arguments.
        dynamic_shapes: as in `torch.export.export`; sizes that it does not name are taken as fixed.
        method: for an `nn.Module`: "symbolic" (`torch.fx` tracing), "export", or "auto": the first where it works.

    Errors: `InputError` (example inputs missing or not fitting, weights without numbers), `UnsupportedError` (no graph
        can be made, sparse or quantized weights), `OptionError` (unknown method).
    """
    if method not in METHODS:
        raise OptionError(f"There is no method {method!r}; use one of {', '.join(METHODS)}.")
    args = _as_args(example_inputs)
    kwargs = dict(example_kwargs or {})
    if isinstance(source, torch.export.ExportedProgram):
        traced, kind = from_exported(source), "exported"
        args, kwargs = source.example_inputs or (args, kwargs)
    elif isinstance(source, fx.GraphModule):
        traced, kind = from_graph_module(source, args, kwargs), "graph"
    elif isinstance(source, nn.Module):
        if not args and not kwargs:
            raise InputError(
                f"{type(source).__name__} is a torch module: give example_inputs=(x,) as its forward takes them."
            )
        traced, kind = from_module(source, args, kwargs, dynamic_shapes, method), "module"
    else:
        raise UnsupportedError(f"A {type(source).__name__} is not a torch program that can be read.")
    given = (args, kwargs) if args or kwargs else None
    lowerer = _Lowerer(traced, source, kind, given, dynamic_shapes)
    capture = lowerer.run()
    if not lowerer.refused_writes or kind == "graph":
        return capture
    return _functional(traced, source, kind, given, dynamic_shapes, method) or capture


def _functional(
    traced: Traced, source: Any, kind: Any, given: Any, dynamic: Any, method: str
) -> Capture | None:
    """Read a program anew whose writes in place cannot be expressed: as an exported one without any.

    None where the caller asked for tracing, or where torch cannot do that.
    """
    if traced.exported is None:
        if method != "auto" or given is None:
            return None
        try:
            traced = from_module(source, *given, dynamic, "export")
        except CipmError:
            return None
    notes = [*traced.notes, "writes in place were made explicit (run_decompositions)"]
    functional = from_exported(traced.exported.run_decompositions({}))
    functional.method, functional.notes = traced.method, notes
    return _Lowerer(functional, source, kind, given, dynamic).run()


def _as_args(example: Any) -> tuple[Any, ...]:
    if example is None:
        return ()
    if isinstance(example, tuple | list):
        return tuple(example)
    return (example,)


class _Lowerer:
    """Walks the torch graph once."""

    def __init__(self, traced: Traced, source: Any, kind: Any, args: Any, dynamic: Any) -> None:
        self.traced, self.source, self.kind, self.args, self.dynamic = traced, source, kind, args, dynamic
        self.state = _state(traced)
        self.graph = ir.Graph([], [], nodes=[], name=type(source).__name__, opset_imports={"": OPSET, OPAQUE: 1})
        self.lowering = Lowering(self.graph, self._parameter)
        self.env: dict[fx.Node, Any] = {}
        self.results: dict[str, Results] = {}
        self.parameters: dict[str, str] = {}
        self.values: dict[str, Tensor] = {}
        self.storage: dict[Any, str] = {}
        self.overlaps: dict[int, str] = {}
        self.layouts: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, Any] = {}
        self.placeholders: dict[str, Any] = {}
        self.aliases: dict[fx.Node, Any] = {}
        self.marked: dict[Any, list[fx.Node]] = {}
        root = traced.root
        self.modules = {} if root is None else dict(root.named_modules(remove_duplicate=False))
        self.refused_writes = False
        self.position = {node: k for k, node in enumerate(traced.graph.nodes)}

    def run(self) -> Capture:
        """Lower every node; the graph's outputs are the tensors that the program returns or writes back."""
        for node in self.traced.graph.nodes:
            self._visit(node)
        _remove_dead(self.graph)
        self.parameters = {k: v for k, v in self.parameters.items() if v in self.graph.initializers}
        model = ir.Model(self.graph, ir_version=11, producer_name="cipm-ir")
        return Capture(
            self.kind, self.source, self.traced.graph, self.traced.root, self.traced.exported, self.traced.method,
            model, self.results, self.parameters, self.layouts, self.inputs, self.placeholders, self.args, self.dynamic, self.traced.notes,
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
            return
        if node.op == "output":
            self._outputs(node)
            return
        b.out = self.traced.fakes.get(node)
        args = fx.node.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.env.__getitem__)
        writes = self._writes(node)
        try:
            if writes:
                self._check_writes(node, args)
            made = self._lowered(node, args, kwargs)
            own = self._named(node, made)
            if writes and isinstance(node.args[0], fx.Node):
                self.env[node.args[0]] = made
        except Refused as reason:
            self._undo()
            made = self._opaque(node, args, kwargs, str(reason))
            own = self._named(node, made)
            if writes:
                own += self._overwritten(node, (args, kwargs))
        self.env[node] = made
        self._alias(node, made, own, writes)
        self.results[node.name] = Results(_names(made), own, writes)

    def _lowered(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self._call_module(self.modules[str(node.target)], str(node.target), args, kwargs)
        if bare_name(node.target)[0] == "wrap_with_set_grad_enabled":
            return self._inlined(node.name, args[1], args[2:])
        entry = function_entry(node.target)
        if entry is None:
            raise Refused("no rule for this operation")
        return self._call(entry, bind(entry, args, kwargs))

    def _inlined(self, name: str, inner: fx.GraphModule, operands: tuple[Any, ...]) -> Any:
        """What a nested graph computes; all its nodes must be known."""
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
            elif node.op == "call_function" and not writes_in_place(node.target, dict(node.kwargs)):
                b.name, b.out = f"{name}/{node.name}", node.meta.get("val")
                env[node] = self._lowered(node, args, kwargs)
            else:
                raise Refused(f"a nested graph with {node.op} {node.target}")
        raise Refused("a nested graph without a result")

    def _call_module(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = module_entry(type(module))
        if entry is None:
            raise Refused("no rule for this module")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused("the module has hooks")
        if len(args) > entry.inputs:
            raise Refused("the module is called with more arguments than are known")
        names = list(entry.entry.signature.parameters)
        given = dict(kwargs)
        for name in names[entry.inputs :]:
            if name in entry.fixed:
                given[name] = entry.fixed[name]
            elif name == "module":
                given[name] = module
            elif name == "path":
                given[name] = path
            elif (value := getattr(module, name, _ABSENT)) is not _ABSENT:
                given[name] = self._parameter(f"{path}.{name}") if isinstance(value, torch.Tensor) else value
        return self._call(entry.entry, bind(entry.entry, args, given))

    def _call(self, entry: Entry, bound: BoundArguments) -> Any:
        try:
            return entry.lower(self.lowering, *bound.args, **bound.kwargs)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise Refused(f"its rule does not fit this use ({error})") from error

    def _undo(self) -> None:
        """Take back what a refused entry had added."""
        b = self.lowering
        for made in reversed(b.made):
            self.graph.remove(made, safe=True)
        for value in b.constants:
            if value.name in self.graph.initializers:
                del self.graph.initializers[value.name]
        b.made, b.constants = [], []
        for number in list(pytree.tree_leaves(list(self.env.values()), is_leaf=lambda x: isinstance(x, Number))):
            if isinstance(number, Number) and number.built is not None and _dead(number.built):
                number.built = None

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any, reason: str) -> Any:
        """A node that takes every tensor it could read; nothing that reaches it can move."""
        b = self.lowering
        operands = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor | Number)]
        name = bare_name(node.target)[0]
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            name = type(module).__name__
            state = (*module.named_parameters(), *module.named_buffers())
            operands += [self._parameter(f"{node.target}.{k}") for k, _ in state]
        fakes = [x for x in pytree.tree_leaves(b.out) if _is_tensor(x)]
        try:
            outputs = [b.fresh(name, x.dtype, static_shape(x)) for x in fakes]
        except Refused:
            outputs = [Tensor(ir.Value(name=f"{node.name}/{k}"), x.dtype, static_shape(x)) for k, x in enumerate(fakes)]
        if not outputs:
            return None
        made = ir.Node(
            OPAQUE, name, [x.value for x in operands], outputs=[x.value for x in outputs],
            name=node.name, metadata_props={"reason": reason},
        )  # fmt: skip
        self.graph.append(made)
        b.made.append(made)
        found = iter(outputs)
        return pytree.tree_map(lambda x: next(found) if _is_tensor(x) else x, b.out, is_leaf=_is_tensor)

    def _named(self, node: fx.Node, made: Any) -> tuple[str, ...]:
        """Give the values that this node computes the node's name, and the shapes that torch says."""
        fresh = {id(v) for n in self.lowering.made for v in n.outputs}
        tensors = [x for x in _leaves(made) if isinstance(x, Tensor)]
        fakes = [x for x in pytree.tree_leaves(self.lowering.out, is_leaf=_is_tensor) if _is_tensor(x)]
        if fakes and len(fakes) != len(tensors):
            raise Refused(f"it has {len(fakes)} results where its rule makes {len(tensors)}")
        own = []
        for k, x in enumerate(tensors):
            if fakes:
                self._check(x, fakes[k])
            if id(x.value) in fresh and x.value.name not in own:
                x.value.name = self._free(node.name if len(tensors) == 1 else f"{node.name}.{k}")
                own.append(x.value.name)
        return tuple(own)

    def _free(self, name: str) -> str:
        """A name for a value that no parameter has."""
        while name in self.state:
            name += "_"
        return name

    def _check(self, x: Tensor, fake: torch.Tensor) -> None:
        shape = static_shape(fake)
        if x.shape is not None and len(x.shape) == len(shape):
            differ = any(a is not None and b is not None and a != b for a, b in zip(x.shape, shape, strict=True))
        else:
            differ = x.shape is not None
        if differ:
            raise Refused(f"its rule makes the shape {x.shape}, torch {shape}")
        if x.dtype != fake.dtype:
            raise Refused(f"its rule makes {x.dtype}, torch {fake.dtype}")
        x.shape = shape
        if x.value.const_value is None and (x.value.shape is None or x.value.shape != shape):
            x.value.shape = ir.Shape(shape)

    # ------------------------------------------------------------ in place
    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self.modules[str(node.target)], "inplace", False) is True
        return node.op in ("call_function", "call_method") and writes_in_place(node.target, dict(node.kwargs))

    def _check_writes(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """A write is expressed by a new value for the first argument: only where nobody reads it through a view."""
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or target.op == "get_attr" or target.name in self.traced.lifted:
            raise Refused("it changes a parameter or buffer in place")
        group, here = self.aliases.get(target), self.position[node]
        for other in self.marked.get(group, ()):
            if other is not target and any(self.position[u] > here for u in other.users):
                raise Refused(f"it changes memory in place that {other.name!r} shares")

    def _entry(self, node: fx.Node) -> Entry | None:
        if node.op != "call_module" or self.traced.root is None:
            return function_entry(node.target) if node.op.startswith("call") else None
        found = module_entry(type(self.modules[str(node.target)]))
        return None if found is None else found.entry

    def _overwritten(self, node: fx.Node, operands: Any) -> tuple[str, ...]:
        """A write that cannot be expressed: nobody knows what holds afterwards in all that shares the memory."""
        self.refused_writes = True
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node):
            raise UnsupportedError(f"Node {node.name!r} ({node.target}) changes something in place that is not known.")
        group = self.aliases.get(target)
        sharing = [target, *(n for n in self.marked.get(group, ()) if n is not target)]
        sources = [x.value for x in _leaves(operands) if isinstance(x, Tensor)]
        names = []

        def unknown(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            value = ir.Value(name=self._free(f"{node.name}/{x.value.name}"), type=x.value.type, shape=x.value.shape)
            inputs = [x.value, *(v for v in sources if v is not x.value)]
            made = ir.Node(
                OPAQUE, bare_name(node.target)[0], inputs, outputs=[value], name=value.name,
                metadata_props={"reason": "it is changed in place"},
            )  # fmt: skip
            self.graph.append(made)
            names.append(value.name or "")
            return Tensor(value, x.dtype, x.shape)

        for other in sharing:
            self.env[other] = pytree.tree_map(unknown, self.env[other], is_leaf=lambda x: isinstance(x, Tensor))
        path = self.traced.lifted.get(target.name, str(target.target) if target.op == "get_attr" else "")
        if path in self.values:
            self.values[path] = self.env[target]
        return tuple(names)

    def _alias(self, node: fx.Node, made: Any, own: tuple[str, ...], writes: bool) -> None:
        """Nodes that may share memory have one mark."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        entry = self._entry(node)
        handed = isinstance(made, Tensor) and made.value.name not in own
        if source is not None and node.target is operator.getitem and isinstance(self.env[source], tuple | list):
            whole = self._entry(source)
            if whole is not None and not whole.view:  # results of their own
                self._mark(node, (self.aliases[source], node.args[1]))
                return
        if source is not None and source in self.aliases and (writes or handed or entry is None or entry.view):
            self._mark(node, self.aliases[source])
        else:
            self._mark(node, self.position[node])

    def _mark(self, node: fx.Node, mark: Any) -> None:
        self.aliases[node] = mark
        self.marked.setdefault(mark, []).append(node)

    # ------------------------------------------------------------ values
    def _placeholder(self, node: fx.Node) -> Any:
        self._mark(node, self.position[node])
        if node.name in self.traced.lifted:
            made: Any = self._attribute(self.traced.lifted[node.name])
            self.results[node.name] = Results(_names(made), ())
            return made
        fake = self.placeholders[node.name] = self.traced.fakes.get(node)
        if _is_tensor(fake):
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
        elif _leaves(fake) and any(_is_tensor(x) for x in _leaves(fake)):
            raise UnsupportedError(f"Input {node.name!r} is a structure of tensors; use method='export'.")
        else:
            made = fake
        self.results[node.name] = Results(_names(made), (made.value.name,) if isinstance(made, Tensor) else ())
        return made

    def _attribute(self, path: str) -> Any:
        if path not in self.state and self.traced.exported is not None:
            return getattr(self.traced.exported.graph_module, path, None)
        found = self.state.get(path)
        return self._parameter(path) if isinstance(found, torch.Tensor) else found

    def _parameter(self, path: str) -> Tensor:
        """The initializer of a parameter or buffer; one for all names that share its storage."""
        if path in self.values:
            return self.values[path]
        tensor = self.state[path]
        _check_readable(path, tensor)
        where = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        name = self.storage.setdefault(where, path)
        view = self._permuted(path, tensor) if name == path else None
        if name != path:
            made = self._parameter(name)
        elif view is not None:
            name, self.layouts[path] = view
            made = self.lowering.transpose(self._parameter(name), self.layouts[path])
        else:
            proxy = tensor_adapters.TorchTensor(tensor.detach(), name=path)
            value = ir.Value(
                name=path, const_value=proxy, type=ir.TensorType(proxy.dtype), shape=ir.Shape(tuple(tensor.shape))
            )
            value.meta["tied"] = True
            self.graph.register_initializer(value)
            made = Tensor(value, tensor.dtype, tuple(tensor.shape))
            self._overlap(path, made, where[0])
        self.values[path], self.parameters[path] = made, name
        return made

    def _permuted(self, path: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]] | None:
        """The parameter whose axes, permuted, this one is, in the same memory."""
        other = self.overlaps.get(tensor.untyped_storage()._cdata)
        first = None if other is None else self.state[other]
        if first is None or first.dtype != tensor.dtype or first.storage_offset() != tensor.storage_offset():
            return None
        if len(set(first.stride())) != first.ndim or sorted(first.stride()) != sorted(tensor.stride()):
            return None
        perm = tuple(first.stride().index(s) for s in tensor.stride())
        same = tuple(first.shape[p] for p in perm) == tuple(tensor.shape)
        return (self.parameters[str(other)], perm) if same else None

    def _overlap(self, path: str, made: Tensor, storage: int) -> None:
        """Two parameters that share memory in another layout may not move at all."""
        other = self.overlaps.setdefault(storage, path)
        if other != path and made.shape:
            inputs = [self.values[other].value, made.value]
            self.graph.append(
                ir.Node(
                    OPAQUE, "shared_memory", inputs, outputs=[ir.Value(name=f"{path}/shared")], name=f"{path}/shared",
                    metadata_props={"reason": "two parameters lie in the same memory in different ways"},
                )
            )  # fmt: skip

    # ------------------------------------------------------------ outputs
    def _outputs(self, node: fx.Node) -> None:
        made = fx.node.map_arg(node.args, self.env.__getitem__)
        seen = set()
        for k, x in enumerate(y for y in _leaves(made) if isinstance(y, Tensor | Number)):
            value = x.value
            if value.producer() is None or value in seen:
                copy = ir.Node("", "Identity", [value], num_outputs=1, name=f"output.{k}")
                self.graph.append(copy)
                out = copy.outputs[0]
                out.name, out.type, out.shape = f"output.{k}", value.type, value.shape
                value = out
            seen.add(value)
            self.graph.outputs.append(value)


def _state(traced: Traced) -> dict[str, Any]:
    """Every tensor by dotted name; names that share a tensor included."""
    if traced.exported is not None:
        return {**traced.exported.constants, **traced.exported.state_dict}
    root = traced.root
    assert root is not None
    state: dict[str, Any] = dict(root.named_parameters(remove_duplicate=False))
    state.update(root.named_buffers(remove_duplicate=False))
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            owner, _, leaf = str(node.target).rpartition(".")
            state[str(node.target)] = getattr(root.get_submodule(owner), leaf)
    return state


def _remove_dead(graph: ir.Graph) -> None:
    """Drop nodes that nothing reads: they would tie what they touch. Opaque nodes stay."""
    for node in reversed(list(graph)):
        if node.domain != OPAQUE and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _check_readable(path: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise InputError(f"Parameter {path!r} is on the meta device, which holds no numbers; load its weights first.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        what = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise UnsupportedError(
            f"Parameter {path!r} is a {what} tensor; only dense ones can be read: convert it (to_dense(), dequantize())."
        )
    try:
        onnx_dtype(tensor.dtype)
    except Refused as error:
        raise UnsupportedError(f"Parameter {path!r}: {error}.") from error


def _named_shape(name: str, fake: Any) -> ir.Shape:
    """Dynamic sizes by name: inputs that share a size share its name."""
    dims = []
    for axis, d in enumerate(fake.shape if isinstance(fake, torch.Tensor) else fake.names):
        symbol = str(d) if str(d).isidentifier() else f"{name}_{axis}"
        dims.append(int(d) if type(d) is int else symbol)
    return ir.Shape(dims)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor) or type(x).__name__ == "Symbolic"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    if isinstance(value, tuple | list):
        return [leaf for v in value for leaf in _leaves(v)]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return [value]


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
