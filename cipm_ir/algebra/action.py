"""The one place where an element meets a tensor: gather along an axis, then multiply by a factor per index."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipm_ir.algebra.validation import FloatArray, IntArray
from cipm_ir.errors import SymmetryError


def gather_and_scale(array: NDArray[Any], axis: int, perm: IntArray, factor: FloatArray | None) -> NDArray[Any]:
    """Return new array `factor[i] * array[..., perm[i], ...]` along `axis`, of the dtype that came in.

    Products are rounded once to the dtype of `array`, so factors of ±2^e are exact as long as nothing leaves the
    normal range. Factor None, or all ones, only gathers and therefore takes any dtype.
    Raises SymmetryError where the axis does not exist or has another size than `perm`, where the dtype cannot be
    scaled, and where a finite entry would overflow.
    """
    source = np.asarray(array)
    position = _axis_of(source, axis, perm.size)
    moved = np.take(source, perm, axis=position)
    if factor is None or bool(np.all(factor == 1.0)):
        return moved
    _check_scalable(moved.dtype, factor)
    along = [1] * moved.ndim
    along[position] = perm.size
    _multiply_in_place(moved, factor.reshape(along))
    return moved


def integer_power(base: FloatArray, exponent: int) -> FloatArray:
    """`base ** exponent` by products and one reciprocal, so that powers of two stay powers of two (pow() may not)."""
    result = np.ones_like(base)
    square, rest = base, abs(exponent)
    with np.errstate(over="ignore", under="ignore", divide="ignore"):  # the caller checks for 0 and inf
        while rest:
            if rest & 1:
                result = result * square
            rest >>= 1
            square = square * square if rest else square
        return 1.0 / result if exponent < 0 else result


def _axis_of(array: NDArray[Any], axis: int, size: int) -> int:
    if not -array.ndim <= axis < array.ndim:
        raise SymmetryError(f"Axis {axis} does not exist in a tensor of shape {array.shape}.")
    position = axis % array.ndim
    if array.shape[position] != size:
        raise SymmetryError(
            f"Axis {position} of a tensor of shape {array.shape} has size {array.shape[position]}, "
            f"but the element acts on {size} classes."
        )
    return position


def _check_scalable(dtype: np.dtype[Any], factor: FloatArray) -> None:
    if not _is_float(dtype):
        raise SymmetryError(f"A tensor of dtype {dtype} can be permuted but not scaled; act on its float form.")
    if dtype.itemsize == 1 and not bool(np.all(np.abs(factor) == 1.0)):
        raise SymmetryError(f"A tensor of dtype {dtype} has no range to take a scale; scale its quantization scale.")


def _is_float(dtype: np.dtype[Any]) -> bool:
    # numpy reports bfloat16 and int4 of extension packages alike as kind "V": ask whether one half survives.
    if dtype.kind == "f":
        return True
    if dtype.kind != "V" or dtype.names is not None or dtype.type is np.void:
        return False
    return bool(np.asarray([0.5]).astype(dtype).astype(np.float64)[0] == 0.5)


def _multiply_in_place(moved: NDArray[Any], factor: FloatArray) -> None:
    with np.errstate(over="ignore", under="ignore"):
        narrow = factor.astype(moved.dtype)
        fits = bool(np.all(narrow.astype(np.float64) == factor))
    try:
        with np.errstate(over="raise"):
            if fits:
                np.multiply(moved, narrow, out=moved)
            else:
                # Computed in float64 piece by piece (ufunc buffering), rounded once: no float64 copy of the tensor.
                np.multiply(moved, factor, out=moved, dtype=np.float64, casting="unsafe")
    except FloatingPointError as error:
        raise SymmetryError(f"The scale overflows a tensor of dtype {moved.dtype}; use smaller scales.") from error
