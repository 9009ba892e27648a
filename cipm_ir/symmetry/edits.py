"""Lazy edits of parameters: gathers, scales and mixings, evaluated once, tensor by tensor, when a model is saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Array, Labels

_BLOCK = 1 << 20


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
        parts = self._factors(array.ndim)
        if len(self.take) > 1 and 0 in self.take and not self.inner and not self.mix and array.nbytes > _BLOCK:
            out = _gathered_by_rows(array, self.take, parts, self.epsilon)
            return out if self.shift is None else (out.astype(np.float64) + self.shift).astype(array.dtype)
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
        if parts:
            out = out if out is not array else array.copy()
            step = max(1, _BLOCK * out.shape[0] // max(out.nbytes, 1)) if out.ndim else 1
            for start in range(0, out.shape[0] if out.ndim else 1, step):
                _scale(out, slice(start, start + step), parts, self.epsilon)
        if self.shift is not None:
            out = (out.astype(np.float64) + self.shift).astype(array.dtype)
        return out

    def _factors(self, rank: int) -> list[Array]:
        """Scales in a shape that broadcasts."""
        parts = [s.reshape([-1 if a == axis else 1 for a in range(rank)]) for axis, s in self.scale.items()]
        for axis, s in self.inner_scale.items():
            parts.append(s.reshape(s.shape[:1] + tuple(s.shape[1] if a == axis else 1 for a in range(1, rank))))
        return parts


def _gathered_by_rows(array: Array, take: dict[int, Labels], parts: list[Array], epsilon: float | None) -> Array:
    """Gather along the first and other axes, and scale, a block of rows at a time, so that it stays in the cache."""
    rows = take[0]
    rest = sorted((len(index) - array.shape[axis], axis) for axis, index in take.items() if axis)
    shape = [len(take[a]) if a in take else n for a, n in enumerate(array.shape)]
    out = np.empty(shape, array.dtype)
    step = max(1, _BLOCK * array.shape[0] // array.nbytes)
    for start in range(0, len(rows), step):
        part = array.take(rows[start : start + step], axis=0)
        for _, axis in rest[:-1]:
            part = part.take(take[axis], axis=axis)
        last = rest[-1][1]
        here = slice(start, start + step)
        np.take(part, take[last], axis=last, out=out[here], mode="clip")  # "raise" would buffer
        if parts:
            _scale(out, here, parts, epsilon)
    return out


def _scale(array: Array, rows: slice, parts: list[Array], epsilon: float | None) -> None:
    """Multiply some rows in place by the product of ``parts``, rounded once."""
    here = rows if array.ndim else ()
    factor: Array = np.ones(())
    for part in parts:
        factor = factor * (part[here] if part.ndim and part.shape[0] > 1 else part)
    wide = array[here].astype(np.float64)
    if epsilon is None:
        wide *= factor
    else:
        square = factor**2
        wide = np.where(square == 1.0, wide, square * (wide + epsilon) - epsilon)
    array[here] = wide.astype(array.dtype)


def edited(tensor: ir.TensorProtocol, edit: Edit, name: str) -> ir.LazyTensor:
    """A tensor that reads ``tensor`` and applies ``edit`` whenever it is evaluated; nothing is cached."""
    old = tuple(tensor.shape.numpy())
    dtype = tensor.dtype

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(edit.apply(np.asarray(tensor.numpy()))), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(edit.shape(old)), name=name)
