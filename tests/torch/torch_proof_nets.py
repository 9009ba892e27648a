"""Small modules that once came back as something else than the verified program, each with the inputs that hid it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEAR = 1e-4
"""Of the largest value of a channel: the programs are the same, but BLAS chooses kernels by size."""


def real_inputs(like: Tensor) -> list[Tensor]:
    """Inputs of several magnitudes, that are not the example."""
    if not like.is_floating_point():
        return [like.max() - like, torch.zeros_like(like), like.flip(0)]
    torch.manual_seed(7)
    return [s * torch.randn_like(like) for s in (1e-2, 1.0, 1e2)] + [torch.zeros_like(like)]


def apart(a: Any, b: Any) -> float:
    """The largest difference in any channel (last axis and axis 1), relative to its largest value there."""
    worst = 0.0
    leaves = torch.utils._pytree.tree_leaves
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.shape == y.shape and torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x[x.isinf()], y[y.isinf()])
        x, y = (z.double().nan_to_num(0, 0, 0) for z in (x, y))
        for axis in (1, x.ndim - 1):
            over = [k for k in range(x.ndim) if k != axis]
            worst = max(worst, float(((x - y).abs().amax(over) / x.abs().amax(over).clamp_min(1e-6)).max()))
    return worst


def runs(module: Any, inputs: Sequence[Tensor]) -> list[Any]:
    """What a copy of the module computes in evaluation mode, on each of several inputs."""
    module = copy.deepcopy(module).eval()
    with torch.no_grad():
        return [module(x) for x in inputs]


def run(module: Any, x: Tensor) -> Any:
    return runs(module, [x])[0]


class Attention(nn.Module):
    """Self-attention that divides by a size it reads off a shape (``scale``) or keeps as a number (``"kept"``)."""

    def __init__(self, scale: str = "shape") -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = 3, 4, scale
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(12, 5)
        self.kept = 4**-0.5

    def forward(self, x: Tensor) -> Any:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.scale == "shape":
            q = q / math.sqrt(q.size(-1)) if isinstance(q.size(-1), int) else q / q.size(-1) ** 0.5
        elif self.scale == "heads":
            q = q / q.size(1)
        else:
            q = q * self.kept
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, -1))


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and DETR: statistics and gains are buffers, used in arithmetic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(width) + 0.5)
        self.register_buffer("bias", torch.randn(width))
        self.register_buffer("running_mean", torch.randn(width))
        self.register_buffer("running_var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)  # type: ignore[operator]
        mean, var = self.running_mean.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)  # type: ignore[operator]
        scale = weight * (var + 1e-5).rsqrt()
        result: Tensor = x * scale + (bias - mean * scale)
        return result


class Detector(nn.Module):
    """Boxes in pixels beside scores below 1, in one tensor and apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        boxes, scores = 1e5 * self.boxes(h), torch.sigmoid(self.norm(self.scores(h))) / 100
        return torch.cat([boxes, scores], 1), scores


class Masked(nn.Module):
    """Minus infinity (or NaN) where a mask says so, beside finite numbers that must be right."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.first, self.norm, self.last = nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.last(torch.relu(self.norm(self.first(x))))
        if math.isnan(self.value):
            return torch.cat([torch.sqrt(-1 - y[:, :1].abs()), y[:, 1:]], 1)
        return y.masked_fill(torch.tensor([True, False, False, False]), self.value)


class Branches(nn.Module):
    """Code that takes another way where its layers are narrow, or have no bias."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.first, self.last = nn.Linear(6, 10, bias=by != "bias"), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        if self.by == "width" and self.first.weight.shape[0] < 10:
            h = 2 * h
        if self.by == "attribute" and self.first.out_features < 10:
            h = h + 1
        if self.by == "bias" and self.first.bias is not None:
            h = -h
        return self.last(h)


class Tokens(nn.Module):
    """An embedding in front of a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(11, 6), nn.Linear(6, 10, bias=False)
        self.norm, self.last = nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Any:
        return self.last(torch.relu(self.norm(self.first(self.table(ids)))))


class Shared(nn.Module):
    """One layer in two places, and two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 6)
        self.twice = self.inner
        self.last.weight = nn.Parameter(torch.randn(6, 10))
        self.head = nn.Linear(10, 6, bias=False)
        self.head.weight = self.last.weight

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.twice(torch.relu(self.inner(torch.relu(self.first(x))))))
        return self.last(h) + self.head(h)


class Counted(nn.Module):
    """Functional dropout and normalization, by the mode of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        h = F.dropout(torch.relu(self.first(x)), 0.3, self.training)
        h = F.batch_norm(
            h, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, self.training
        )
        return self.last(h) if self.training else 2 * self.last(h)


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3)
    )


def frozen() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A module in evaluation mode, its statistics and gains unlike fresh ones, some of its units constant."""
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for one in module.modules():
            if isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d):
                one.running_mean.normal_()  # type: ignore[union-attr]
                one.running_var.uniform_(0.3, 4)  # type: ignore[union-attr]
                one.weight.normal_()
                one.bias.normal_()
        first = next((m for m in module.modules() if isinstance(m, nn.Linear) and m.bias is not None), None)
        if first is not None and first.out_features == 10:
            first.weight[:3], first.bias[:3] = 0, 1.0
    return module.eval()


IMAGE, ROWS, WORDS = torch.randn(2, 3, 8, 8), torch.randn(5, 6), torch.randint(0, 11, (5,))
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (conv_net, IMAGE),
    "mlp": (mlp, ROWS),
    "frozen": (frozen, IMAGE),
    "detector": (Detector, IMAGE),
    "minus infinity": (lambda: Masked(-math.inf), ROWS),
    "not a number": (lambda: Masked(math.nan), ROWS),
    "tokens": (Tokens, WORDS),
    "shared": (Shared, ROWS),
    "functional": (Counted, ROWS),
    "branches by width": (lambda: Branches("width"), ROWS),
    "branches by attribute": (lambda: Branches("attribute"), ROWS),
    "branches by bias": (lambda: Branches("bias"), ROWS),
    "attention, scale of shape": (Attention, torch.randn(2, 7, 8)),
    "attention, scale by heads": (lambda: Attention("heads"), torch.randn(2, 7, 8)),
    "attention, scale kept": (lambda: Attention("kept"), torch.randn(2, 7, 8)),
}
EXAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "pixels x 1e4": lambda x: (255e4 * torch.rand(x.shape)).to(x.dtype) if x.is_floating_point() else x,
}
