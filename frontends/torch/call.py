"""What an operation without a rule is told besides tensors, in one string: two that agree in it are the same operation.

The IR holds an opaque node with its tensors alone. Numbers, flags, a module's settings and hooks, and graphs inside it
decide what it computes too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from cipm_ir.frontends.torch.table import bare_name

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def call_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Return a hash of all that a call says besides the tensors among its arguments."""
    parts = [node.op, bare_name(node.target)[0] if node.op != "call_module" else ""]
    parts += _said((node.args, node.kwargs))
    if node.op == "call_module":
        parts += _settings(modules[str(node.target)])
    for inner in node.all_input_nodes:
        held = _held(inner)
        if isinstance(held, fx.GraphModule):
            parts += [m.code for m in held.modules() if isinstance(m, fx.GraphModule)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _held(node: fx.Node) -> Any:
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    return getattr(node.graph.owning_module, str(node.target), None)


def _settings(module: nn.Module) -> Iterator[str]:
    """Yield classes, settings and hooks of a module and of all modules below it; tensors are inputs of the node."""
    for path, one in module.named_modules():
        yield f"{path}: {type(one).__module__}.{type(one).__qualname__}"
        for name, value in sorted(vars(one).items()):
            if name not in ("_parameters", "_buffers", "_modules") and (name in _HOOKS or not name.startswith("_")):
                yield f"{name}="
                yield from _said(value)


def _said(value: Any) -> Iterator[str]:
    if isinstance(value, fx.Node | torch.nn.Parameter):
        yield "%"
    elif isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}"
        for key, held in value.items():
            yield from (*_said(key), *_said(held))
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__} {len(value)}"
        for held in value:
            yield from _said(held)
    elif isinstance(value, slice):
        yield from _said(("slice", value.start, value.stop, value.step))
    elif isinstance(value, Callable):  # type: ignore[arg-type]
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    else:
        plain = value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device)
        yield repr(value) if plain else type(value).__qualname__
