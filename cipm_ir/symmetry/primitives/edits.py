"""Lazy edits of parameters: gathers, scales and mixings, evaluated once, tensor by tensor, when a model is saved."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Array, Labels

_BLOCK = 1 << 20
_SMALL = 1 << 13
"""Results of at most so many entries are kept: shape checks and counts evaluate vectors again and again."""


@dataclass
class Edit:
    """What happens to one parameter.

    ``take[axis]``: new position i holds old position take[i]. ``inner[axis]``: a matrix (new rows of axis 0, new size),
    the old position along ``axis`` for each new row. ``scale[axis]``: factors along the new axis, ``inner_scale``
    likewise per row. ``epsilon``: the scale s acts on a variance as s^2 (v + epsilon) - epsilon.
    ``mix[axis]``: pairs of positions (units, occurrences) and a matrix (units, units) that multiplies them from the
    right, before anything else happens to them; computed in float64, and rounded once however many there are. A matrix
    of small integers (uint8) mostly holds zeros, and is multiplied as a sparse one.
    ``inner_mix[axis]``: the same with a row of axis 0 in front, to which it is confined.
    """

    take: dict[int, Labels] = field(default_factory=dict)
    inner: dict[int, Labels] = field(default_factory=dict)
    scale: dict[int, Array] = field(default_factory=dict)
    inner_scale: dict[int, Array] = field(default_factory=dict)
    mix: dict[int, list[tuple[Labels, Array]]] = field(default_factory=dict)
    inner_mix: dict[int, list[tuple[int, Labels, Array]]] = field(default_factory=dict)
    epsilon: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return not (self.take or self.inner or self.scale or self.inner_scale or self.mixes)

    @property
    def mixes(self) -> bool:
        """Whether entries are added up."""
        return bool(self.mix or self.inner_mix)

    def key(self) -> bytes:
        """Equal for equal edits."""
        digest = hashlib.blake2b(repr(self.epsilon).encode(), digest_size=16)
        tables = [(n, a, x) for n in ("take", "inner", "scale", "inner_scale") for a, x in getattr(self, n).items()]
        tables += [("mix", axis, x) for axis, pairs in self.mix.items() for pair in pairs for x in pair]
        inner = [(axis, x) for axis, pairs in self.inner_mix.items() for pair in pairs for x in pair]
        tables += [("inner_mix", axis, np.asarray(x)) for axis, x in inner]
        for name, axis, array in sorted(tables, key=lambda t: t[:2]):
            digest.update(f"{name}{axis}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the result."""
        new = list(old)
        for axis, index in self.take.items():
            new[axis] = len(index)
        for axis, rows in self.inner.items():
            new[axis] = rows.shape[1]
        return tuple(new)

    def apply(self, array: Array) -> Array:
        """Return the edited array, in the dtype of ``array``."""
        parts = list(self.blocks(array))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self, array: Array) -> Iterator[Array]:
        """Yield the edited array, some rows of its first axis at a time, so that the work stays in the cache."""
        dtype = array.dtype
        if not array.ndim:
            yield self._scaled(array, slice(None), np.dtype(np.float64), dtype)
            return
        if 0 in self.mix:
            array = _mixed(array, 0, self.mix[0])
        wide = np.dtype(np.float64) if self.mixes else self._width(dtype)
        rows = self.take.get(0)
        count = array.shape[0] if rows is None else len(rows)
        step = max(1, _BLOCK * array.shape[0] // max(array.nbytes, 1))
        for start in range(0, max(count, 1), step):
            here = slice(start, start + step)
            part = array[here] if rows is None else array.take(rows[here], axis=0)
            for axis, pairs in self.mix.items():
                if axis:
                    part = _mixed(part, axis, pairs)
            if self.inner_mix:
                source = np.arange(start, min(start + step, count)) if rows is None else rows[here]
                part = self._mixed_within(part, source)
            for axis, index in self.take.items():
                if axis:
                    part = np.take(part, index, axis=axis, mode="clip")
            for axis, inner in self.inner.items():
                shape = [-1, *(inner.shape[1] if a == axis else 1 for a in range(1, part.ndim))]
                part = np.take_along_axis(part, inner[here].reshape(shape), axis=axis)
            yield self._scaled(part, here, wide, dtype)

    def _mixed_within(self, part: Array, source: Labels) -> Array:
        """Times the matrices of `inner_mix`; ``source``: which row of axis 0 each row of the part was."""
        part = part.astype(np.float64)
        for axis, pairs in self.inner_mix.items():
            for row, positions, matrix in pairs:
                inside = source == row
                part[inside] = _mixed(part[inside], axis, [(positions, matrix)])
        return part

    def _width(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype to multiply in: the tensor's own where it holds every product of the scales exactly."""
        scales = [*self.scale.values(), *self.inner_scale.values()]
        if dtype not in (np.float32, np.float64) or self.epsilon is not None:
            return np.dtype(np.float64)
        halves, powers = zip(*(np.frexp(s) for s in scales), strict=True) if scales else ((), ())
        exact = all((np.abs(h) == 0.5).all() for h in halves)
        return dtype if exact and sum(int(np.abs(p).max()) for p in powers) < 100 else np.dtype(np.float64)

    def _scaled(self, part: Array, rows: slice, width: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
        """Times the product of all scales, rounded once to the dtype of the tensor."""
        factor: Array | None = None
        for axis, s in self.scale.items():
            s = s.astype(width)
            along = (s[rows] if axis == 0 else s).reshape([-1 if a == axis else 1 for a in range(part.ndim)])
            factor = along if factor is None else factor * along
        for axis, s in self.inner_scale.items():
            along = s[rows].astype(width).reshape([-1, *(s.shape[1] if a == axis else 1 for a in range(1, part.ndim))])
            factor = along if factor is None else factor * along
        if factor is None:
            return part if part.dtype == dtype else _narrowed(part, dtype)
        if self.epsilon is None and width == part.dtype == dtype:
            return np.asarray(part * factor)
        wide = part.astype(np.float64)
        if self.epsilon is None:
            wide *= factor
        else:
            square = factor**2
            wide = np.where(square == 1.0, wide, square * (wide + self.epsilon) - self.epsilon)
        return _narrowed(wide, dtype) if self.mixes else wide.astype(dtype)


def _narrowed(wide: Array, dtype: np.dtype[Any]) -> Array:
    """Rounded to a narrower type; an error where a finite entry would overflow it."""
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    if not np.array_equal(np.isfinite(narrow.astype(np.float64)), np.isfinite(wide)):
        raise SymmetryError(f"A change of basis overflows a tensor of dtype {dtype}; scale its space down first.")
    return narrow


def _mixed(array: Array, axis: int, pairs: list[tuple[Labels, Array]]) -> Array:
    """Times the matrices along an axis, for each occurrence of the units on its own; in float64."""
    out = np.moveaxis(array, axis, -1).astype(np.float64, order="C")
    flat = out.reshape(-1, out.shape[-1])
    step = max(1, _BLOCK // max(out.shape[-1], 1))
    factors = [(positions, _multiplied(matrix)) for positions, matrix in pairs]
    for lo in range(0, len(flat), step):
        part = flat[lo : lo + step]
        for positions, matrix in factors:
            for occurrence in positions.T:
                part[:, occurrence] = part[:, occurrence] @ matrix
    return np.moveaxis(out, -1, axis)


def _multiplied(matrix: Array) -> Any:
    """Return a matrix in float64, sparse where it only adds up.

    Its double precision would take eight times its memory.
    """
    if matrix.dtype != np.uint8:
        return matrix.astype(np.float64, copy=False)
    from scipy.sparse import csr_array  # slow to import, and rarely needed

    return csr_array(matrix).astype(np.float64)


class EditedTensor(ir.LazyTensor):
    """A tensor that reads another and applies an edit whenever it is evaluated; only small results are kept."""

    def __init__(self, tensor: ir.TensorProtocol, edit: Edit, name: str) -> None:
        self._source, self._edit = tensor, edit
        shape = ir.Shape(edit.shape(tuple(tensor.shape.numpy())))
        small = shape.is_static() and math.prod(shape.numpy()) <= _SMALL
        super().__init__(self._evaluated, dtype=tensor.dtype, shape=shape, cache=small, name=name)

    def _evaluated(self) -> ir.TensorProtocol:
        array = self._edit.apply(np.asarray(self._source.numpy()))
        return ir.Tensor(np.ascontiguousarray(array), dtype=self.dtype, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes to an open file, block by block."""
        if self.dtype.bitwidth % 8 or sys.byteorder != "little":
            super().tofile(file)
            return
        for block in self._edit.blocks(np.asarray(self._source.numpy())):
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
