"""Fourier transforms and complex numbers, which have no form in ONNX that keeps their type.

They stay calls of torch. The node lists the axes they mix: units along the others move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from cipm_ir.frontends.torch.table import lowers
from cipm_ir.frontends.torch.values import Lowering, Tensor, Transparent

_REASON = "a Fourier transform, which mixes this axis"


def _mixes(b: Lowering, x: Tensor, axes: Sequence[int], reason: str = _REASON) -> NoReturn:
    raise Transparent(reason, axes=sorted(b.axes(x, list(axes))) if axes else [])


@lowers("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def fft(b: Lowering, input: Tensor, n: Any = None, dim: int = -1, norm: Any = None) -> Tensor:
    _mixes(b, input, [dim])


@lowers("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_hfft2", "fft_ihfft2")
def fft2(b: Lowering, input: Tensor, s: Any = None, dim: Any = (-2, -1), norm: Any = None) -> Tensor:
    _mixes(b, input, dim)


@lowers("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn")
def fftn(b: Lowering, input: Tensor, s: Any = None, dim: Any = None, norm: Any = None) -> Tensor:
    last = range(input.rank)[-len(s) :] if s is not None else range(input.rank)
    _mixes(b, input, last if dim is None else dim)


@lowers("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft_of_aten(b: Lowering, input: Tensor, dim: Any, normalization: int, option: Any) -> Tensor:
    _mixes(b, input, dim)


@lowers("fft_fftshift", "fft_ifftshift")
def shifted(b: Lowering, input: Tensor, dim: Any = None) -> Tensor:
    axes = range(input.rank) if dim is None else [dim] if isinstance(dim, int) else dim
    _mixes(b, input, axes, "a shift of frequencies")


@lowers("real", "imag", "conj", "resolve_conj", "resolve_neg", "_conj", "conj_physical", "view_as_real", view=True)
def part(b: Lowering, input: Tensor) -> Tensor:
    if not input.dtype.is_complex:
        return input
    _mixes(b, input, (), "complex numbers")


@lowers("view_as_complex", view=True)
def view_as_complex(b: Lowering, input: Tensor) -> Tensor:
    """The last axis holds real and imaginary parts."""
    _mixes(b, input, [input.rank - 1], "complex numbers")


@lowers("angle")
def angle(b: Lowering, input: Tensor) -> Tensor:
    raise Transparent("complex numbers", like="Exp")  # entry by entry, and no scale or sign goes through
