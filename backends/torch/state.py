"""Copies of torch modules with the parameters of a changed IR model, under the same names."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from cipm_ir.backends.torch.tensors import torch_tensor
from cipm_ir.ir.capture import Capture

_PLAIN = (type(None), bool, int, float, str)
_PLAIN_STATE = (nn.Module.__setstate__, nn.Conv2d.__setstate__)
"""How layers are restored whose state is what they hold."""

_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


class Evaluated(ir.Tensor[Any]):
    """Numbers that were computed for the torch program alone, so that it may have their memory."""


def as_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return a torch tensor with memory that nothing else uses, as `torch_tensor` makes it; 8-bit floats, too."""
    array = np.asarray(tensor.numpy())
    if isinstance(tensor, Evaluated) and array.dtype in (np.float16, np.float32, np.float64):
        return torch.from_numpy(array)
    kind = _FLOAT8.get(array.dtype.name)
    return torch_tensor(tensor) if kind is None else torch.from_numpy(np.array(array).view(np.uint8)).view(kind)


class State:
    """The tensors of a changed model by `state_dict` name."""

    def __init__(self, capture: Capture, model: ir.Model) -> None:
        self.capture, self.model = capture, model
        self.initializers = model.graph.initializers
        self.made: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, old: torch.Tensor) -> torch.Tensor:
        """Return the new tensor of a name, on the device of the old one.

        A copy of the old one where the IR has none.
        """
        own = self.capture.parameters.get(name)
        value = None if own is None else self.initializers.get(own)
        if own is None or value is None or value.const_value is None:
            return old.detach().clone()
        if own not in self.made:
            self.made[own] = as_torch(value.const_value).to(old.device)
        layout = self.capture.layouts.get(name)
        return self.made[own] if layout is None else self.made[own].permute(layout)


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return parameters and buffers under each of their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def copied(module: nn.Module, state: State, names: Mapping[str, str] | None = None) -> nn.Module:
    """Return a deep copy of a module in which every parameter and buffer is the new one of its name.

    ``names`` maps the module's own names to those of the program where they differ.
    """
    return _copied(module, lambda name, old: state.tensor((names or {}).get(name, name), old))


def with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a deep copy of a module with other tensors by name, whatever their shape.

    Those without a name are copied.
    """
    shared: dict[int, torch.Tensor] = {}

    def new(name: str, old: torch.Tensor) -> torch.Tensor:
        found = tensors.get(name)
        if found is None:
            return old.detach().clone()
        return shared.setdefault(id(found), found.to(old.device))

    return _copied(module, new)


def _copied(module: nn.Module, new: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a deep copy: classes, hooks, modes, ``requires_grad`` and ties stay as they are.

    Gradients do not come along.
    """
    memo: dict[int, Any] = {}
    for name, old in module.named_parameters(remove_duplicate=False):
        if id(old) not in memo:
            made = nn.Parameter(new(name, old), requires_grad=old.requires_grad)
            made.__dict__.update({k: v for k, v in old.__dict__.items() if isinstance(v, bool | int | float | str)})
            memo[id(old)] = made
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if id(buffer) not in memo:
            memo[id(buffer)] = new(name, buffer)
    for owner_name, owner in module.named_modules():  # constants of traced graphs are plain attributes
        for key, held in vars(owner).items():
            if isinstance(held, torch.Tensor) and id(held) not in memo:
                memo[id(held)] = new(f"{owner_name}.{key}" if owner_name else key, held)
    for layer in module.modules():
        _copy_plain(layer, memo)
    return copy.deepcopy(module, memo)


def _copy_plain(layer: nn.Module, memo: dict[int, Any]) -> None:
    """Put the deep copy of a layer of torch.nn into a memo, made in a tenth of the time that `copy` takes."""
    kind = type(layer)
    if not kind.__module__.startswith("torch.nn.modules") or kind.__setstate__ not in _PLAIN_STATE or layer._modules:
        return
    twin = memo[id(layer)] = kind.__new__(kind)  # first: what it holds may hold it
    made = twin.__dict__
    for name, value in vars(layer).items():
        if name in ("_parameters", "_buffers"):
            made[name] = type(value)((key, None if t is None else memo[id(t)]) for key, t in value.items())
        elif type(value) in _PLAIN or (type(value) is tuple and all(type(v) in _PLAIN for v in value)):
            made[name] = value
        elif type(value) in (dict, OrderedDict, set, list) and not value:
            made[name] = type(value)()
        else:
            made[name] = copy.deepcopy(value, memo)


def holder(source: nn.Module, graph: fx.Graph, state: State) -> nn.Module:
    """Return a plain module with what a graph of ``source`` refers to, its tensors the new ones.

    ``source`` stays as it is.
    """
    root = nn.Module()
    shared: dict[int, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        owner, _, leaf = str(node.target).rpartition(".")
        found = getattr(source.get_submodule(owner), leaf)
        target = _module_at(root, owner)
        if hasattr(target, leaf):
            continue
        if isinstance(found, torch.Tensor):
            if id(found) not in shared:
                data = state.tensor(str(node.target), found)
                shared[id(found)] = nn.Parameter(data, found.requires_grad) if isinstance(found, nn.Parameter) else data
            made = shared[id(found)]
            if isinstance(made, nn.Parameter):
                target.register_parameter(leaf, made)
            else:
                target.register_buffer(leaf, made)
        else:
            setattr(target, leaf, found)
    root.training = source.training
    return root


def _module_at(root: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    return root
