"""Plain MLPs, one for each activation of torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, register
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (6, 12, 9, 5)
POINTS = floats((2, WIDTHS[0]), scale=3.0)

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
    "elu": partial(nn.ELU, 0.7),
    "selu": nn.SELU,
    "celu": partial(nn.CELU, 1.3),
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": partial(nn.Softplus, beta=2.0),
    "softsign": nn.Softsign,
    "softshrink": partial(nn.Softshrink, 0.2),
    "hardshrink": partial(nn.Hardshrink, 0.3),
    "tanhshrink": nn.Tanhshrink,
    "threshold": partial(nn.Threshold, 0.1, 0.3),
    "hardtanh": partial(nn.Hardtanh, -0.5, 0.7),
    "hardtanh_odd": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "log_sigmoid": nn.LogSigmoid,
    "softmax": partial(nn.Softmax, dim=-1),
    "log_softmax": partial(nn.LogSoftmax, dim=1),
    "softmin": partial(nn.Softmin, dim=-1),
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "alpha_dropout": nn.AlphaDropout,
}


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    """Three layers with an activation of its own after each of the first two."""
    first, second, third, last = WIDTHS
    return nn.Sequential(
        nn.Linear(first, second), activation(), nn.Linear(second, third), activation(), nn.Linear(third, last)
    )


for _name, _activation in ACTIVATIONS.items():
    register(f"mlp_{_name}", "mlp", inputs=POINTS)(partial(mlp, _activation))


@register("mlp_prelu_channels", "mlp", inputs=POINTS)
def prelu_channels() -> nn.Module:
    """PReLU with one slope per unit, which moves with the units."""
    return nn.Sequential(nn.Linear(6, 12), nn.PReLU(12), nn.Linear(12, 9), nn.PReLU(9), nn.Linear(9, 5))


@register("mlp_glu", "mlp", inputs=POINTS)
def glu() -> nn.Module:
    """GLU: the second half of the units gates the first."""
    return nn.Sequential(nn.Linear(6, 24), nn.GLU(), nn.Linear(12, 18), nn.GLU(dim=-1), nn.Linear(9, 5))


@register("mlp_dropout_between", "mlp", inputs=POINTS)
def dropout_between() -> nn.Module:
    """Dropout around activations, and a Flatten that flattens nothing."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 9), nn.Dropout(0.2), nn.Tanh(),
        nn.Linear(9, 5),
    )  # fmt: skip


@register("mlp_dict", "mlp", inputs=POINTS)
class ContainerMLP(nn.Module):
    """Layers and activations kept in ModuleList and ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 5, bias=False)])
        self.activations = nn.ModuleDict({"first": nn.ReLU(), "second": nn.SiLU()})

    def forward(self, x: Tensor) -> Any:
        x = self.activations["first"](self.layers[0](x))
        return self.layers[2](self.activations["second"](self.layers[1](x)))


@register("mlp_functional", "mlp", inputs=POINTS)
class FunctionalMLP(nn.Module):
    """Activations as functions, methods, in place and by operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9 if i else 6, 9) for i in range(7))
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        layers = self.layers
        x = F.relu(layers[0](x))
        x = F.gelu(layers[1](x), approximate="tanh")
        x = torch.sigmoid(layers[2](x)) * 2.0
        x = layers[3](x).tanh()
        x = F.leaky_relu(layers[4](x), negative_slope=0.3)
        x = layers[5](x).clamp(min=0.0, max=1.5)
        x = -F.silu(layers[6](x), inplace=True) + 1
        return self.head(x / 2 - 0.1)


@register("mlp_gated", "mlp", inputs=POINTS)
class GatedMLP(nn.Module):
    """A gated feed-forward block with residual and LayerNorm, as in today's language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.gate = nn.Linear(6, 14, bias=False)
        self.up = nn.Linear(6, 14, bias=False)
        self.down = nn.Linear(14, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))
