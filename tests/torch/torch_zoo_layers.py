"""Layers and tensor functions beyond the common ones: norms, pooling, resampling, layout, indexing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tests.torch.torch_zoo_base import BATCH, SEED, floats, images, register, tokens
from torch import Tensor, nn
from torch.nn import functional as F

PICTURES = images(3, 14, 10)
POINTS = floats((2, 6), scale=2.0)


class Between(nn.Module):
    """A convolution to 12 channels, one layer, a convolution from `after` channels."""

    def __init__(self, layer: nn.Module, after: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.layer = layer
        self.conv2 = nn.Conv2d(after, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv2(self.layer(self.conv1(x)))


def between(layer: Callable[[], nn.Module]) -> nn.Module:
    """The network around a new layer that keeps the number of channels."""
    return Between(layer())


BETWEEN: Mapping[str, Callable[[], nn.Module]] = {
    "group_norm": partial(nn.GroupNorm, 3, 12),
    "instance_norm": partial(nn.InstanceNorm2d, 12, affine=True),
    "instance_norm_plain": partial(nn.InstanceNorm2d, 12),
    "instance_norm_tracked": partial(nn.InstanceNorm2d, 12, affine=True, track_running_stats=True),
    "local_response_norm": partial(nn.LocalResponseNorm, 3, alpha=0.5, k=1.0),
    "batch_norm_no_statistics": partial(nn.BatchNorm2d, 12, track_running_stats=False),
    "batch_norm_no_affine": partial(nn.BatchNorm2d, 12, affine=False),
    "layer_norm_chw": partial(nn.LayerNorm, [12, 14, 10]),
    "softmax2d": nn.Softmax2d,
    "dropout2d": nn.Dropout2d,
    "prelu_conv": partial(nn.PReLU, 12),
    "upsample_nearest": partial(nn.Upsample, scale_factor=2),
    "upsample_bilinear": partial(nn.Upsample, scale_factor=1.5, mode="bilinear"),
    "upsample_bicubic": partial(nn.Upsample, size=(15, 16), mode="bicubic", align_corners=True),
    "adaptive_avg_pool": partial(nn.AdaptiveAvgPool2d, 2),
    "adaptive_max_pool": partial(nn.AdaptiveMaxPool2d, (3, 2)),
    "max_pool_ceil": partial(nn.MaxPool2d, 3, 2, ceil_mode=True),
    "avg_pool_uncounted": partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False),
    "lp_pool": partial(nn.LPPool2d, 2, 2),
    "zero_pad": partial(nn.ZeroPad2d, (1, 2, 0, 3)),
    "reflection_pad": partial(nn.ReflectionPad2d, 2),
    "replication_pad": partial(nn.ReplicationPad2d, (1, 0, 2, 1)),
}

for _name, _layer in BETWEEN.items():
    register(_name, "extra", "layer", inputs=PICTURES)(partial(between, _layer))


@register("pixel_unshuffle", "extra", "layer", inputs=PICTURES)
def pixel_unshuffle() -> nn.Module:
    """Pixels become channels."""
    return Between(nn.PixelUnshuffle(2), 48)


@register("rms_norm", "extra", "layer", inputs=POINTS)
def rms_norm() -> nn.Module:
    """RMSNorm between Linear layers."""
    return nn.Sequential(nn.Linear(6, 12), nn.RMSNorm(12, eps=1e-6), nn.Linear(12, 5))


@register("bilinear", "extra", "layer", inputs=floats((2, 6), (2, 7)))
class BilinearNet(nn.Module):
    """nn.Bilinear of two hidden vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 10), nn.Linear(7, 9)
        self.bilinear, self.head = nn.Bilinear(10, 9, 8), nn.Linear(8, 5)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return self.head(torch.tanh(self.bilinear(torch.relu(self.left(left)), torch.relu(self.right(right)))))


@register("embedding_bag", "extra", "layer", inputs=tokens(37, 7))
class EmbeddingBagNet(nn.Module):
    """Means of embeddings, bags as rows and as offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.flat = nn.EmbeddingBag(37, 10), nn.EmbeddingBag(37, 10, mode="sum")
        self.register_buffer("offsets", torch.tensor([0, 5]))
        self.fc1, self.fc2 = nn.Linear(20, 13), nn.Linear(13, 5)

    def forward(self, ids: Tensor) -> Any:
        x = torch.cat([self.rows(ids), self.flat(ids.flatten(), self.offsets)], dim=1)
        return self.fc2(torch.relu(self.fc1(x)))


@register("max_pool_indices", "extra", "layer", inputs=PICTURES)
class MaxPoolIndices(nn.Module):
    """Max pooling with indices, undone by unpooling (SegNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 9, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.head = nn.Conv2d(9, 5, 1)

    def forward(self, x: Tensor) -> Any:
        pooled, indices = self.pool(self.conv1(x))
        return self.head(self.unpool(torch.relu(self.conv2(pooled)), indices))


@register("reductions", "extra", "layout", inputs=PICTURES)
class Reductions(nn.Module):
    """Mean, maximum, norm, spread over space; a softmax-weighted sum over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.score = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 1, 1)
        self.heads = nn.ModuleList(nn.Linear(9, 5) for _ in range(5))

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        weights = self.score(x).flatten(2).softmax(-1)
        y = self.heads[0](x.mean((2, 3))) + self.heads[1](x.amax(dim=(2, 3)))
        y = y + self.heads[2](x.flatten(2).norm(dim=2)) + self.heads[3](x.std((2, 3)))
        return y + self.heads[4]((x.flatten(2) * weights).sum(-1))


@register("stack_unbind", "extra", "layout", inputs=floats((2, 4, 6)))
class StackUnbind(nn.Module):
    """stack, unbind, select, roll over positions, repeat_interleave, repeat, flip, cumsum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        first, second, third, fourth = torch.unbind(x, dim=1)
        x = torch.stack([second, first + third, fourth.neg(), x.select(1, 0)], dim=1)
        x = self.fc2(x).roll(1, dims=1).flip(1)
        x = torch.repeat_interleave(x, 2, dim=1) + x.repeat(1, 2, 1).cumsum(1)
        return self.head(torch.cat([x, x.tanh()], dim=-1))


@register("units_repeated", "extra", "layout", inputs=POINTS)
class UnitsRepeated(nn.Module):
    """repeat, repeat_interleave, tile and flip on the units themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(21, 8), nn.Linear(16, 9), nn.Linear(9, 5)])

    def forward(self, x: Tensor) -> Any:
        x = self.layers[0](x).tanh().repeat(1, 3)
        x = self.layers[1](x).tanh().repeat_interleave(2, dim=1)
        return self.layers[3](self.layers[2](x).tanh().flip(-1))


@register("units_sliced", "extra", "layout", inputs=POINTS)
class UnitsSliced(nn.Module):
    """Units taken apart by slice, narrow, select, split with sizes and index lists, and put together otherwise."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 0, 2, 2]))
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 12), nn.Linear(14, 11), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        parts = [x[:, 8:], x.narrow(1, 0, 3), x[:, 5].unsqueeze(1), x[:, ::6], x[:, self.order]]
        x = torch.relu(self.fc2(torch.cat(parts, dim=1)))
        small, middle, large = torch.split(x, [2, 4, 5], dim=-1)
        small = torch.index_select(small, 1, torch.tensor([1, 0, 1, 0, 1]))
        return self.fc3(large - small) + middle


@register("masking", "extra", "layout", inputs=POINTS)
class Masking(nn.Module):
    """where, masked_fill, clamp by tensors, maximum, comparisons, and a constant mask over the units."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 5)
        self.register_buffer("kept", torch.arange(12) % 3 != 0)

    def forward(self, x: Tensor) -> Any:
        x = self.fc1(x)
        x = torch.where(x > 0.2, x, -0.3 * x).masked_fill(~self.kept, 0.0)
        y = self.fc2(x)
        y = torch.maximum(y, y.square() - 1.0)
        return self.head(y.masked_fill(y < -0.5, -0.5))


@register("normalize", "extra", "layout", inputs=floats((2, 7, 6)))
class Normalize(nn.Module):
    """F.normalize, cosine similarity, F.layer_norm without and F.rms_norm with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 5)
        self.scale = nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Any:
        x = self.fc2(F.layer_norm(F.normalize(self.fc1(x), dim=-1), (12,)))
        x = F.rms_norm(x, (9,), self.scale, 1e-5)
        return self.head(x) + F.cosine_similarity(x, x.roll(1, 1), dim=-1).unsqueeze(-1)


@register("bmm_units", "extra", "layout", inputs=floats((2, 7, 6)))
class BilinearPooling(nn.Module):
    """Two sets of units multiplied with each other (outer products), flattened into a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 9)
        self.head = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Any:
        left, right = torch.relu(self.left(x)), torch.tanh(self.right(x))
        outer = torch.bmm(left.transpose(1, 2), right) / 7
        return self.head(outer.view(outer.size(0), -1))


@register("mixer", "extra", "layout", inputs=images(3, 12))
class Mixer(nn.Module):
    """Token and channel mixing by transposition: positions are units, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 14, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(14), nn.LayerNorm(14)
        self.tokens = nn.Sequential(nn.Linear(9, 11), nn.GELU(), nn.Linear(11, 9))
        self.channels = nn.Sequential(nn.Linear(14, 23), nn.GELU(), nn.Linear(23, 14))
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).mT).mT
        return self.head((x + self.channels(self.norm2(x))).mean(1))


@register("spatial_functions", "extra", "layout", inputs=PICTURES)
class SpatialFunctions(nn.Module):
    """interpolate to a tensor's size, unfold and fold, spatial roll (shifted windows), window partition by view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 10, 3, padding=1)
        self.mix, self.head = nn.Linear(10 * 6, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Any:
        small = torch.relu(self.conv1(x))
        x = F.interpolate(small, size=(12, 10), mode="bilinear", align_corners=False)
        x = torch.relu(self.conv2(x)).roll((-1, -1), (2, 3))
        windows = F.unfold(x, (3, 2), stride=(3, 2)).transpose(1, 2)
        return self.head(torch.relu(self.mix(windows)))


def _named_inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(SEED + 1)
    return (torch.randn(BATCH, 6, generator=generator),), {"extra": torch.randn(BATCH, 4, generator=generator)}


@register("nested_outputs", "extra", "layout", inputs=_named_inputs)
class NestedOutputs(nn.Module):
    """A keyword input, an optional one that is not given, and outputs in a dict with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 10), nn.Linear(14, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, extra: Tensor, absent: Tensor | None = None) -> dict[str, Any]:
        first = torch.relu(self.fc1(x))
        second = torch.relu(self.fc2(torch.cat([first, extra], dim=-1)))
        return {"logits": self.fc3(second), "hidden": [first, second]}


@register("keyword_only_input", "extra", "layout", inputs=_named_inputs, symbolic=False)
class KeywordOnlyInput(NestedOutputs):
    """An input by keyword only behind one with a default, for which fx writes a faulty signature."""

    def forward(self, x: Tensor, absent: Tensor | None = None, *, extra: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return super().forward(x, extra, absent)
