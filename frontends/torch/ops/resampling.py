"""Lowering of what changes resolution: interpolation, pixel shuffle and its inverse, channel shuffle, fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.pooling import adaptive
from cipm_ir.frontends.torch.table import lowers
from cipm_ir.frontends.torch.values import Lowering, Number, Tensor, known
from cipm_ir.ir.labels import Array

_LINEAR = ("linear", "bilinear", "trilinear")
_FAR = 1 << 14
"""How many positions are compared where a size is dynamic."""


@dataclass(frozen=True)
class Target:
    """What the program asks for: sizes, or scales; one of them per spatial axis."""

    sizes: list[int | Number] | None
    scales: list[float] | None


def _listed(value: Any, rank: int) -> list[Any]:
    given = list(value) if isinstance(value, list | tuple) else [value] * rank
    if len(given) != rank:
        raise UnsupportedPattern(f"{len(given)} sizes or scales for {rank} spatial axes")
    return given


def _target(rank: int, size: Any, scale_factor: Any) -> Target:
    if size is not None:
        return Target(_listed(size, rank), None)
    if scale_factor is None:
        raise UnsupportedPattern("neither a size nor a scale")
    return Target(None, [float(known(s)) for s in _listed(scale_factor, rank)])


# ---------------------------------------------------------------- interpolation
def _resized(b: Lowering, x: Tensor, target: Target, **attributes: Any) -> Tensor:
    """A Resize of the spatial axes only, so that batch and channels are free."""
    axes = list(range(2, x.rank))
    if target.sizes is not None:
        return b.op("Resize", x, None, None, b.ints(target.sizes), axes=axes, shape=b.shape, **attributes)
    scales = np.asarray(target.scales, np.float32)
    if not np.array_equal(scales, np.asarray(target.scales)):
        _check_floor(x, target)
    return b.op("Resize", x, None, scales, axes=axes, shape=b.shape, **attributes)


def _check_floor(x: Tensor, target: Target) -> None:
    """A scale that float32 does not hold must give the same size in it."""
    for n, s in zip(x.dims[2:], target.scales or (), strict=True):
        if n is None or int(n * s) != int(np.float32(n) * np.float32(s)):
            raise UnsupportedPattern(f"scale {s}, which float32 does not hold")


def _check_nearest(b: Lowering, x: Tensor, target: Target, half: float) -> None:
    """Torch multiplies by the inverse scale, ONNX divides by the scale: both must round to the same neighbours."""
    one = np.float32(half)
    for k, (before, after) in enumerate(zip(x.dims[2:], b.shape[2:], strict=True)):
        if target.scales is not None:
            scale, step = np.float32(target.scales[k]), np.float32(1 / target.scales[k])
        elif before is None or after is None:
            raise UnsupportedPattern("the nearest neighbours of a size that is dynamic")
        else:
            scale, step = np.float32(after) / np.float32(before), np.float32(before) / np.float32(after)
        where: Array = np.arange(after or _FAR, dtype=np.float32)
        ours = np.floor((where + one) / scale - one + one)
        theirs = np.floor((where + one) * step)
        if before is not None:
            ours, theirs = np.minimum(ours, before - 1), np.minimum(theirs, before - 1)
        if not np.array_equal(ours, theirs):
            raise UnsupportedPattern("nearest neighbours that rounding decides")


def _interpolated(b: Lowering, x: Tensor, mode: str, target: Target, align_corners: Any) -> Tensor:
    if mode == "nearest":
        _check_nearest(b, x, target, 0.0)
        return _resized(b, x, target, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    if mode == "nearest-exact":
        _check_nearest(b, x, target, 0.5)
        return _resized(
            b, x, target, mode="nearest", coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil"
        )
    where = "align_corners" if align_corners else "half_pixel"
    if mode in _LINEAR:
        return _linear(b, x, target, where)
    if mode == "bicubic":
        return _resized(b, x, target, mode="cubic", coordinate_transformation_mode=where, cubic_coeff_a=-0.75)
    raise UnsupportedPattern(f"interpolation in mode {mode!r}")


def _linear(b: Lowering, x: Tensor, target: Target, where: str) -> Tensor:
    return _resized(b, x, target, mode="linear", coordinate_transformation_mode=where)


@lowers("interpolate", "upsample", modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d))
def interpolate(
    b: Lowering, input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: Any = False,
) -> Tensor:  # fmt: skip
    if antialias:
        raise UnsupportedPattern("interpolation with antialiasing")
    rank = input.rank - 2
    if size is None and recompute_scale_factor:
        if None in b.shape:
            raise UnsupportedPattern("a scale that is recomputed from dynamic sizes")
        size = b.shape[2:]
    if mode == "area":
        return adaptive(b, input, rank, b.shape[2:] if size is None else size, "Mean")
    return _interpolated(b, input, mode, _target(rank, size, scale_factor), align_corners)


def _upsample(name: str, mode: str, rank: int, corners: bool) -> None:
    """aten: sizes, [align_corners,] then scales as a list, or one by one."""

    @lowers(name)
    def entry(b: Lowering, input: Tensor, output_size: Any, *rest: Any, **other: Any) -> Tensor:
        given = list(rest)
        align = given.pop(0) if corners and given else other.get("align_corners")
        scales = other.get("scale_factors", given[0] if given and isinstance(given[0], list | tuple) else None)
        if output_size is not None and any(s is not None for s in (*given, *other.values()) if s is not align):
            raise UnsupportedPattern("sizes and scales at once")
        return _interpolated(b, input, mode, _target(rank, output_size, scales), align)


for _rank, _mode in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d")):
    _upsample(f"upsample_nearest{_rank}d", "nearest", _rank, False)
    _upsample(f"_upsample_nearest_exact{_rank}d", "nearest-exact", _rank, False)
    _upsample(f"upsample_{_mode}", "linear", _rank, True)
_upsample("upsample_bicubic2d", "bicubic", 2, True)


# ---------------------------------------------------------------- shuffles
def _reshape(b: Lowering, x: Tensor, sizes: Sequence[int | Number], shape: Sequence[int | None] | None) -> Tensor:
    """A Reshape in which 0 stands for a size that stays."""
    return b.op("Reshape", x, b.ints(sizes), shape=shape)


def _image(b: Lowering, x: Tensor) -> Tensor:
    if x.rank not in (3, 4):
        raise UnsupportedPattern(f"a shuffle of {x.rank} axes")
    return x if x.rank == 4 else b.op("Unsqueeze", x, np.zeros(1, np.int64), shape=(1, *x.dims))


def _like(b: Lowering, made: Tensor, input: Tensor) -> Tensor:
    return made if input.rank == 4 else b.op("Squeeze", made, np.zeros(1, np.int64), shape=b.shape)


@lowers("pixel_shuffle", modules=(nn.PixelShuffle,))
def pixel_shuffle(b: Lowering, input: Tensor, upscale_factor: int) -> Tensor:
    x = _image(b, input)
    shape = b.shape if input.rank == 4 else (1, *b.shape)
    return _like(b, b.op("DepthToSpace", x, blocksize=int(known(upscale_factor)), mode="CRD", shape=shape), input)


@lowers("pixel_unshuffle", modules=(nn.PixelUnshuffle,))
def pixel_unshuffle(b: Lowering, input: Tensor, downscale_factor: int) -> Tensor:
    """Channel major, which SpaceToDepth is not."""
    x, r = _image(b, input), int(known(downscale_factor))
    n, c, *_ = x.dims
    height, width = b.shape[-2:]
    if height is None or width is None:
        raise UnsupportedPattern("pixel_unshuffle of dynamic sizes")
    wide = _reshape(b, x, [0, -1, height, r, width, r], (n, c, height, r, width, r))
    made = _reshape(b, b.transpose(wide, (0, 1, 3, 5, 2, 4)), [0, -1, height, width], (n, *b.shape[-3:]))
    return _like(b, made, input)


@lowers("channel_shuffle", "native_channel_shuffle", modules=(nn.ChannelShuffle,))
def channel_shuffle(b: Lowering, input: Tensor, groups: int) -> Tensor:
    n, c, *space = input.dims
    count = int(known(groups))
    sizes = [b.size(input, a + 2) if s is None else s for a, s in enumerate(space)]
    wide = _reshape(b, input, [0, count, -1, *sizes], (n, count, None if c is None else c // count, *space))
    turned = b.transpose(wide, (0, 2, 1, *range(3, len(space) + 3)))
    return _reshape(b, turned, [0, -1, *sizes], input.dims)


@lowers("im2col", "col2im", "fold", modules=(nn.Unfold, nn.Fold))
def columns(b: Lowering, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    raise UnsupportedPattern("patches as columns")
