"""Lowering of pooling: maxima, averages, norms; adaptive where every window has one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.convolution import batched, spatial
from cipm_ir.frontends.torch.ops.reduction import reduced
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Dims, Lowering, Tensor, known


class Window:
    """Kernel, strides, padding and dilations per spatial axis, as torch gives them."""

    def __init__(self, rank: int, kernel: Any, stride: Any, padding: Any = 0, dilation: Any = 1) -> None:
        self.kernel = spatial(kernel, rank)
        self.strides = spatial(stride, rank) if stride not in (None, [], ()) else self.kernel
        self.padding, self.dilations = spatial(padding, rank), spatial(dilation, rank)

    def attributes(self) -> dict[str, Any]:
        """Of an ONNX pooling node."""
        spread = self.dilations if any(d != 1 for d in self.dilations) else None
        return {"kernel_shape": self.kernel, "strides": self.strides, "pads": self.padding * 2, "dilations": spread}

    def is_ceiled(self, sizes: Sequence[int | None], ceil_mode: bool) -> bool:
        """Whether rounding up makes a difference."""
        if not ceil_mode:
            return False
        for n, k, s, p, d in zip(sizes, self.kernel, self.strides, self.padding, self.dilations, strict=True):
            if n is None or (n + 2 * p - d * (k - 1) - 1) % s:
                return True
        return False


def _pool(b: Lowering, op_type: str, input: Tensor, window: Window, ceil: bool, **attributes: Any) -> Tensor:
    x, had_batch = batched(b, input, len(window.kernel))
    ceiled = window.is_ceiled(x.dims[2:], ceil)
    shape = _first_shape(b)
    made = b.op(
        op_type, x, **window.attributes(), **attributes,
        ceil_mode=1 if ceiled else None, shape=shape if had_batch else (1, *shape),
    )  # fmt: skip
    return made if had_batch else b.op("Squeeze", made, np.zeros(1, np.int64), shape=shape)


def _first_shape(b: Lowering) -> Dims:
    """Shape of the result, or of the first of several."""
    if isinstance(b.out, tuple | list):
        return tuple(int(d) if type(d) is int else None for d in b.out[0].shape)
    return b.shape


# ---------------------------------------------------------------- maxima
def _max_pool(b: Lowering, input: Tensor, window: Window, ceil: bool, with_indices: bool) -> Any:
    if not input.dtype.is_floating_point:
        raise UnsupportedPattern("a maximum of integers")
    made = _pool(b, "MaxPool", input, window, ceil)
    return (made, _indices(b, input, window, ceil)) if with_indices else made


def _indices(b: Lowering, input: Tensor, window: Window, ceil: bool) -> Tensor:
    """Positions in the plane of a channel; ONNX counts through batch and channels."""
    rank = len(window.kernel)
    x, had_batch = batched(b, input, rank)
    shape = _first_shape(b) if had_batch else (1, *_first_shape(b))
    ceiled = 1 if window.is_ceiled(x.dims[2:], ceil) else None
    _, places = b.multi("MaxPool", [x], [shape, shape], **window.attributes(), ceil_mode=ceiled)
    places.dtype, places.value.dtype = torch.int64, ir.DataType.INT64
    sizes = b.op("Shape", x, start=2, dtype=torch.int64, shape=(rank,))
    made = b.op("Mod", places, b.op("ReduceProd", sizes, keepdims=0, shape=()), shape=shape)
    return made if had_batch else b.op("Squeeze", made, np.zeros(1, np.int64), shape=shape[1:])


def _place(b: Lowering, input: Tensor, rank: int) -> Tensor:
    """The position of the maximum in each plane."""
    kept = input.rank - rank
    flat = b.op("Reshape", input, np.asarray([0] * kept + [-1], np.int64), shape=(*input.dims[:kept], None))
    place = b.op("ArgMax", flat, axis=kept, keepdims=1, dtype=torch.int64, shape=(*input.dims[:kept], 1))
    axes = np.arange(kept + 1, input.rank)
    return b.op("Unsqueeze", place, axes, shape=_first_shape(b)) if axes.size else place


def _max_pools(rank: int, cls: type[nn.Module]) -> None:
    @computes(f"max_pool{rank}d", modules=(cls,))
    def entry(
        b: Lowering, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: Any = False, return_indices: Any = False,
    ) -> Any:  # fmt: skip
        window = Window(rank, kernel_size, stride, padding, dilation)
        return _max_pool(b, input, window, bool(ceil_mode), bool(return_indices))

    @computes(f"max_pool{rank}d_with_indices")
    def both(
        b: Lowering, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: Any = False, return_indices: Any = True,
    ) -> Any:  # fmt: skip
        window = Window(rank, kernel_size, stride, padding, dilation)
        return _max_pool(b, input, window, bool(ceil_mode), True)


# ---------------------------------------------------------------- averages, norms
def _average(b: Lowering, input: Tensor, window: Window, ceil: bool, include: bool, divisor: int | None) -> Tensor:
    if divisor is None:
        return _pool(b, "AveragePool", input, window, ceil, count_include_pad=1 if include else None)
    if window.is_ceiled(input.dims[-len(window.kernel) :], ceil):
        raise UnsupportedPattern("an average with a divisor of its own that rounds sizes up")
    made = _pool(b, "AveragePool", input, window, False, count_include_pad=1)
    return b.op("Mul", made, math.prod(window.kernel) / int(known(divisor)), shape=made.shape)


def _average_pools(rank: int, cls: type[nn.Module]) -> None:
    @computes(f"avg_pool{rank}d", modules=(cls,))
    def entry(
        b: Lowering, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: Any = False,
        count_include_pad: Any = True, divisor_override: Any = None,
    ) -> Tensor:  # fmt: skip
        window = Window(rank, kernel_size, stride, padding)
        return _average(b, input, window, bool(ceil_mode), bool(count_include_pad), divisor_override)


def _norm_pools(rank: int, cls: type[nn.Module]) -> None:
    @computes(f"lp_pool{rank}d", modules=(cls,))
    def entry(
        b: Lowering, input: Tensor, norm_type: Any, kernel_size: Any, stride: Any = None, ceil_mode: Any = False
    ) -> Tensor:
        """Torch takes powers of the entries themselves: of an even order that is the norm, of order 1 the sum."""
        window = Window(rank, kernel_size, stride)
        if window.is_ceiled(input.dims[-rank:], bool(ceil_mode)):
            raise UnsupportedPattern("a pooled norm that rounds sizes up")
        order = known(norm_type)
        if order == 1:
            return _average(b, input, window, False, True, 1)
        if order <= 0 or order % 2:
            raise UnsupportedPattern(f"a pooled norm of order {order}")
        return _pool(b, "LpPool", input, window, False, p=int(order))


# ---------------------------------------------------------------- adaptive
def _adaptive_window(b: Lowering, input: Tensor, rank: int, output_size: Any) -> list[int | None]:
    """Width of the windows along each spatial axis; None for all of it; refused where they would differ."""
    given = list(output_size) if isinstance(output_size, list | tuple) else [output_size]
    given = given * rank if len(given) == 1 else given
    widths: list[int | None] = []
    for wanted, size in zip(given, input.dims[-rank:], strict=True):
        if wanted is None:
            widths.append(None if size == 1 else 1)
            continue
        count = int(known(wanted))
        if count == 1:
            widths.append(None)
        elif size is None or size % count:
            raise UnsupportedPattern(f"adaptive pooling of {size} entries to {count}, with windows of several widths")
        else:
            widths.append(size // count)
    return widths


def adaptive(b: Lowering, input: Tensor, rank: int, output_size: Any, kind: str) -> Tensor:
    """Pool to a given size, over windows of one width."""
    widths = _adaptive_window(b, input, rank, output_size)
    if widths == [None] * rank and input.rank == rank + 2:
        return b.op(f"Global{'Average' if kind == 'Mean' else 'Max'}Pool", input, shape=_first_shape(b))
    whole = [input.rank - rank + k for k, w in enumerate(widths) if w is None]
    x = reduced(b, f"Reduce{kind}", input, whole, True)
    if all(w in (None, 1) for w in widths):
        return x
    window = Window(rank, [w or 1 for w in widths], None)
    return _pool(b, "AveragePool" if kind == "Mean" else "MaxPool", x, window, False)


def _adaptive_pools(rank: int, average: type[nn.Module], maximum: type[nn.Module]) -> None:
    @computes(f"adaptive_avg_pool{rank}d", f"_adaptive_avg_pool{rank}d", modules=(average,))
    def mean(b: Lowering, input: Tensor, output_size: Any) -> Tensor:
        return adaptive(b, input, rank, output_size, "Mean")

    def largest(b: Lowering, input: Tensor, output_size: Any, return_indices: Any = False) -> Any:
        values = adaptive(b, input, rank, output_size, "Max")
        if not isinstance(b.out, tuple | list):
            return values
        widths = _adaptive_window(b, input, rank, output_size)
        if widths == [None] * rank:
            return values, _place(b, input, rank)
        widths = [n if w is None else w for w, n in zip(widths, input.dims[-rank:], strict=True)]
        return values, _indices(b, input, Window(rank, widths, None), False)

    computes(f"adaptive_max_pool{rank}d", f"adaptive_max_pool{rank}d_with_indices", modules=(maximum,))(largest)


for _rank, _classes in enumerate(
    (
        (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.LPPool1d),
        (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
        (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.LPPool3d),
    ),
    start=1,
):
    _max_pools(_rank, _classes[0])
    _average_pools(_rank, _classes[1])
    _adaptive_pools(_rank, _classes[2], _classes[3])
    _norm_pools(_rank, _classes[4])
