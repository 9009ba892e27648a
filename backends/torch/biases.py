"""Biases of layers that came without: a pass that moves constants on (`remove-dead`, `absorb-bias`) gives them one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from cipm_ir.backends.torch.state import as_torch
from cipm_ir.ir.capture import Capture


def new_biases(capture: Capture, model: ir.Model) -> dict[str, ir.Value]:
    """Return the initializers that were added as the bias of one weight, by path of the layer that has the weight."""
    layers: dict[str, list[str]] = {}
    for name, own in capture.parameters.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            layers.setdefault(own, []).append(path)
    found: dict[str, ir.Value] = {}
    for name, value in model.graph.initializers.items():
        if name in capture.model.graph.initializers or value.shape is None or value.shape.rank() != 1:
            continue
        weights = {_weight(use) for use in value.uses()}
        for path in layers.get(weights.pop() or "", ()) if len(weights) == 1 else ():
            found[path] = value
    return found


def _weight(use: Any) -> str | None:
    """Return the name of the weight of the product that a value is the bias of."""
    node = use.node
    if node.op_type in ("Conv", "ConvTranspose", "Gemm") and use.idx == 2:
        return _parameter(node.inputs[1])
    product = node.inputs[1 - use.idx] if node.op_type == "Add" else None
    made = None if product is None else product.producer()
    return _parameter(made.inputs[1]) if made is not None and made.op_type == "MatMul" else None


def _parameter(value: ir.Value | None) -> str | None:
    """Return the name of an initializer, which may be transposed on its way."""
    made = None if value is None else value.producer()
    value = made.inputs[0] if made is not None and made.op_type == "Transpose" else value
    return value.name if value is not None and value.is_initializer() else None


def give_biases(module: nn.Module, biases: Mapping[str, ir.Value]) -> None:
    """Set biases of layers below ``module`` that have none, in place; whether they are used is for a proof to say."""
    for path, value in biases.items():
        if value.const_value is not None:
            set_biases(module, [(f"{path}.bias" if path else "bias", as_torch(value.const_value))])


def set_biases(module: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Register tensors as parameters where a layer says that it has none, on the device of its weight."""
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        layer = module.get_submodule(path)
        weight = layer._parameters.get("weight")
        if weight is not None and leaf in layer._parameters and layer._parameters[leaf] is None:
            layer.register_parameter(leaf, nn.Parameter(tensor.to(weight.device), weight.requires_grad))


def added(module: nn.Module, original: nn.Module) -> Iterator[str]:
    """Yield the names of parameters that a copy of a module has and the original has not."""
    before = dict(original.named_parameters(remove_duplicate=False))
    yield from (name for name, _ in module.named_parameters(remove_duplicate=False) if name not in before)
