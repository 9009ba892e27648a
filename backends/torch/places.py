"""Where tensors live below a module: dotted paths, registered without taking what is there."""

from __future__ import annotations

import keyword
import re
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from cipm_ir.backends.torch.tensors import torch_tensor

__all__ = ["attribute_at", "free_path", "identifier", "register"]

_RESERVED = {*dir(fx.GraphModule), "meta"} - set(dir(nn.Module))
"""What a GraphModule has, while the plain module that it is made from has not."""
_PART = re.compile(r"[A-Za-z_]\w*|\d+", re.ASCII)


def identifier(name: str) -> str:
    """Return the name as a Python identifier."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    plain = f"v_{plain}" if plain[0].isdigit() else plain
    return f"{plain}_" if keyword.iskeyword(plain) else plain


def attribute_at(root: nn.Module, path: str) -> torch.Tensor | None:
    """Return the tensor at a dotted path below a module, or None."""
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None


def register(root: nn.Module, name: str, held: ir.TensorProtocol, trainable: bool) -> str:
    """Put a copy of the tensor below the root, as parameter or buffer; returns its path.

    The path is the name where that is one and is free, else a name like it; submodules are made on the way.
    """
    legal = all(_PART.fullmatch(part) and not keyword.iskeyword(part) for part in name.split("."))
    path = free_path(root, name if legal else identifier(name))
    *folders, leaf = path.split(".")
    module = root
    for folder in folders:
        if folder not in module._modules:
            module.add_module(folder, nn.Module())
        module = module.get_submodule(folder)
    if trainable:
        module.register_parameter(leaf, nn.Parameter(torch_tensor(held)))
    else:
        module.register_buffer(leaf, torch_tensor(held))
    return path


def free_path(root: nn.Module, path: str) -> str:
    """Return the path, or the path with a number, where nothing is registered yet."""
    candidate, k = path, 0
    while not _is_free(root, candidate):
        k += 1  # a folder of the path may be taken by something else: the whole name in one part always ends
        candidate = f"{identifier(path)}_{k}"
    return candidate


def _is_free(root: nn.Module, path: str) -> bool:
    *folders, leaf = path.split(".")
    module = root
    if path.split(".")[0] in _RESERVED:
        return False
    for folder in folders:
        if folder not in module._modules:
            return not hasattr(module, folder)
        module = module.get_submodule(folder)
    return not hasattr(module, leaf)
