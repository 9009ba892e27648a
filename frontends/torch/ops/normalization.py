"""Lowering of normalizations. Training mode is lowered as evaluation wherever running statistics are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.reduction import axes_input, norm_over, reduced
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Lowering, Number, Tensor, known, onnx_dtype


def filled(b: Lowering, sizes: Sequence[int | Number], value: float, dtype: torch.dtype) -> Tensor:
    """A tensor with one value everywhere, for an affine parameter that a normalization does not have."""
    shape = [n.hint if isinstance(n, Number) else n for n in sizes]
    one = np.full(1, value, onnx_dtype(dtype).numpy())
    return b.op("ConstantOfShape", b.ints(sizes), value=one, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def per_channel(b: Lowering, x: Tensor, parameter: Tensor) -> Tensor:
    """A vector along axis 1."""
    return b.reshape(parameter, [-1, *[1] * (x.rank - 2)])


# ---------------------------------------------------------------- batch
def _batch_norm(
    b: Lowering, x: Tensor, affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor | None, Tensor | None], eps: float, training: Any = False,
) -> Tensor:  # fmt: skip
    """Inference with running statistics; without them the statistics of the batch, written out.

    The latter too where the layer normalizes by the batch although the model is read in evaluation mode.
    """
    weight, bias = affine
    if running[0] is None or running[1] is None or training:
        return _by_batch(b, x, weight, bias, eps, running)
    scale = weight if weight is not None else filled(b, [b.size(running[0], 0)], 1.0, running[0].dtype)
    shift = bias if bias is not None else filled(b, [b.size(running[0], 0)], 0.0, running[0].dtype)
    return b.op("BatchNormalization", x, scale, shift, *running, epsilon=float(eps), shape=x.shape)


def _by_batch(
    b: Lowering, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    running: tuple[Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    over = [a for a in range(x.rank) if a != 1]
    mean = _beside(b, x, running[0], reduced(b, "ReduceMean", x, over, True))
    centred = b.op("Sub", x, mean, shape=x.shape)
    square = b.op("Mul", centred, centred, shape=x.shape)
    variance = _beside(b, x, running[1], reduced(b, "ReduceMean", square, over, True))
    deviation = b.op("Sqrt", b.op("Add", variance, float(eps), shape=variance.shape), shape=variance.shape)
    made = b.op("Div", centred, deviation, shape=x.shape)
    if weight is not None:
        made = b.op("Mul", made, per_channel(b, x, weight), shape=x.shape)
    return made if bias is None else b.op("Add", made, per_channel(b, x, bias), shape=x.shape)


def _beside(b: Lowering, x: Tensor, running: Tensor | None, of_batch: Tensor) -> Tensor:
    """The statistic of the batch; a running one is never chosen, but its entries go with the channels."""
    if running is None:
        return of_batch
    return b.op("Where", np.asarray(False), per_channel(b, x, running), of_batch, shape=of_batch.shape, dtype=x.dtype)


@computes("batch_norm", modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
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
    return _batch_norm(b, input, (weight, bias), (running_mean, running_var), eps, training)


@computes("aten.batch_norm")
def aten_batch_norm(
    b: Lowering, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any,
    momentum: Any, eps: float, *cudnn: bool,
) -> Tensor:  # fmt: skip
    return _batch_norm(b, input, (weight, bias), (running_mean, running_var), eps, training)


def _channel_statistics(b: Lowering, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of a batch, per channel."""
    over = [a for a in range(x.rank) if a != 1]
    centred = b.op("Sub", x, reduced(b, "ReduceMean", x, over, True), shape=x.shape)
    variance = reduced(b, "ReduceMean", b.op("Mul", centred, centred, shape=x.shape), over, False)
    return reduced(b, "ReduceMean", x, over, False), _inverse(b, variance, eps)


def _inverse(b: Lowering, variance: Tensor, eps: float) -> Tensor:
    deviation = b.op("Sqrt", b.op("Add", variance, float(eps), shape=variance.shape), shape=variance.shape)
    return b.op("Reciprocal", deviation, shape=variance.shape)


def _saved(b: Lowering, x: Tensor, eps: float) -> list[Tensor]:
    """What aten saves for the gradient: empty in evaluation."""
    if b.out[1].numel() == 0:
        return [b.const(np.zeros(0), b.out[k].dtype) for k in (1, 2)]
    return list(_channel_statistics(b, x, eps))


@computes("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def native_batch_norm(b: Lowering, input: Tensor, *given: Any) -> Any:
    """All of aten's forms: weight, bias, [running mean and variance], training, momentum, eps.

    As in evaluation: the running statistics that some forms return stay what they were.
    """
    stated = len(given) == 7
    running = (given[2], given[3]) if stated else (None, None)
    eps = float(given[-1])
    made = _batch_norm(b, input, (given[0], given[1]), running, eps, given[-3])
    results = [made, *_saved(b, input, eps)]
    for old in (r for r in running[: len(b.out) - 3] if r is not None):
        results.append(b.op("Identity", old, shape=old.shape))
    return tuple(results)


@computes("_native_batch_norm_legit_no_training")
def native_batch_norm_evaluation(
    b: Lowering, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any, eps: float
) -> Any:
    made = _batch_norm(b, input, (weight, bias), (running_mean, running_var), eps)
    return (made, *_saved(b, input, eps))


# ---------------------------------------------------------------- layer, RMS
def _last(b: Lowering, x: Tensor, normalized_shape: Any) -> tuple[int, list[int | Number]]:
    """The first normalized axis, and the sizes that the program gives from there on."""
    sizes = list(normalized_shape) if isinstance(normalized_shape, list | tuple) else [normalized_shape]
    return x.rank - len(sizes), sizes


@computes("layer_norm", modules=(nn.LayerNorm,))
def layer_norm(
    b: Lowering, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *cudnn: bool, cudnn_enable: Any = True,
) -> Tensor:  # fmt: skip
    axis, sizes = _last(b, input, normalized_shape)
    scale = weight if weight is not None else filled(b, sizes, 1.0, input.dtype)
    return b.op("LayerNormalization", input, scale, bias, axis=axis - input.rank, epsilon=float(eps), shape=input.shape)


@computes("native_layer_norm")
def native_layer_norm(b: Lowering, input: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """With mean and inverse deviation, written out so that nobody pays for them who does not read them."""
    axis, _ = _last(b, input, normalized_shape)
    over = list(range(axis, input.rank))
    mean = reduced(b, "ReduceMean", input, over, True)
    centred = b.op("Sub", input, mean, shape=input.shape)
    variance = reduced(b, "ReduceMean", b.op("Mul", centred, centred, shape=input.shape), over, True)
    return layer_norm(b, input, normalized_shape, weight, bias, eps), mean, _inverse(b, variance, eps)


@computes("rms_norm", modules=(nn.RMSNorm,))
def rms_norm(
    b: Lowering, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Without eps: the smallest step of the type at 1."""
    axis, sizes = _last(b, input, normalized_shape)
    scale = weight if weight is not None else filled(b, sizes, 1.0, input.dtype)
    small = torch.finfo(input.dtype).eps if eps is None else float(eps)
    return b.op("RMSNormalization", input, scale, axis=axis - input.rank, epsilon=small, shape=input.shape)


@computes("_fused_rms_norm")
def fused_rms_norm(b: Lowering, input: Tensor, normalized_shape: Any, weight: Any, eps: float | None) -> Any:
    axis, _ = _last(b, input, normalized_shape)
    square = b.op("Mul", input, input, shape=input.shape)
    mean = reduced(b, "ReduceMean", square, list(range(axis, input.rank)), True)
    small = torch.finfo(input.dtype).eps if eps is None else float(eps)
    return rms_norm(b, input, normalized_shape, weight, eps), _inverse(b, mean, small)


# ---------------------------------------------------------------- groups, instances, neighbours
def _channel_affine(b: Lowering, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel; where the program has none, of the input's size."""
    scale = weight if weight is not None else filled(b, [b.size(x, 1)], 1.0, x.dtype)
    return scale, bias if bias is not None else filled(b, [b.size(x, 1)], 0.0, x.dtype)


@computes("group_norm", modules=(nn.GroupNorm,))
def group_norm(
    b: Lowering, input: Tensor, num_groups: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *cudnn: bool, cudnn_enabled: Any = True,
) -> Tensor:  # fmt: skip
    scale, shift = _channel_affine(b, input, weight, bias)
    return b.op(
        "GroupNormalization", input, scale, shift,
        num_groups=int(known(num_groups)), epsilon=float(eps), shape=input.shape,
        stash_type=int(onnx_dtype(torch.float64)) if input.dtype == torch.float64 else None,
    )  # fmt: skip


@computes("native_group_norm")
def native_group_norm(
    b: Lowering, input: Tensor, weight: Any, bias: Any, N: Any, C: Any, HxW: Any, group: int, eps: float
) -> Any:
    """With mean and inverse deviation per group."""
    grouped = b.reshape(input, [b.size(input, 0), group, -1])
    mean = reduced(b, "ReduceMean", grouped, [2], True)
    centred = b.op("Sub", grouped, mean)
    variance = reduced(b, "ReduceMean", b.op("Mul", centred, centred, shape=grouped.shape), [2], False)
    flat = reduced(b, "ReduceMean", grouped, [2], False)
    return group_norm(b, input, group, weight, bias, eps), flat, _inverse(b, variance, eps)


@computes("instance_norm")
def instance_norm(
    b: Lowering, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: Any = True, momentum: Any = 0.1, eps: float = 1e-5, *cudnn: bool,
) -> Tensor:  # fmt: skip
    """Also `torch.instance_norm`, told by its ninth argument: it has weight and bias first."""
    if cudnn:
        weight, bias, running_mean, running_var = running_mean, running_var, weight, bias
    if running_mean is not None and running_var is not None:
        if use_input_stats:
            raise UnsupportedPattern("statistics of the instance beside running ones")
        return _batch_norm(b, input, (weight, bias), (running_mean, running_var), eps)
    if input.rank < 3:
        raise UnsupportedPattern("an instance normalization without space")
    scale, shift = _channel_affine(b, input, weight, bias)
    return b.op("InstanceNormalization", input, scale, shift, epsilon=float(eps), shape=input.shape)


@computes("aten.instance_norm")
def aten_instance_norm(
    b: Lowering, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: Any,
    momentum: Any, eps: float, *cudnn: bool,
) -> Tensor:  # fmt: skip
    return instance_norm(b, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@computes(modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
def instance_norm_module(
    b: Lowering, input: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, eps: float, module: Any
) -> Tensor:
    """A layer also takes a single instance without a batch axis."""
    x, had_batch = input, True
    if input.rank == module._get_no_batch_dim():
        x, had_batch = b.op("Unsqueeze", input, np.zeros(1, np.int64), shape=(1, *input.dims)), False
    made = instance_norm(b, x, running_mean, running_var, weight, bias, module.training, eps=eps)
    return made if had_batch else b.op("Squeeze", made, np.zeros(1, np.int64), shape=input.shape)


@computes("local_response_norm", modules=(nn.LocalResponseNorm,))
def local_response_norm(
    b: Lowering, input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """As torch does it: the mean of squares over ``size`` channels, more of them below where ``size`` is even."""
    if input.rank not in (3, 4):
        raise UnsupportedPattern(f"a local response normalization of {input.rank} axes")
    square = b.op("Mul", input, input, shape=input.shape)
    stacked = b.op("Unsqueeze", square, np.ones(1, np.int64), shape=(input.dims[0], 1, *input.dims[1:]))
    rest = [0] * (input.rank - 2)
    mean = b.op(
        "AveragePool", stacked, kernel_shape=[size, *(1 for _ in rest)], strides=[1] * (input.rank - 1),
        pads=[size // 2, *rest, (size - 1) // 2, *rest], count_include_pad=1, shape=stacked.shape,
    )  # fmt: skip
    mean = b.op("Squeeze", mean, np.ones(1, np.int64), shape=input.shape)
    base = b.op("Add", b.op("Mul", mean, float(alpha), shape=input.shape), float(k), shape=input.shape)
    return b.op("Div", input, b.op("Pow", base, float(beta), shape=input.shape), shape=input.shape)


@computes(modules=(nn.CrossMapLRN2d,))
def cross_map_lrn(b: Lowering, input: Tensor) -> Tensor:
    raise UnsupportedPattern("an autograd function of its own; use LocalResponseNorm")


# ---------------------------------------------------------------- by norms
@computes("normalize")
def normalize(b: Lowering, input: Tensor, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    length = norm_over(b, input, p, b.axes(input, dim), True)
    least = b.op("Max", length, float(eps), shape=length.shape)
    return b.op("Div", input, least, shape=input.shape)


@computes("_weight_norm")
def weight_norm(b: Lowering, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return _weight_norm(b, v, g, dim)[0]


@computes("_weight_norm_interface")
def weight_norm_interface(b: Lowering, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    return _weight_norm(b, v, g, dim)


def _weight_norm(b: Lowering, v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """v g / |v|, one norm for each index of an axis (-1: one in all), which g has too."""
    kept = None if dim == -1 else b.axis(v, dim)
    length = norm_over(b, v, 2, [a for a in range(v.rank) if a != kept], kept is not None)
    return b.op("Mul", v, b.op("Div", g, length), shape=v.shape), length


@computes("cosine_similarity", modules=(nn.CosineSimilarity,), inputs=2)
def cosine_similarity(b: Lowering, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    rank = max(x1.rank, x2.rank)
    back = b.axis(rank, dim) - rank
    parts = []
    for x in (x1, x2):
        if x.rank < -back:
            raise UnsupportedPattern("a cosine along an axis that one side lacks")
        length = norm_over(b, x, 2, [x.rank + back], True)
        parts.append(b.op("Div", x, b.op("Max", length, float(eps), shape=length.shape), shape=x.shape))
    return b.op("ReduceSum", b.op("Mul", *parts), axes_input(b, [back]), keepdims=0, shape=b.shape)


@computes("pairwise_distance", modules=(nn.PairwiseDistance,), inputs=2)
def pairwise_distance(
    b: Lowering, x1: Tensor, x2: Tensor, norm: Any = 2.0, eps: float = 1e-6, keepdim: bool = False, p: Any = None
) -> Tensor:
    """The norm of x1 - x2 + eps along the last axis."""
    rank = max(x1.rank, x2.rank)
    if not x1.rank or not x2.rank:
        raise UnsupportedPattern("a distance of single numbers")
    one, other = x1.dims[-1], x2.dims[-1]
    shape = (*b.shape[: rank - 1], None if one is None or other is None else max(one, other))
    gap = b.op("Add", b.op("Sub", x1, x2, shape=shape), float(eps), shape=shape)
    return norm_over(b, gap, norm if p is None else p, [rank - 1], keepdim)


@computes("cdist", "_cdist_forward")
def cdist(b: Lowering, x1: Tensor, x2: Tensor, p: Any = 2.0, compute_mode: Any = None) -> Tensor:
    """Norms of the differences of all pairs of rows."""
    width, few = x1.dims[-1], x2.dims[-2]
    first = b.op("Unsqueeze", x1, np.asarray([x1.rank - 1], np.int64), shape=(*x1.dims[:-1], 1, width))
    second = b.op("Unsqueeze", x2, np.asarray([x2.rank - 2], np.int64), shape=(*x2.dims[:-2], 1, few, width))
    gap = b.op("Sub", first, second, shape=(*b.shape, width))
    return norm_over(b, gap, p, [len(b.shape)], False)


@computes("_euclidean_dist")
def euclidean_dist(b: Lowering, x1: Tensor, x2: Tensor) -> Tensor:
    return cdist(b, x1, x2)
