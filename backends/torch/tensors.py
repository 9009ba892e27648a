"""Tensors and element types from ONNX to torch, without sharing memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from cipm_ir.errors import UnsupportedError

__all__ = ["torch_dtype", "torch_tensor"]

_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}
_WIDENED = {ir.DataType.INT4: np.int8, ir.DataType.UINT4: np.uint8}
"""4-bit integers, which torch lacks, in the smallest type that holds them."""


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """Return the torch type with the same values; UnsupportedError where there is none."""
    if dtype not in _TYPES:
        raise UnsupportedError(f"Element type {dtype.name} has no exact counterpart in torch; cast it in the model.")
    return _TYPES[dtype]


def torch_tensor(held: ir.TensorProtocol) -> torch.Tensor:
    """Return a copy as a torch tensor; bfloat16 goes bit by bit, as numpy has no such type of its own."""
    array = np.asarray(held.numpy())
    if held.dtype in _WIDENED:
        return torch.from_numpy(array.astype(_WIDENED[held.dtype]))
    dtype = torch_dtype(held.dtype)
    if dtype is torch.bfloat16:
        bits = np.array(array, order="C").view(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16)
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native, order="C"))
