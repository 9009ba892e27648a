"""Uses of layers, pooling, padding, normalizations and reductions: what the frontend lowers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LINE, IMAGE, VOLUME = (2, 4, 9), (2, 4, 8, 8), (2, 4, 6, 6, 6)
ROWS, BLOCK = (5, 4), (2, 3, 6)
Case = tuple[Any, ...]
"""A module or a function, then the shapes of its inputs."""

CONVOLUTIONS: dict[str, Case] = {
    "1d": (nn.Conv1d(4, 6, 3, 2, 1, 2), LINE),
    "3d groups": (nn.Conv3d(4, 6, 3, groups=2), VOLUME),
    "same, even kernel": (nn.Conv2d(4, 6, 4, padding="same"), IMAGE),
    "same, dilated": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), IMAGE),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), IMAGE),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE),
    "reflect": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="reflect"), IMAGE),
    "replicate, same": (nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"), IMAGE),
    "circular 1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), LINE),
    "no batch": (nn.Conv2d(4, 6, 3), IMAGE[1:]),
    "function, same": (lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, (6, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), LINE),
    "transposed 2d groups": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), IMAGE),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 3, 2, dilation=2), VOLUME),
    "transposed, no batch": (nn.ConvTranspose2d(4, 6, 3), IMAGE[1:]),
    "transposed function": (lambda x, w: F.conv_transpose2d(x, w, None, 2, 0, 1, 1), IMAGE, (4, 5, 3, 3)),
    "aten": (lambda x, w: torch.convolution(x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1), IMAGE, (6, 4, 3, 3)),
    "aten transposed": (
        lambda x, w: torch.ops.aten.convolution(x, w, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 2),
        IMAGE, (4, 3, 3, 3),
    ),
}  # fmt: skip

POOLS: dict[str, Case] = {
    "max 1d": (nn.MaxPool1d(3, 2, 1), LINE),
    "max 3d": (nn.MaxPool3d(2), VOLUME),
    "max, ceil": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "max, last window starts in the padding": (nn.MaxPool1d(2, 4, 1, ceil_mode=True), (1, 2, 8)),
    "max, dilated": (nn.MaxPool2d(2, 1, dilation=2), IMAGE),
    "max, indices": (nn.MaxPool2d(3, 2, 1, return_indices=True), IMAGE),
    "max, indices, no batch": (nn.MaxPool2d(2, return_indices=True), IMAGE[1:]),
    "max, function with indices": (lambda x: F.max_pool1d(x, 2, return_indices=True), LINE),
    "max, function": (lambda x: F.max_pool2d(x, 2, 2) + torch.max_pool2d(x, 2), IMAGE),
    "average 1d": (nn.AvgPool1d(3, 2, 1), LINE),
    "average without padding": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "average, ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), IMAGE),
    "average, ceil, padding": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "average, ceil, without padding": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    "average, divisor": (nn.AvgPool2d(3, 2, 1, divisor_override=5), IMAGE),
    "average 3d": (nn.AvgPool3d(2, 2), VOLUME),
    "average, no batch": (nn.AvgPool2d(2), IMAGE[1:]),
    "adaptive 1d": (nn.AdaptiveAvgPool1d(3), LINE),
    "adaptive, one axis": (nn.AdaptiveAvgPool2d((2, None)), IMAGE),
    "adaptive, whole axis": (nn.AdaptiveAvgPool2d((1, None)), IMAGE),
    "adaptive, whole and part": (nn.AdaptiveAvgPool2d((1, 4)), IMAGE),
    "adaptive 3d": (nn.AdaptiveAvgPool3d(1), VOLUME),
    "adaptive, no batch": (nn.AdaptiveAvgPool2d(1), IMAGE[1:]),
    "adaptive, nothing to do": (nn.AdaptiveAvgPool2d(8), IMAGE),
    "adaptive max 1d": (nn.AdaptiveMaxPool1d(1), LINE),
    "adaptive max, indices": (nn.AdaptiveMaxPool2d((2, 1), return_indices=True), IMAGE),
    "adaptive max, index": (lambda x: F.adaptive_max_pool2d(x, 1, return_indices=True), IMAGE),
    "adaptive function": (lambda x: F.adaptive_avg_pool2d(x, (1, 1)) + F.adaptive_max_pool2d(x, (2, 4)).mean(), IMAGE),
    "norm of order 2": (nn.LPPool2d(2, 2), IMAGE),
    "norm of order 1": (nn.LPPool1d(1, 3, 2), LINE),
    "norm of order 4": (nn.LPPool2d(4, 3, 2), IMAGE),
}

PADS: dict[str, Case] = {
    "one axis": (lambda x: F.pad(x, (1, 2)), IMAGE),
    "a value": (lambda x: F.pad(x, (1, 2, 3, 0), value=1.5), IMAGE),
    "minus infinity": (lambda x: F.max_pool2d(F.pad(x, (1, 1), value=-float("inf")), 2), IMAGE),
    "channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), IMAGE),
    "negative": (lambda x: F.pad(x, (-1, 2, 0, -2)), IMAGE),
    "negative channels": (lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), IMAGE),
    "by a size": (lambda x: F.pad(x, (0, x.size(1) - 2)), IMAGE),
    "reflect": (lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"), IMAGE),
    "replicate": (lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"), IMAGE),
    "circular": (lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), IMAGE),
    "integers": (lambda x: F.pad((x > 0).long(), (1, 1), value=3), ROWS),
    "zero module": (nn.ZeroPad2d((1, 2, 3, -1)), IMAGE),
    "zero module 3d": (nn.ZeroPad3d(1), VOLUME),
    "constant module": (nn.ConstantPad1d(2, 3.0), LINE),
    "reflection module": (nn.ReflectionPad2d(2), IMAGE),
    "reflection module 3d": (nn.ReflectionPad3d(1), VOLUME),
    "replication module": (nn.ReplicationPad1d((1, 0)), LINE),
    "circular module": (nn.CircularPad2d(1), IMAGE),
}

RESAMPLING: dict[str, Case] = {
    "nearest": (nn.Upsample(scale_factor=2), IMAGE),
    "nearest 1d": (nn.Upsample(scale_factor=2), LINE),
    "nearest 3d": (nn.UpsamplingNearest2d(scale_factor=3), IMAGE),
    "nearest to the size of another": (lambda x, y: F.interpolate(x, size=y.shape[2:]), IMAGE, (1, 1, 16, 4)),
    "nearest, down": (lambda x: F.interpolate(x, scale_factor=0.5), IMAGE),
    "nearest-exact, down": (lambda x: F.interpolate(x, size=(5, 3), mode="nearest-exact"), IMAGE),
    "linear": (nn.Upsample(scale_factor=2, mode="linear"), LINE),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "bilinear, corners": (nn.Upsample(size=(13, 15), mode="bilinear", align_corners=True), IMAGE),
    "bilinear module": (nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    "bilinear to the size of another": (
        lambda x, y: F.interpolate(x, size=y.shape[2:], mode="bilinear"), IMAGE, (1, 1, 17, 5)
    ),
    "bilinear, fractions": (lambda x: F.interpolate(x, scale_factor=(1.3, 1.7), mode="bilinear"), IMAGE),
    "bilinear, recomputed": (
        lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear", recompute_scale_factor=True), IMAGE
    ),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True), VOLUME),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE),
    "bicubic, down": (lambda x: F.interpolate(x, size=(5, 6), mode="bicubic", align_corners=True), IMAGE),
    "area": (lambda x: F.interpolate(x, size=(4, 2), mode="area"), IMAGE),
    "pixel shuffle": (nn.PixelShuffle(2), IMAGE),
    "pixel shuffle, no batch": (lambda x: F.pixel_shuffle(x, 2), IMAGE[1:]),
    "pixel unshuffle": (nn.PixelUnshuffle(2), IMAGE),
    "pixel unshuffle, no batch": (lambda x: F.pixel_unshuffle(x, 4), IMAGE[1:]),
    "channel shuffle": (nn.ChannelShuffle(2), IMAGE),
    "channel shuffle function": (lambda x: torch.native_channel_shuffle(F.channel_shuffle(x, 2), 4), IMAGE),
}  # fmt: skip

_FIRST, _SECOND = torch.full((4,), 0.5), torch.full((4,), 2.0)

NORMALIZATIONS: dict[str, Case] = {
    "batch, rows": (nn.BatchNorm1d(4), ROWS),
    "batch 1d": (nn.BatchNorm1d(4), LINE),
    "batch 2d": (nn.BatchNorm2d(4), IMAGE),
    "batch 3d": (nn.BatchNorm3d(4), VOLUME),
    "batch, synchronized": (nn.SyncBatchNorm(4), IMAGE),
    "batch, not affine": (nn.BatchNorm2d(4, affine=False), IMAGE),
    "batch, no statistics": (nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "batch, functional": (lambda x: F.batch_norm(x, _FIRST, _SECOND, _SECOND), IMAGE),
    "batch, torch": (lambda x: torch.batch_norm(x, _SECOND, _FIRST, _FIRST, _SECOND, False, 0.1, 1e-5, False), IMAGE),
    "batch, native": (
        lambda x: torch.native_batch_norm(x, None, None, _FIRST, _SECOND, False, 0.1, 1e-5)[0], IMAGE
    ),
    "batch, legit": (
        lambda x: torch.ops.aten._native_batch_norm_legit_no_training(x, None, None, _FIRST, _SECOND, 0.1, 1e-5)[0],
        IMAGE,
    ),
    "batch, legit without statistics": (
        lambda x: torch.ops.aten._native_batch_norm_legit.no_stats(x, _FIRST, None, True, 0.1, 1e-5), IMAGE
    ),
    "layer": (nn.LayerNorm(8), IMAGE),
    "layer, two axes, no bias": (nn.LayerNorm((8, 8), bias=False), IMAGE),
    "layer, not affine": (nn.LayerNorm(8, elementwise_affine=False), IMAGE),
    "layer, functional": (lambda x: F.layer_norm(x, x.shape[2:]) + torch.layer_norm(x, (8,)), IMAGE),
    "layer, native": (lambda x: torch.native_layer_norm(x, [8], None, None, 1e-5), IMAGE),
    "group": (nn.GroupNorm(2, 4), IMAGE),
    "group, not affine": (nn.GroupNorm(4, 4, affine=False), LINE),
    "group, native": (lambda x: torch.native_group_norm(x, None, None, 2, 4, 64, 2, 1e-5), IMAGE),
    "instance": (nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance, statistics": (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE),
    "instance, no batch": (nn.InstanceNorm1d(4), LINE[1:]),
    "instance, functional": (lambda x: F.instance_norm(x), VOLUME),
    "rms": (nn.RMSNorm(8), IMAGE),
    "rms, not affine": (nn.RMSNorm(8, elementwise_affine=False, eps=1e-3), IMAGE),
    "rms, fused": (lambda x: torch.ops.aten._fused_rms_norm(x, [8], None, 1e-5), IMAGE),
    "local response": (nn.LocalResponseNorm(3, alpha=0.1), IMAGE),
    "local response, even": (lambda x: F.local_response_norm(x, 2, alpha=0.3), LINE),
    "normalize": (lambda x: F.normalize(x, dim=1) + F.normalize(x, p=1, dim=2) + F.normalize(x, 3.0, -1), IMAGE),
    "cosine": (nn.CosineSimilarity(), ROWS, ROWS),
    "cosine, broadcast": (lambda x, y: F.cosine_similarity(x, y, dim=-1), IMAGE, (4, 1, 8)),
    "distance": (nn.PairwiseDistance(), ROWS, ROWS),
    "distance, order 1": (lambda x, y: F.pairwise_distance(x, y, p=1, keepdim=True), ROWS, (1, 4)),
    "weight norm": (lambda v, g: torch._weight_norm(v, g, 0), (4, 3, 3), (4, 1, 1)),
    "weight norm of all": (lambda v, g: torch._weight_norm(v, g, -1), (4, 3, 3), ()),
}  # fmt: skip

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": lambda x: (x.mean(), torch.mean(x, [1, 2], keepdim=True), x.mean(dim=-1, dtype=torch.float64)),
    "sum": lambda x: (x.sum(), x.sum(axis=1, keepdims=True), torch.sum(x, (0, 1)), (x > 0).sum(1)),
    "prod": lambda x: (torch.prod(x), x.prod(1)),
    "extrema": lambda x: (x.amax((1, 2)), torch.amin(x, -1, True), x.max(), torch.max(x, x * 2), x.min(other=-x)),
    "extrema with positions": lambda x: (torch.max(x, 1), x.max(dim=-1, keepdim=True), torch.min(x, 0)[1]),
    "extrema of integers": lambda x: (x * 10).to(torch.int64).max(1),
    "both extrema": lambda x: torch.aminmax(x, dim=1),
    "positions": lambda x: (x.argmax(), torch.argmax(x, 1, keepdim=True), x.argmin(keepdim=True), x.argmin(dim=-1)),
    "var": lambda x: (x.var(), x.var(False), torch.var(x, 1), x.var(1, False), x.var(-1, unbiased=False, keepdim=True)),
    "var, correction": lambda x: torch.var(x, dim=(1, 2), correction=0, keepdim=True),
    "std": lambda x: (x.std(), x.std(1), torch.std(x, (0, 1), True, True)),
    "var and mean": lambda x: (torch.var_mean(x, 1), torch.std_mean(x, dim=1, keepdim=True, correction=2)),
    "norm": lambda x: (x.norm(), x.norm(p=1, dim=1), torch.norm(x, dim=(1, 2), keepdim=True), torch.norm(x, 3, 1)),
    "vector norm": lambda x: (torch.linalg.vector_norm(x, float("inf"), 1), torch.linalg.vector_norm(x, 0, 1)),
    "linalg norm": lambda x: (torch.linalg.norm(x), torch.linalg.norm(x, dim=1), torch.linalg.norm(x, dim=(1, 2))),
    "matrix norm": lambda x: (torch.linalg.matrix_norm(x), torch.norm(x, -float("inf"))),
    "logsumexp": lambda x: (torch.logsumexp(x, 1), x.logsumexp((1, 2), keepdim=True)),
    "cumsum": lambda x: (x.cumsum(1), torch.cumsum(x, dim=-1, dtype=torch.float64), (x > 0).cumsum(1)),
    "softmax": lambda x: (x.softmax(-1), F.softmax(x, 1, dtype=torch.float64), torch.softmax(x, 0), F.softmin(x, 1)),
    "log softmax": lambda x: (F.log_softmax(x, 1), x.log_softmax(1)),
    "all": lambda x: ((x > 0).all(), torch.all(x > 0, 1)),
    "any": lambda x: ((x > 1).any(-1, keepdim=True), x.any()),
    "top k": lambda x: (x.topk(2), torch.topk(x, 2, 1, False)),
    "sort": lambda x: (x.sort(), torch.sort(x, 1, True), torch.sort(x, dim=1, stable=True, descending=True)),
    "argsort": lambda x: (x.argsort(1), torch.argsort(x, -1, descending=True)),
    "count": lambda x: (torch.count_nonzero(x > 0), x.count_nonzero(1)),
}  # fmt: skip

SOFTMAX = {m.__class__.__name__: (m, IMAGE) for m in (nn.Softmax(1), nn.LogSoftmax(-1), nn.Softmin(1), nn.Softmax2d())}

CASES: dict[str, Case] = {
    f"{family}: {name}": case
    for family, cases in (
        ("convolution", CONVOLUTIONS), ("pool", POOLS), ("pad", PADS), ("resampling", RESAMPLING), ("module", SOFTMAX),
        ("normalization", NORMALIZATIONS), ("reduction", {k: (f, BLOCK) for k, f in REDUCTIONS.items()}),
    )
    for name, case in cases.items()
}  # fmt: skip

REFUSED: dict[str, Case] = {
    "windows of several widths": (nn.AdaptiveAvgPool2d(3), IMAGE),
    "norm of odd order": (nn.LPPool2d(3, 2), IMAGE),
    "divisor and ceil": (nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=2), IMAGE),
    "columns": (nn.Unfold(2), IMAGE),
    "columns, function": (lambda x: F.unfold(x, 2), IMAGE),
    "neighbours across maps": (nn.CrossMapLRN2d(3), IMAGE),
    "antialiasing": (lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True), IMAGE),
    "no order": (lambda x: torch.topk(x, 2, sorted=False), BLOCK),
    "spectral norm": (lambda x: torch.linalg.norm(x, 2, dim=(1, 2)), BLOCK),
    "a given result": (lambda x: torch.amax(x, 1, out=x.new_empty(2, 6)), BLOCK),
    "reduction of truth values": (lambda x: (x > 0).amax(1), BLOCK),
}
