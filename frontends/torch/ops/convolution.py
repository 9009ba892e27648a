"""Lowering of convolutions and transposed convolutions: functions, aten overloads and modules, zero padding or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.padding import Pairs, padded
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Lowering, Tensor, known

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def spatial(value: Any, rank: int) -> list[int]:
    """One number per spatial axis: a number, or a sequence of one or of all, counts for each."""
    given = list(value) if isinstance(value, list | tuple) else [value]
    numbers = [int(known(v)) for v in given]
    if len(numbers) == 1:
        numbers *= rank
    if len(numbers) != rank:
        raise UnsupportedPattern(f"{len(numbers)} numbers for {rank} spatial axes")
    return numbers


def batched(b: Lowering, x: Tensor, rank: int) -> tuple[Tensor, bool]:
    """The input with a batch axis, and whether it had one."""
    if x.rank == rank + 2:
        return x, True
    if x.rank != rank + 1:
        raise UnsupportedPattern(f"an input with {x.rank} axes")
    return b.op("Unsqueeze", x, np.zeros(1, np.int64), shape=(1, *x.dims)), False


def unbatched(b: Lowering, x: Tensor, had_batch: bool) -> Tensor:
    """Undo `batched`."""
    return x if had_batch else b.op("Squeeze", x, np.zeros(1, np.int64), shape=b.shape)


def with_batch(b: Lowering, had_batch: bool) -> tuple[int | None, ...]:
    """Shape of the result with a batch axis."""
    return b.shape if had_batch else (1, *b.shape)


def same_padding(weight: Tensor, dilation: Sequence[int]) -> Pairs:
    """Padding that keeps sizes at stride 1; torch puts the odd entry behind."""
    sizes = weight.dims[2:]
    if None in sizes:
        raise UnsupportedPattern("padding 'same' with a kernel of dynamic size")
    total = [d * (int(k or 1) - 1) for d, k in zip(dilation, sizes, strict=True)]
    return [(t // 2, t - t // 2) for t in total]


@computes("conv1d", "conv2d", "conv3d", modules=(nn.Conv1d, nn.Conv2d, nn.Conv3d))
def conv(
    b: Lowering,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Every convolution; another mode than zeros pads first."""
    rank = weight.rank - 2
    dilations, strides = spatial(dilation, rank), spatial(stride, rank)
    if padding == "same":
        pairs = same_padding(weight, dilations)
    else:
        pairs = [(p, p) for p in spatial(0 if padding == "valid" else padding, rank)]
    x, had_batch = batched(b, input, rank)
    if padding_mode != "zeros" and any(p != (0, 0) for p in pairs):
        x = padded(b, x, [(0, 0), (0, 0), *pairs], _MODES[padding_mode], None)
        pairs = [(0, 0)] * rank
    made = b.op(
        "Conv", x, weight, bias,
        strides=strides, dilations=dilations, pads=[p for p, _ in pairs] + [q for _, q in pairs],
        group=int(known(groups)), shape=with_batch(b, had_batch),
    )  # fmt: skip
    return unbatched(b, made, had_batch)


def _transposed(
    b: Lowering,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: tuple[list[int], list[int], list[int], list[int]],
    groups: Any,
) -> Tensor:
    """``numbers``: strides, padding, output padding, dilations."""
    strides, padding, extra, dilations = numbers
    x, had_batch = batched(b, input, weight.rank - 2)
    made = b.op(
        "ConvTranspose", x, weight, bias,
        strides=strides, dilations=dilations, pads=padding * 2, output_padding=extra if any(extra) else None,
        group=int(known(groups)), shape=with_batch(b, had_batch),
    )  # fmt: skip
    return unbatched(b, made, had_batch)


@computes("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    b: Lowering,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> Tensor:
    rank = weight.rank - 2
    strides, pads, extra = spatial(stride, rank), spatial(padding, rank), spatial(output_padding, rank)
    return _transposed(b, input, weight, bias, (strides, pads, extra, spatial(dilation, rank)), groups)


@computes(modules=(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), inputs=2)
def conv_transpose_module(
    b: Lowering,
    input: Tensor,
    output_size: Any = None,
    *,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Tensor:
    """A layer that may be called with the size of its output, from which the output padding follows."""
    rank = weight.rank - 2
    strides, pads, dilations = spatial(stride, rank), spatial(padding, rank), spatial(dilation, rank)
    if output_size is None:
        extra = spatial(output_padding, rank)
    else:
        sizes = (*input.dims[-rank:], *weight.dims[2:], *b.shape[-rank:])
        if None in sizes:
            raise UnsupportedPattern("an output size where sizes are dynamic")
        had, taps, gets = np.asarray(sizes, np.int64).reshape(3, rank)
        least = (had - 1) * strides - 2 * np.asarray(pads) + np.asarray(dilations) * (taps - 1) + 1
        extra = (gets - least).tolist()
    return _transposed(b, input, weight, bias, (strides, pads, extra, dilations), groups)


@computes("convolution", "_convolution")
def convolution(
    b: Lowering,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: Any,
    *flags: Any,
) -> Tensor:
    """Both kinds, as aten calls them after decomposition."""
    if transposed:
        return conv_transpose(b, input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(b, input, weight, bias, stride, padding, dilation, groups)
