"""Small convolution nets: batch norm, depthwise, squeeze and excitation, U-Net, ConvNeXt, a detection head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), *([] if act is None else [act]))


class Residual(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(a, b, 3, stride, act=nn.ReLU()), conv(b, b))
        self.short = conv(a, b, 1, stride) if stride > 1 or a != b else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """Expansion, depthwise, squeeze and excitation, projection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        inner = 3 * size
        self.expand = conv(size, inner, 1, act=nn.Hardswish())
        self.depth = conv(inner, inner, 3, groups=inner, act=nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 8, 1), nn.ReLU(), nn.Conv2d(8, inner, 1))
        self.project = conv(inner, size, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.depth(self.expand(x))
        return x + self.project(y * F.hardsigmoid(self.squeeze(y)))


class UNet(nn.Module):
    """Skips, a transposed convolution, and a sigmoid whose bias saturates it, as a detector of rare things has it."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.down, self.low = conv(3, 12, act=nn.ReLU()), conv(12, 24, 3, 2, act=nn.ReLU())
        self.up, self.join = nn.ConvTranspose2d(24, 12, 2, 2), conv(24, 12, act=nn.ReLU())
        self.out, self.bias = nn.Conv2d(12, 1, 1), bias

    def forward(self, x: Tensor) -> Any:
        y = self.down(x)
        z = self.join(torch.cat([y, self.up(self.low(y))], 1))
        return torch.sigmoid(self.out(z) + self.bias)


class NextBlock(nn.Module):
    """ConvNeXt: layer norm over channels, a small layer scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(size, size, 7, padding=3, groups=size), nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.gain = nn.Parameter(torch.full((size,), 0.05))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.gain * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Boxes(nn.Module):
    """A detection head: boxes in pixels beside scores between 0 and 1, in one output of seven rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16, 3, 2, act=nn.SiLU()), Residual(16, 16, 1), conv(16, 16, act=nn.SiLU()))
        self.box, self.score = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        boxes = F.softplus(self.box(y)).flatten(2) * 320
        return torch.cat([boxes, torch.sigmoid(self.score(y) - 6).flatten(2)], 1)


class Heads(nn.Module):
    """Global pooling and two layers; logits, or probabilities from a softmax."""

    def __init__(self, body: nn.Module, size: int, probabilities: bool) -> None:
        super().__init__()
        self.body, self.hidden, self.out = body, nn.Linear(size, 32), nn.Linear(32, 10)
        self.probabilities = probabilities

    def forward(self, x: Tensor) -> Any:
        y = self.out(torch.relu(self.hidden(self.body(x).mean((2, 3)))))
        return y.softmax(-1) if self.probabilities else y
