"""Shapes and types of every value of a traced graph, without running it: torch's own rules on the meta device.

What a leaf module or function makes of given shapes is remembered, as networks repeat themselves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

_BATCH_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_ENTRYWISE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Dropout, nn.Identity)
_JOINS = (torch.cat, torch.ops.aten.cat.default)


class ShapeError(Exception):
    """A node cannot be computed on shapes alone; ``node`` is its name."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message)
        self.node = node


def propagate(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Mapping[str, Any],
    dynamic: Mapping[str, set[int]] | None = None,
    *,
    instead: Callable[[fx.Node, Any], Any] | None = None,
) -> dict[fx.Node, Any]:
    """Return what each node computes, tensors without numbers; dynamic sizes become symbolic.

    Args:
        root: holder of submodules and parameters.
        graph: nodes in order.
        inputs: an example by placeholder name.
        dynamic: axes by placeholder name whose size may change.
        instead: gets each node and what it computes (None where it cannot be computed), and says with what to go on, so
            that one run finds every node that does not fit; None where it cannot say either.

    Raises:
        ShapeError: the message names the node.
    """
    first = _Run(root, inputs, instead).run(graph)
    if not dynamic or not any(dynamic.values()):
        return first
    other = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            sizes = [s + (s if axis in dynamic.get(name, ()) else 0) for axis, s in enumerate(value.shape)]
            value = torch.empty(sizes, dtype=value.dtype, device="meta")
        other[name] = value
    second = _Run(root, other).run(graph)
    return {node: _merged(value, second[node]) for node, value in first.items()}


def rerun(root: nn.Module | None, node: fx.Node, known: Mapping[fx.Node, Any]) -> Callable[[], Any]:
    """Return a function that computes one node again, on tensors without numbers, from what is known of those before
    it.

    Raises: `ShapeError` where a size before it is dynamic; the function whatever torch raises.
    """
    run = _Run(nn.Module() if root is None else root, {})
    for before in node.all_input_nodes:
        value = known.get(before)
        if isinstance(value, Symbolic) or any(isinstance(s, torch.SymInt) for s in getattr(value, "shape", ())):
            raise ShapeError(f"a size of {before.name!r} is dynamic", node.name)
        run.values[before] = run._every(on_meta, value)
    return lambda: run._visit(node)


class Symbolic:
    """Stands for a tensor some sizes of which are dynamic (None)."""

    def __init__(self, fake: torch.Tensor, shape: tuple[int | None, ...]) -> None:
        self.shape, self.dtype, self.device = shape, fake.dtype, fake.device
        self.names = [d if d is not None else f"size_{example}" for d, example in zip(shape, fake.shape, strict=True)]


def is_tensor(x: Any) -> bool:
    """Return whether torch's description of a value says a tensor."""
    return isinstance(x, torch.Tensor | Symbolic)


def _merged(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor):
        if a.shape == b.shape:
            return a
        return Symbolic(a, tuple(x if x == y else None for x, y in zip(a.shape, b.shape, strict=True)))
    if isinstance(a, tuple | list):
        return type(a)(_merged(x, y) for x, y in zip(a, b, strict=True)) if type(a) in (tuple, list) else (
            tuple(_merged(x, y) for x, y in zip(a, b, strict=True)))  # fmt: skip
    if isinstance(a, Mapping):
        return {k: _merged(v, b[k]) for k, v in a.items()}
    return a if a is b or a == b else None


def on_meta(value: Any) -> Any:
    """Return a tensor without numbers; anything else as it is."""
    if isinstance(value, torch.Tensor) and not value.is_meta:
        if value.layout != torch.strided:
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return value


class _Run:
    def __init__(
        self, root: nn.Module, inputs: Mapping[str, Any], instead: Callable[[fx.Node, Any], Any] | None = None
    ) -> None:
        self.root, self.inputs, self.instead = root, inputs, instead
        self.values: dict[fx.Node, Any] = {}
        self.remembered: dict[Any, Any] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.modules = dict(root.named_modules(remove_duplicate=False))

    def run(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        with torch.no_grad():
            for node in graph.nodes:
                try:
                    made = self._visit(node)
                except Exception as error:  # any operation of torch, on shapes that may not fit
                    self.values[node] = None if self.instead is None else self.instead(node, None)
                    if self.values[node] is not None:
                        continue
                    text = str(error).strip().splitlines()
                    raise ShapeError(
                        f"node {node.name!r} ({node.op} {node.target}): {text[0] if text else type(error).__name__}",
                        node.name,
                    ) from error
                self.values[node] = made if self.instead is None or made is None else self.instead(node, made)
        return self.values

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._every(on_meta, self.inputs[node.name])
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.root)
            return self._tensor(value) if isinstance(value, torch.Tensor) else value
        if getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled":
            return self._nested(node)
        if node.op == "call_module" and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args):
            return self._called_module(node, tuple(self.values[a] for a in node.args))  # type: ignore[index]
        args = _off_device(fx.node.map_arg(node.args, self.values.__getitem__))
        kwargs = _off_device(fx.node.map_arg(node.kwargs, self.values.__getitem__))
        if node.op == "output":
            return args[0]
        if _writes(node):  # what others remember keeps its shape
            args, kwargs = self._every(torch.Tensor.detach, args), self._every(torch.Tensor.detach, kwargs)
            made = self._every(on_meta, self._called(node, args, kwargs))
            self.values[node.args[0]] = made  # type: ignore[index]
            return made
        return self._remembered(node, args, kwargs)

    def _called_module(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        made = _same_shape(self.modules[str(node.target)], args)
        return self._remembered(node, args, {}) if made is None else made

    def _remembered(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        key = self._key(node, args, kwargs)
        if key is not None and key in self.remembered:
            return self.remembered[key]
        made = self._every(on_meta, self._called(node, args, kwargs))
        if key is not None:
            self.remembered[key] = made
        return made

    def _called(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            made = _joined(args, kwargs) if node.target in _JOINS else None
            return node.target(*args, **kwargs) if made is None else made  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self._module(self.modules[str(node.target)], args, kwargs)

    def _nested(self, node: fx.Node) -> Any:
        """Return what a graph in a graph computes: it may name devices too."""
        (_, inner, *operands), root = node.args, self.root
        if isinstance(inner, fx.Node):
            inner = operator.attrgetter(str(inner.target))(root)
        assert isinstance(inner, fx.GraphModule)
        names = [n.name for n in inner.graph.nodes if n.op == "placeholder"]
        given = [self.values[x] if isinstance(x, fx.Node) else x for x in operands]
        run = _Run(inner, dict(zip(names, given, strict=True)))
        run.run(inner.graph)
        return run.values[next(n for n in inner.graph.nodes if n.op == "output")]

    def _module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if _is_plain(module):  # a twin that holds tensors without numbers: several times faster than the general way
            twin = object.__new__(type(module))
            twin.__dict__ = dict(module.__dict__)
            for held in ("_parameters", "_buffers"):
                twin.__dict__[held] = {
                    name: None if t is None else self._tensor(t) for name, t in module.__dict__[held].items()
                }
            return twin(*args, **kwargs)
        groups = (module.named_parameters(), module.named_buffers())
        state = {name: self._tensor(t) for group in groups for name, t in group}
        return torch.func.functional_call(module, state, args, kwargs)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        found = self.tensors.get(id(tensor))
        if found is None:
            found = self.tensors[id(tensor)] = on_meta(tensor)
        return found

    def _key(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return what the result depends on; None where that is not known to be all."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if not type(module).__module__.startswith("torch.nn.modules") or kwargs:
                return None
            own = tuple(tuple(p.shape) for p in module.parameters())
            return (type(module), module.extra_repr(), own, module.training, _frozen(args))
        return (node.op, node.target, _frozen(args), _frozen(kwargs)) if node.op == "call_function" else None

    def _every(self, function: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return function(value)
        if type(value) in (tuple, list):
            return type(value)(self._every(function, v) for v in value)
        if type(value) is dict:
            return {k: self._every(function, v) for k, v in value.items()}
        return value


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module reads no tensors but its parameters and buffers.

    Recurrent ones keep a list of their own.
    """
    own = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.RNNBase)
    return own and not (module._modules or module._forward_hooks or module._forward_pre_hooks)


def _same_shape(module: nn.Module, args: tuple[Any, ...]) -> torch.Tensor | None:
    """Result of a module that keeps shape, type and order in memory; None: torch has to say.

    Batch normalization, which torch computes by a dozen operations even here, and what works entry by entry.
    """
    kind, x = type(module), args[0] if len(args) == 1 else None
    if not isinstance(x, torch.Tensor) or not x.is_contiguous() or not x.is_floating_point() or not _is_plain(module):
        return None
    if kind in _ENTRYWISE:
        return x
    if x.dim() not in _BATCH_NORMS.get(kind, ()):
        return None
    channels = x.shape[1]
    fits = all(
        t is None or (t.dtype == x.dtype and tuple(t.shape) == (channels,))
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if name != "num_batches_tracked"
    )
    several = not module.training or x.numel() > channels  # torch refuses to normalize one value
    return x if fits and several else None


def _joined(args: Any, kwargs: Any) -> torch.Tensor | None:
    """Result of `torch.cat` in the common case, again far faster than torch says it; None: torch has to say."""
    parts, axis = (args[0] if args else None), (args[1] if len(args) == 2 else 0)
    if kwargs or not isinstance(parts, tuple | list) or not parts or type(axis) is not int:
        return None
    first = parts[0]
    if not all(isinstance(x, torch.Tensor) and x.is_contiguous() and x.dtype == first.dtype for x in parts):
        return None
    if not 0 <= axis < first.dim() or any(x.dim() != first.dim() for x in parts):
        return None
    shapes = [tuple(x.shape) for x in parts]
    rest = {(*s[:axis], *s[axis + 1 :]) for s in shapes}
    if len(rest) > 1 or not math.prod(*rest):
        return None
    sizes = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
    return torch.empty(sizes, dtype=first.dtype, device="meta")


def _writes(node: fx.Node) -> bool:
    """Return whether a function or method is of the kind that changes its first argument (``transpose_``)."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = "" if getattr(node.target, "__module__", "") == "_operator" else name.partition(".")[0]  # operator.and_
    return name.endswith("_") and not name.endswith("__")


def _off_device(value: Any) -> Any:
    """Arguments in which every device is the meta device."""
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, tuple | list):
        return [_off_device(v) for v in value] if isinstance(value, list) else tuple(_off_device(v) for v in value)
    if isinstance(value, Mapping):
        meta = torch.device("meta")
        return {k: meta if k == "device" and v is not None else _off_device(v) for k, v in value.items()}
    return value


def _frozen(value: Any) -> Any:
    """Hashable twin of arguments: tensors by shape, strides and type."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.stride())
    if isinstance(value, tuple | list):
        return (type(value), *(_frozen(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    plain = value is None or isinstance(value, int | float | str | bool | torch.dtype | torch.device)
    return (type(value), value) if plain else object()  # equal to nothing: not remembered
