"""Small nets that the tests of saving write and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.torch.torch_zoo_base import seeded
from torch import Tensor, nn

import cipm_ir

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        return y


class Tied(nn.Module):
    """Two layers that share their weight, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.b(torch.relu(self.a(torch.relu(self.first(x)))))))
        return y


class OnlyTwelve(nn.Module):
    """Its forward runs with twelve units only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        y: Tensor = self.fc2(h.view(-1, 12) + torch.zeros(12))
        return y


def net(kind: Callable[[], nn.Module] = ConvNet) -> Any:
    return seeded(kind)


def pruned(kind: Callable[[], nn.Module] = ConvNet, x: Tensor = IMAGES) -> cipm_ir.Result:
    return cipm_ir.optimize(net(kind), "prune{macs=0.6}", example_inputs=(x,))


def close(a: Tensor, b: Tensor, bound: float = 2e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= bound * float(a.abs().max())


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
