"""Nodes that scale and shift their input by constants, and which constants do so channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.passes.exact.affine.batch_norm import no_fixed_map, scale_and_shift
from cipm_ir.passes.exact.affine.products import Array, constant, double

_LIMIT = 1 << 20
"""Constants with more entries are weights of their own, not scales."""


@dataclass(frozen=True)
class Map:
    """``factor * source + shift``, in double precision; None: 1 and 0.

    Attributes:
        source: what is scaled and shifted.
        factor, shift: constants that broadcast as the node's own; of a normalization, one entry for each channel.
        norm: a normalization.
    """

    source: ir.Value
    factor: Array | None = None
    shift: Array | None = None
    norm: bool = False

    @property
    def parts(self) -> tuple[Array | None, Array | None]:
        """Factor and shift."""
        return self.factor, self.shift


def affine_map(node: ir.Node, version: int) -> Map | None:
    """Return the constant scale and shift that a node is; None where it is none."""
    if node.domain or any(a.is_ref() for a in node.attributes.values()):
        return None
    if node.op_type == "BatchNormalization":
        return _norm(node, version)
    if node.op_type == "Neg":
        return None if node.inputs[0] is None else Map(node.inputs[0], factor=np.array(-1.0))
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    left, right = node.inputs
    held = [_floats(left), _floats(right)]
    if left is None or right is None or sum(array is not None for array in held) != 1:
        return None
    if held[1] is not None:
        return _by_right(node.op_type, left, held[1])
    array = held[0]
    assert array is not None
    if node.op_type == "Sub":
        return Map(right, factor=np.array(-1.0), shift=array)
    return None if node.op_type == "Div" else _by_right(node.op_type, right, array)


def _by_right(op: str, source: ir.Value, array: Array) -> Map | None:
    if op in ("Add", "Sub"):
        return Map(source, shift=array if op == "Add" else -array)
    if op == "Div" and not array.all():
        return None
    return Map(source, factor=array if op == "Mul" else 1 / array)


def _norm(node: ir.Node, version: int) -> Map | None:
    if node.inputs[0] is None or no_fixed_map(node, version):
        return None
    if any(_floats(value) is None for value in node.inputs[1:]):
        return None
    factor, shift = scale_and_shift(node)
    return Map(node.inputs[0], factor, shift, norm=True) if np.isfinite([factor, shift]).all() else None


def _floats(value: ir.Value | None) -> Array | None:
    """Return the entries of a constant of a floating-point type, all finite, in double precision."""
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.size > _LIMIT:
        return None
    array = double(value)
    return array if np.isfinite(array).all() else None


def by_channel(part: Array | None, size: int, rank: int | None, axis: int, *, norm: bool) -> Array | None:
    """Return a factor or shift as one entry for each channel; None where it is something else.

    Args:
        part: as in `Map`.
        size: the number of channels.
        rank: of the value that is scaled; None: not known.
        axis: of its channels, 1 or -1.
        norm: the entries are those of axis 1.

    Returns:
        Shape (size,).
    """
    if part is None:
        return None
    if norm:
        return part if part.shape == (size,) and (axis == 1 or rank == 2) else None
    if part.size == 1:
        return np.full(size, part.reshape(())) if part.ndim <= (1 if rank is None else rank) else None
    if rank is None:
        return part if part.shape == (size,) and axis == -1 else None
    if part.ndim > rank:
        return None
    shape = (*[1] * (rank - part.ndim), *part.shape)
    others = {d for k, d in enumerate(shape) if k != axis % rank}
    return part.reshape(-1) if shape[axis % rank] == size and others <= {1} else None
