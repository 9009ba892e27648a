"""One tiny network for each structure that other tools get wrong: a permutation, a pruning or a crash.

Each has the structure between two layers with free units, so that a mistake there changes the output or the sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, images, register
from tests.torch.torch_zoo_cnn import CifarResNet, channel_shuffle
from tests.torch.torch_zoo_sequence import FusedAttention, HeadMajorAttention, attend
from torch import Tensor, nn
from torch.nn import functional as F

PICTURES = images(3, 14, 10)


class Around(nn.Module):
    """A convolution to `middle` channels before, one from `after` channels behind what a subclass does between."""

    def __init__(self, middle: int, after: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, middle, 3, padding=1)
        self.conv2 = nn.Conv2d(after or middle, 5, 3, padding=1)

    def between(self, x: Tensor) -> Any:
        """What happens to the channels."""
        return x

    def forward(self, x: Tensor) -> Any:
        return self.conv2(self.between(F.relu(self.conv1(x))))


@register("fail_option_a", "failure", "cnn", "resnet", inputs=images(3, 16))
def option_a() -> nn.Module:
    """Zero-padded shortcuts in the smallest ResNet of the CIFAR family."""
    return CifarResNet(width=6, depth=1)


@register("fail_channel_pad", "failure", "cnn", inputs=PICTURES)
class ChannelPad(Around):
    """Constant channels put before and behind."""

    def __init__(self) -> None:
        super().__init__(9, 12)

    def between(self, x: Tensor) -> Any:
        return F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5)


@register("fail_roll", "failure", "cnn", inputs=PICTURES)
class Roll(Around):
    """Channels moved around in a circle: every unit stays free, at another place."""

    def __init__(self) -> None:
        super().__init__(9)

    def between(self, x: Tensor) -> Any:
        return torch.roll(x, shifts=2, dims=1)


@register("fail_roll_residual", "failure", "cnn", inputs=PICTURES)
class RollResidual(Around):
    """Channels added to their neighbours: only rotations remain."""

    def __init__(self) -> None:
        super().__init__(9)

    def between(self, x: Tensor) -> Any:
        return x + torch.roll(x, 1, 1)


class AttentionNet(nn.Module):
    """Attention with a residual, and a head."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.head = attention, nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(x + self.attention(x))


@register("fail_qkv_head_major", "failure", "transformer", inputs=floats((2, 7, 14)))
def qkv_head_major() -> nn.Module:
    """Fused query, key, value as [heads, 3, size]."""
    return AttentionNet(HeadMajorAttention(14, 3, 4))


class IndexedAttention(FusedAttention):
    """Query, key and value taken by index from a permuted [3, batch, heads, length, size]."""

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = attend(qkv[0], qkv[1], qkv[2], self.head_dim)
        return self.proj(x.transpose(1, 2).flatten(2))


@register("fail_qkv_index", "failure", "transformer", inputs=floats((2, 7, 14)))
def qkv_index() -> nn.Module:
    """`qkv[0]` on the permuted tensor."""
    return AttentionNet(IndexedAttention(14, 3, 4))


@register("fail_pixel_shuffle", "failure", "cnn", "dense_output", inputs=PICTURES)
class PixelShuffle(Around):
    """Groups of four channels become one of twice the size."""

    def __init__(self) -> None:
        super().__init__(28, 7)
        self.shuffle = nn.PixelShuffle(2)

    def between(self, x: Tensor) -> Any:
        return self.shuffle(x)


@register("fail_pixel_shuffle_functional", "failure", "cnn", "dense_output", inputs=PICTURES)
class PixelShuffleFunctional(Around):
    """The same as a function, with a factor of 3."""

    def __init__(self) -> None:
        super().__init__(36, 4)

    def between(self, x: Tensor) -> Any:
        return F.pixel_shuffle(x, 3)


@register("fail_channel_shuffle", "failure", "cnn", inputs=PICTURES)
class ChannelShuffle(Around):
    """Interleaving before a grouped convolution: the group structure crosses the shuffle."""

    def __init__(self) -> None:
        super().__init__(12, 15)
        self.grouped = nn.Conv2d(12, 15, 1, groups=3)

    def between(self, x: Tensor) -> Any:
        return F.relu(self.grouped(channel_shuffle(x, 3)))


@register("fail_channel_shuffle_module", "failure", "cnn", inputs=PICTURES)
class ChannelShuffleModule(Around):
    """nn.ChannelShuffle with a residual around it."""

    def __init__(self) -> None:
        super().__init__(12)
        self.shuffle = nn.ChannelShuffle(3)

    def between(self, x: Tensor) -> Any:
        return x + self.shuffle(x)


@register("fail_grouped_view", "failure", "cnn", inputs=PICTURES)
class GroupedView(Around):
    """Channels seen as groups: normalized, and weighted within each."""

    def __init__(self) -> None:
        super().__init__(12)
        self.weight = nn.Parameter(torch.ones(1, 3, 4, 1, 1))

    def between(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w)
        x = (x - x.mean((2, 3, 4), keepdim=True)) * self.weight
        return x.view(b, c, h, w)


@register("fail_grouped_gate", "failure", "cnn", inputs=PICTURES)
class GroupedGate(Around):
    """One gate for each group of channels, softmax over the groups (as in ResNeSt and SKNet)."""

    def __init__(self) -> None:
        super().__init__(12, 4)
        self.gate = nn.Linear(4, 12)

    def between(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w)
        gate = self.gate(x.sum(1).mean((2, 3))).view(b, 3, c // 3, 1, 1).softmax(1)
        return (x * gate).sum(1)


@register("fail_broadcast_mask", "failure", "cnn", inputs=PICTURES)
class BroadcastMask(Around):
    """A mask with one channel on all channels: that one is no unit of the others."""

    def __init__(self) -> None:
        super().__init__(9)
        self.mask = nn.Conv2d(9, 1, 3, padding=1)

    def between(self, x: Tensor) -> Any:
        return x * torch.sigmoid(self.mask(x))


@register("fail_batch_norm", "failure", "cnn", inputs=PICTURES)
class BatchNormNet(Around):
    """Two batch norms in a row of layers: their statistics move with the units."""

    def __init__(self) -> None:
        super().__init__(9, 11)
        self.bn1, self.bn2 = nn.BatchNorm2d(9), nn.BatchNorm2d(11)
        self.inner = nn.Conv2d(9, 11, 3, padding=1, bias=False)

    def between(self, x: Tensor) -> Any:
        return F.relu(self.bn2(self.inner(self.bn1(x))))


@register("fail_flatten", "failure", "cnn", inputs=PICTURES)
class FlattenNet(nn.Module):
    """Channels × height × width into a Linear, by nn.Flatten, twice in a row of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.fc1, self.fc2 = nn.Linear(8 * 6 * 4, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(self.features(x))))


@register("fail_flatten_view", "failure", "cnn", inputs=PICTURES)
class FlattenView(FlattenNet):
    """The same by view with a literal size, behind a batch norm on the flattened axis."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2))
        self.bn = nn.BatchNorm1d(192)

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.features(x).view(-1, 192))
        return self.fc2(F.relu(self.fc1(x)))
