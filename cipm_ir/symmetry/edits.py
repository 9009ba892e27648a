"""Lazy edits of parameters: gathers, scales and mixings, evaluated once, tensor by tensor, when a model is saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Array, Labels


@dataclass
class Edit:
    """What happens to one parameter.

    ``take[axis]``: new position i holds old position take[i]. ``inner[axis]``: a matrix (new rows of axis 0, new size),
    the old position along ``axis`` for each new row. ``scale[axis]``: factors along the new axis, ``inner_scale``
    likewise per row. ``epsilon``: the scale s acts on a variance as s^2 (v + epsilon) - epsilon.
    ``mix[axis]``: (old size, new size), multiplied from the right instead of a gather.
    """

    take: dict[int, Labels] = field(default_factory=dict)
    inner: dict[int, Labels] = field(default_factory=dict)
    scale: dict[int, Array] = field(default_factory=dict)
    inner_scale: dict[int, Array] = field(default_factory=dict)
    mix: dict[int, Array] = field(default_factory=dict)
    shift: Array | None = None
    epsilon: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return not (self.take or self.inner or self.scale or self.inner_scale or self.mix or self.shift is not None)

    def key(self) -> bytes:
        """Equal for equal edits."""
        digest = hashlib.blake2b(repr(self.epsilon).encode(), digest_size=16)
        for name in ("take", "inner", "scale", "inner_scale", "mix"):
            for axis, array in sorted(getattr(self, name).items()):
                digest.update(f"{name}{axis}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        if self.shift is not None:
            digest.update(b"shift" + self.shift.tobytes())
        return digest.digest()

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result."""
        new = list(old)
        for axis, index in self.take.items():
            new[axis] = len(index)
        for axis, rows in self.inner.items():
            new[axis] = rows.shape[1]
        for axis, matrix in self.mix.items():
            new[axis] = matrix.shape[1]
        return tuple(new)

    def apply(self, array: Array) -> Array:
        """The edited array, in the dtype of ``array``."""
        out = array
        for axis, index in self.take.items():
            out = np.take(out, index, axis=axis)
        for axis, rows in self.inner.items():
            index = rows.reshape(rows.shape[:1] + tuple(rows.shape[1] if a == axis else 1 for a in range(1, out.ndim)))
            out = np.take_along_axis(out, index, axis=axis)
        for axis, matrix in self.mix.items():
            out = np.moveaxis(np.tensordot(np.moveaxis(out, axis, -1).astype(np.float64), matrix, 1), -1, axis).astype(
                array.dtype
            )
        factor = self._factor(out)
        if factor is not None:
            if self.epsilon is not None:
                wide = out.astype(np.float64)
                out = (factor**2 * (wide + self.epsilon) - self.epsilon).astype(array.dtype)
            else:
                out = _multiplied(out, factor)
        if self.shift is not None:
            out = (out.astype(np.float64) + self.shift).astype(array.dtype)
        return out

    def _factor(self, out: Array) -> Array | None:
        parts = [s.reshape([-1 if a == axis else 1 for a in range(out.ndim)]) for axis, s in self.scale.items()]
        for axis, s in self.inner_scale.items():
            parts.append(s.reshape(s.shape[:1] + tuple(s.shape[1] if a == axis else 1 for a in range(1, out.ndim))))
        if not parts:
            return None
        total = parts[0]
        for p in parts[1:]:
            total = total * p
        return np.asarray(total)


def _multiplied(array: Array, factor: Array) -> Array:
    """Product rounded once. Factors that the dtype holds exactly (powers of two, signs) need no wider type."""
    narrow = factor.astype(array.dtype)
    if array.dtype.kind == "f" and array.dtype.itemsize >= 4 and (narrow.astype(np.float64) == factor).all():
        return np.asarray(array * narrow)
    return (array.astype(np.float64) * factor).astype(array.dtype)


def edited(tensor: ir.TensorProtocol, edit: Edit, name: str) -> ir.LazyTensor:
    """A tensor that reads ``tensor`` and applies ``edit`` whenever it is evaluated; nothing is cached."""
    old = tuple(tensor.shape.numpy())
    dtype = tensor.dtype

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(edit.apply(np.asarray(tensor.numpy()))), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(edit.shape(old)), name=name)
