"""Parameters of a torch program as initializers of the IR: one for all names that share memory."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from cipm_ir.errors import InputError, UnsupportedError, UnsupportedPattern
from cipm_ir.frontends.torch.capture import Traced
from cipm_ir.frontends.torch.values import OPAQUE, Tensor, onnx_dtype, transposed


class Parameters:
    """Makes an initializer when a tensor of the program is first used.

    Attributes:
        state: every tensor (and what else a graph fetches) by dotted name.
        names: of the tensors used so far, the name of the initializer.
        layouts: of those that are a permuted view of an initializer, the permutation.
    """

    def __init__(self, traced: Traced, graph: ir.Graph) -> None:
        self.graph = graph
        self.state, self.constants = _state(traced)
        self.names: dict[str, str] = {}
        self.layouts: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Tensor] = {}
        self.storage: dict[Any, str] = {}
        self.overlaps: dict[int, str] = {}

    def tensor(self, path: str) -> Tensor:
        """Return the initializer of a parameter or buffer; one for all names that share its storage."""
        if path in self.values:
            return self.values[path]
        tensor = self.state[path]
        _check_readable(path, tensor)
        storage, shape = tensor.untyped_storage()._cdata, tuple(tensor.shape)
        where = (storage, tensor.storage_offset(), shape, tensor.stride(), tensor.dtype)
        name = self.storage.setdefault(where, path)
        view = self._permuted(path, tensor, storage) if name == path else None
        if name != path:
            made = self.tensor(name)
        elif view is not None:
            name, self.layouts[path] = view
            made = transposed(self.graph, self.tensor(name), self.layouts[path], path)
        else:
            proxy = tensor_adapters.TorchTensor(tensor.detach(), name=path)
            value = ir.Value(name=path, const_value=proxy, type=ir.TensorType(proxy.dtype), shape=proxy.shape)
            value.meta["tied"] = True
            self.graph.register_initializer(value)
            made = Tensor(value, tensor.dtype, shape)
            self._overlap(path, made, storage)
        self.values[path], self.names[path] = made, name
        return made

    def _permuted(self, path: str, tensor: torch.Tensor, storage: int) -> tuple[str, tuple[int, ...]] | None:
        """Return the parameter whose axes, permuted, this one is, in the same memory."""
        other = self.overlaps.get(storage)
        first = None if other is None else self.state[other]
        if first is None or first.dtype != tensor.dtype or first.storage_offset() != tensor.storage_offset():
            return None
        if len(set(first.stride())) != first.ndim or sorted(first.stride()) != sorted(tensor.stride()):
            return None
        perm = tuple(first.stride().index(s) for s in tensor.stride())
        same = tuple(first.shape[p] for p in perm) == tuple(tensor.shape)
        return (self.names[str(other)], perm) if same else None

    def _overlap(self, path: str, made: Tensor, storage: int) -> None:
        """Two parameters that share memory in another layout may not move at all."""
        other = self.overlaps.setdefault(storage, path)
        if other != path and made.shape and not {path, other} <= self.constants:
            inputs = [self.values[other].value, made.value]
            self.graph.append(
                ir.Node(
                    OPAQUE, "shared_memory", inputs, outputs=[ir.Value(name=f"{path}/shared")], name=f"{path}/shared",
                    metadata_props={"reason": "two parameters lie in the same memory in different ways", "macs": "0"},
                )
            )  # fmt: skip


def _state(traced: Traced) -> tuple[dict[str, Any], set[str]]:
    """Return every tensor by dotted name, names that share a tensor included.

    And which are constants made by tracing.
    """
    if traced.exported is not None:
        return {**traced.exported.constants, **traced.exported.state_dict}, set()
    root = traced.root
    assert root is not None
    state: dict[str, Any] = dict(root.named_parameters(remove_duplicate=False))
    state.update(root.named_buffers(remove_duplicate=False))
    constants = set()
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            constants.add(str(node.target))
            owner, _, leaf = str(node.target).rpartition(".")
            state[str(node.target)] = getattr(root.get_submodule(owner), leaf)
    return state, constants


def _check_readable(path: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise InputError(f"Parameter {path!r} is on the meta device, which holds no numbers; load its weights first.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        what = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise UnsupportedError(
            f"Parameter {path!r} is a {what} tensor; only dense ones can be read: convert it with to_dense() or "
            "dequantize()."
        )
    try:
        onnx_dtype(tensor.dtype)
    except UnsupportedPattern as error:
        raise UnsupportedError(f"Parameter {path!r}: {error}.") from error
