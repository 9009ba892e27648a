"""Lowering of normalizations. Training mode is lowered as evaluation wherever running statistics are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cipm_ir.frontends.from_torch_ops_reduction import axes_input, norm_over, reduced
from cipm_ir.frontends.from_torch_table import lowers
from cipm_ir.frontends.from_torch_values import Lowering, Number, Refused, Tensor, known


def filled(b: Lowering, sizes: Sequence[int | Number], value: float, dtype: torch.dtype) -> Tensor:
    """A tensor with one value everywhere, for an affine parameter that a normalization does not have."""
    shape = [n.hint if isinstance(n, Number) else n for n in sizes]
    one = np.full(1, value, torch.empty(0, dtype=dtype).numpy().dtype) if dtype != torch.bfloat16 else None
    if one is None:
        raise Refused("a normalization without parameters in bfloat16")
    return b.op("ConstantOfShape", b.ints(sizes), value=one, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def per_channel(b: Lowering, x: Tensor, parameter: Tensor) -> Tensor:
    """A vector along axis 1."""
    return b.reshape(parameter, [-1, *[1] * (x.rank - 2)])


# ---------------------------------------------------------------- batch
def _batch_norm(
    b: Lowering, x: Tensor, affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor | None, Tensor | None], eps: float,
) -> Tensor:  # fmt: skip
    """Inference with running statistics; without them the statistics of the batch, written out."""
    weight, bias = affine
    if running[0] is None or running[1] is None:
        return _by_batch(b, x, weight, bias, eps)
    scale = weight if weight is not None else filled(b, [b.size(running[0], 0)], 1.0, running[0].dtype)
    shift = bias if bias is not None else filled(b, [b.size(running[0], 0)], 0.0, running[0].dtype)
    return b.op("BatchNormalization", x, scale, shift, *running, epsilon=float(eps), shape=x.shape)


def _by_batch(b: Lowering, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    over = [a for a in range(x.rank) if a != 1]
    centred = b.op("Sub", x, reduced(b, "ReduceMean", x, over, True), shape=x.shape)
    square = b.op("Mul", centred, centred, shape=x.shape)
    variance = reduced(b, "ReduceMean", square, over, True)
    deviation = b.op("Sqrt", b.op("Add", variance, float(eps), shape=variance.shape), shape=variance.shape)
    made = b.op("Div", centred, deviation, shape=x.shape)
    if weight is not None:
        made = b.op("Mul", made, per_channel(b, x, weight), shape=x.shape)
    return made if bias is None else b.op("Add", made, per_channel(b, x, bias), shape=x.shape)


@lowers("batch_norm", modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
def batch_norm(
    b: Lowering,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    *cudnn: bool,
) -> Tensor:
    """Also `torch.batch_norm`, told by its ninth argument: it has weight and bias first."""
    if cudnn:
        weight, bias, running_mean, running_var = running_mean, running_var, weight, bias
    return _batch_norm(b, input, (weight, bias), (running_mean, running_var), eps)


@lowers("aten.batch_norm")
def aten_batch_norm(
    b: Lowering, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any,
    momentum: Any, eps: float, *cudnn: bool,
) -> Tensor:  # fmt: skip
    return _batch_norm(b, input, (weight, bias), (running_mean, running_var), eps)
