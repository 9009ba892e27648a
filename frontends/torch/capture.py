"""From a torch program to a graph with the shape of every value: torch.fx tracing where it works, else torch.export."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.frontends.torch.checks import packing, way_out
from cipm_ir.frontends.torch.table import bare_name, function_entry, load_table, module_entry
from cipm_ir.runtime.torch_modes import unchanged
from cipm_ir.runtime.torch_shapes import ShapeError, propagate

METHODS = ("auto", "symbolic", "export")
_IGNORED = {"_assert", "_guards_fn", "getattr"}


@dataclass
class Traced:
    """A graph, where its tensors live, and what torch knows of every value (None where the result is no tensor)."""

    graph: fx.Graph
    root: nn.Module | None
    fakes: dict[fx.Node, Any]
    method: str
    exported: Any = None
    lifted: dict[str, str] = field(default_factory=dict)
    """Placeholder name to `state_dict` name, for the graph of an exported program."""
    notes: list[str] = field(default_factory=list)


def from_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any, method: str) -> Traced:
    """Trace a module with example inputs.

    Raises:
        InputError: the module does not run with them, `UnsupportedError` where no graph can be made.
    """
    load_table()
    with _functions_seen() as seen:
        traced = _from_module(module, args, kwargs, dynamic, method)
    for name in sorted(seen):
        traced.notes.append(f"custom autograd function {name}: a graph keeps its forward, not its backward")
    return traced


@contextlib.contextmanager
def _functions_seen() -> Iterator[set[str]]:
    """Names of the custom autograd functions that are traced through meanwhile."""
    seen: set[str] = set()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        seen.add(cls.__name__)
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _from_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any, method: str) -> Traced:
    symbolic: Traced | None = None
    reasons: list[str] = []
    packed = ""
    if method in ("auto", "symbolic"):
        try:
            hooked = any(is_changed(m) for m in module.modules())
            with unchanged(module) if hooked else contextlib.nullcontext():  # hooks may keep what they compute
                symbolic = _symbolic(module, args, kwargs, dynamic)
            missing = unknown(symbolic)
            if method == "symbolic" or not missing:
                return symbolic
            reasons.append(f"symbolic_trace leaves {', '.join(sorted(missing))} without a rule")
        except Exception as error:  # tracing runs the user's code on proxies: anything can happen
            reasons.append(f"symbolic_trace: {_first_line(error)}")
            packed = packing(error)
            if method == "symbolic":
                _check_runs(module, args, kwargs, error)
                _refuse_packed(module, packed, error)
                raise UnsupportedError(
                    f"{type(module).__name__} cannot be traced symbolically ({_first_line(error)}); "
                    "use method='export', or 'auto'."
                ) from error
    try:
        traced = _export(module, args, kwargs, dynamic)
    except Exception as error:  # as above
        if symbolic is not None:
            return symbolic
        _check_runs(module, args, kwargs, error)
        _refuse_packed(module, packed or packing(error), error)
        raise UnsupportedError(
            f"{type(module).__name__} cannot be made a graph: {'; '.join(reasons)}; "
            f"torch.export: {_first_line(error)}. {way_out(module)}"
        ) from error
    if symbolic is not None and len(unknown(traced)) >= len(unknown(symbolic)):
        return symbolic
    traced.notes.extend(reasons)
    return traced


def _refuse_packed(module: nn.Module, function: str, cause: Exception) -> None:
    """Refuse a program that failed in a function of packed sequences; nothing where it failed elsewhere."""
    if function:
        raise UnsupportedError(
            f"{type(module).__name__} uses {function}: the layout of a packed sequence depends on the values of its "
            "lengths, which a graph cannot hold; give the recurrent layer the padded tensor and mask or gather its "
            "outputs by the lengths, or give the parts of the model before and behind it."
        ) from cause


def from_graph_module(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Return a GraphModule as it is, shapes from the example inputs, or from its own metadata where there are none."""
    load_table()
    if args or kwargs:
        try:
            fakes = propagate(module, module.graph, _flat_inputs(module, args, kwargs))
        except ShapeError as error:
            _check_runs(module, args, kwargs, error)
            raise UnsupportedError(f"The shapes of the GraphModule cannot be computed: {error}") from error
        return Traced(module.graph, module, fakes, "given")
    fakes = {}
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta and "example_value" not in node.meta:
            if node.op in ("get_attr", "placeholder") and not node.users:
                continue
            raise InputError(
                f"The GraphModule has no shapes (node {node.name!r} has no meta['val']); give example_inputs=(x,)."
            )
        fakes[node] = node.meta.get("val", node.meta.get("example_value"))
    return Traced(module.graph, module, fakes, "given")


def from_exported(program: Any) -> Traced:
    """Return an ExportedProgram: its graph carries the shapes; parameters are lifted to placeholders."""
    load_table()
    signature = program.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **getattr(signature, "inputs_to_lifted_tensor_constants", {}),
    }
    fakes = {node: node.meta.get("val") for node in program.graph.nodes}
    traced = Traced(program.graph, None, fakes, "given", program, dict(lifted))
    if any(_normalizes_by_batch(node) for node in program.graph.nodes):
        traced.notes.append(
            "it was exported while it trained: batch normalization uses the batch, and gives out its running "
            "statistics, so that their channels cannot move; export it in evaluation mode (model.eval())"
        )
    return traced


def _normalizes_by_batch(node: fx.Node) -> bool:
    """Return whether a node is a batch normalization that trains."""
    if not isinstance(node.target, torch._ops.OpOverload) or "batch_norm" not in node.target._schema.name:
        return False
    names = [a.name for a in node.target._schema.arguments]
    if "training" not in names:
        return False
    place = names.index("training")
    given = node.args[place] if place < len(node.args) else node.kwargs.get("training")
    return given is True and node.args[names.index("running_mean")] is not None if "running_mean" in names else False


def unknown(traced: Traced) -> set[str]:
    """Operations without an entry."""
    found = set()
    modules = dict(traced.root.named_modules(remove_duplicate=False)) if traced.root is not None else {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and traced.root is not None:
            module = modules[node.target]
            if module_entry(type(module)) is None:
                found.add(type(module).__name__)
            elif is_changed(module):
                found.add(f"{type(module).__name__} with hooks")  # a call of it is opaque; export goes through them
        elif node.op in ("call_function", "call_method"):
            name = bare_name(node.target)[0]
            if function_entry(node.target) is None and name not in _IGNORED:
                found.add(name)
    return found


def is_changed(module: nn.Module) -> bool:
    """Return whether one module computes something else than its class: by hooks, or a forward that was put onto it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Tracer(fx.Tracer):
    """Keeps as calls the modules that the table knows, and leaves of torch.nn that it does not know.

    ``buffers``: what the program computes from its buffers stays in the graph, with their names; otherwise it is
    computed while tracing, and its results are constants without a name.
    """

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_entry(type(m)) is not None:
            return True
        own = type(m).__module__.startswith("torch.nn.modules")
        return own and not isinstance(m, nn.Sequential) and next(m.children(), None) is None

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add a call of a leaf with tensors alone, which nearly all are, in a third of the time that torch takes."""
        path = self.path_of_module(m)
        if kwargs or not all(type(a) is fx.Proxy for a in args) or not self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        node = self.graph.create_node("call_module", path)
        node.args = tuple(a.node for a in args)
        node.meta["nn_module_stack"] = {**self.module_stack, path: (path, type(m))}
        return self.proxy(node)


def _symbolic(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Traced:
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise UnsupportedError("a scripted module has no Python to trace")
    if is_changed(module):
        raise UnsupportedError("the model itself has hooks or a forward of its own, which tracing does not see")
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    concrete = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is kind.KEYWORD_ONLY:
            raise UnsupportedError("keyword-only arguments")
        if kind in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD) and value:
            raise UnsupportedError("variable arguments")
        if not isinstance(value, torch.Tensor):
            if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
                raise UnsupportedError("nested arguments")
            if kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
                concrete[name] = value
    axes = dynamic_axes(dynamic, bound.arguments)

    def traced(buffers: bool) -> Traced:
        root = copy.copy(module)  # tracing puts constants on the module that it traces
        graph = _Tracer(buffers).trace(root, concrete_args=concrete)
        holders = {n.name: str(n.target) for n in graph.nodes if n.op == "placeholder"}
        inputs = {name: bound.arguments.get(target) for name, target in holders.items()}
        moving = {name: axes.get(target, set()) for name, target in holders.items()}
        return Traced(graph, root, propagate(root, graph, inputs, moving), "symbolic")

    try:
        found = traced(buffers=True)
        if not unknown(found):
            return found
    except Exception:  # tracing runs the user's code on proxies, which a buffer now is too
        return traced(buffers=False)
    other = traced(buffers=False)
    return other if len(unknown(other)) < len(unknown(found)) else found


def dynamic_axes(dynamic: Any, arguments: Mapping[str, Any]) -> dict[str, set[int]]:
    """Return axes that `torch.export`'s ``dynamic_shapes`` calls dynamic, by argument."""
    if not dynamic:
        return {}
    if not isinstance(dynamic, Mapping):
        dynamic = dict(zip(arguments, dynamic, strict=False))
    found: dict[str, set[int]] = {}
    for name, spec in dynamic.items():
        if name not in arguments:
            raise InputError(f"dynamic_shapes names {name!r}, but the inputs are {', '.join(arguments)}.")
        entries = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
        found[name] = {int(axis) for axis, dim in entries if dim is not None and not isinstance(dim, int)}
    return found


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Traced:
    try:
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except RuntimeError as error:
        transformers = sys.modules.get("transformers")
        if "transformers.cache_utils" not in str(error) or transformers is None:
            raise
        from transformers.integrations import executorch  # its caches are structures of tensors only once it says so

        executorch.register_dynamic_cache_export_support()  # type: ignore[no-untyped-call]
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    traced = from_exported(program)
    traced.method, traced.notes = "export", []  # a module keeps its running statistics to itself
    return traced


def _flat_inputs(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Placeholder name to value."""
    flat = None
    if _is_pytree(module.graph):
        codegen: Any = module.graph._codegen
        flat = fx_pytree.tree_flatten_spec((args, kwargs), codegen.pytree_info.in_spec)
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    if flat is not None:
        return {n.name: v for n, v in zip(nodes, flat, strict=True)}
    values = dict(zip((n.name for n in nodes), args, strict=False))
    if len(args) > len(nodes):
        raise InputError(f"The GraphModule takes {len(nodes)} inputs, but {len(args)} example inputs are given.")
    # What a caller says: the code may have other names for the same arguments.
    for n, argument in zip(nodes, inspect.signature(module.forward).parameters, strict=True):
        if argument in kwargs:
            values[n.name] = kwargs[argument]
        elif n.name not in values:
            if not n.args:
                raise InputError(f"The example inputs lack {argument!r}.")
            values[n.name] = n.args[0]
    return values


def _is_pytree(graph: fx.Graph) -> bool:
    return isinstance(graph._codegen, fx.graph._PyTreeCodeGen)


def _check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cause: Exception) -> None:
    """Tell inputs that do not fit from a program that cannot be made a graph."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise InputError(
            f"{type(module).__name__} has parameters on the meta device, which hold no numbers; load its weights first."
        )
    state = {k: v.clone() for k, v in module.named_buffers()}
    try:
        with torch.no_grad():
            torch.func.functional_call(module, state, args, kwargs)
    except Exception as error:  # the user's code: anything can happen
        raise InputError(
            f"{type(module).__name__} does not run with the example inputs: {_first_line(error)}; "
            "give inputs as its forward takes them."
        ) from cause


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200].rstrip('.') if text else ''}".rstrip(": ")
