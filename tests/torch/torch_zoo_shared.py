"""Parameters that lie in several places, or are computed: tied, shared, parametrized, used directly."""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, images, register, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

POINTS = floats((2, 6), scale=2.0)


@register("tied_head", "extra", "tied", inputs=tokens(37, 7))
class TiedHead(nn.Module):
    """Output head tied to the embedding table: its width is one axis, its rows stay in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 10)
        self.mlp = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 17), nn.ReLU(), nn.Linear(17, 10))
        self.head = nn.Linear(10, 37, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        return self.head(x + self.mlp(x))


@register("tied_transposed", "extra", "tied", inputs=POINTS)
class TiedTransposed(nn.Module):
    """An autoencoder whose decoder is the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 13)
        self.out_bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.out_bias)


@register("shared_storage", "extra", "tied", inputs=POINTS)
class SharedStorage(nn.Module):
    """Two parameters, one of them a transposed view of the other's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 13), nn.Linear(13, 6)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())

    def forward(self, x: Tensor) -> Any:
        return self.decoder(torch.sigmoid(self.encoder(x)))


@register("shared_module", "extra", "tied", inputs=POINTS)
class SharedModule(nn.Module):
    """One block called twice, the input of the second call made by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.head = nn.Linear(6, 11), nn.Linear(11, 5)
        self.block = nn.Sequential(nn.Linear(11, 15), nn.ReLU(), nn.Linear(15, 11))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.inlet(x))
        return self.head(self.block(torch.relu(self.block(x))))


@register("shared_branches", "extra", "tied", inputs=floats((2, 6), (2, 6)))
class SharedBranches(nn.Module):
    """Siamese: one encoder on two inputs, compared by difference and product."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.Linear(11, 9))
        self.head = nn.Linear(18, 5)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        a, b = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=-1))


@register("tied_norm", "extra", "tied", inputs=POINTS)
class TiedNorm(nn.Module):
    """Two LayerNorms that share one scale vector, of units that are otherwise apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 5)])
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.norm2.weight = self.norm1.weight

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm1(self.layers[0](x)))
        return self.layers[2](torch.relu(self.norm2(self.layers[1](x))))


@register("shared_norm", "extra", "tied", inputs=POINTS)
class SharedNorm(nn.Module):
    """One BatchNorm1d and one PReLU called at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 5)])
        self.norm, self.activation = nn.BatchNorm1d(12), nn.PReLU(12)

    def forward(self, x: Tensor) -> Any:
        x = self.activation(self.norm(self.layers[0](x)))
        return self.layers[2](self.activation(self.norm(self.layers[1](x))))


@register("inplace_residual", "extra", inputs=images(3, 12))
class InplaceResidual(nn.Module):
    """`relu_` overwrites a value that is read again: the residual is the activated value, under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 9, 3, padding=1)
        self.head = nn.Conv2d(9, 5, 1)

    def forward(self, x: Tensor) -> Any:
        before = self.conv1(x)
        after = torch.relu_(before)
        y = before + self.conv2(after)
        y.mul_(0.5).add_(after)
        return self.head(F.leaky_relu_(y, 0.1))


@register("inplace_view", "extra", inputs=POINTS)
class InplaceView(nn.Module):
    """Writes through views: a slice of the units is scaled in place, another overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.fc1(x)
        x[:, 8:].mul_(-2.0)
        part = x[:, 4:8]
        part.relu_()
        return self.fc2(x)


@register("inplace_sequential", "extra", inputs=images(3, 12))
def inplace_sequential() -> nn.Module:
    """nn.Sequential with in-place activations and in-place dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(inplace=True),
        nn.Conv2d(9, 11, 3), nn.Dropout2d(0.1, inplace=True), nn.Hardswish(inplace=True),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(11, 5),
    )  # fmt: skip


@register("direct_parameters", "extra", inputs=POINTS)
class DirectParameters(nn.Module):
    """Parameters of the module itself, whole and in slices, through F.linear, matmul and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.zeros(24, 6))
        self.packed_bias = nn.Parameter(torch.zeros(24))
        self.mixer = nn.Parameter(torch.zeros(12, 9))
        self.mixer_bias = nn.Parameter(torch.zeros(9))
        self.head = nn.ParameterDict({"weight": torch.zeros(5, 9), "bias": torch.zeros(5)})

    def forward(self, x: Tensor) -> Any:
        left = F.linear(x, self.packed[:12], self.packed_bias[:12])
        right = F.linear(x, self.packed[12:], self.packed_bias[12:])
        y = torch.addmm(self.mixer_bias, F.relu(left) * right.sigmoid(), self.mixer)
        return torch.relu(y) @ self.head["weight"].T + self.head["bias"]


@register("weight_norm", "extra", "parametrized", inputs=POINTS)
def weight_norm() -> nn.Module:
    """Linear layers with weight norm, scales away from the norms that it starts from."""
    layers = [parametrizations.weight_norm(nn.Linear(6, 12)), parametrizations.weight_norm(nn.Linear(12, 5))]
    with torch.no_grad():
        for layer in layers:
            scale = dict(layer.named_parameters())["parametrizations.weight.original0"]
            scale.mul_(1 + torch.rand(scale.shape))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@register("spectral_norm", "extra", "parametrized", inputs=images(3, 12))
def spectral_norm() -> nn.Module:
    """Convolutions with spectral norm, whose singular vectors are buffers."""
    first, second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 3)
    return nn.Sequential(parametrizations.spectral_norm(first), nn.ReLU(), parametrizations.spectral_norm(second))


@register("lora", "extra", inputs=POINTS)
class LowRank(nn.Module):
    """A frozen weight with a trained update of low rank, added to the weight and to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.base1, self.base2 = nn.Linear(6, 13), nn.Linear(13, 5)
        self.base1.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(13, 4))
        self.adapter = nn.Sequential(nn.Linear(13, 3, bias=False), nn.Linear(3, 5, bias=False))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(F.linear(x, self.base1.weight + 0.5 * (self.up @ self.down), self.base1.bias))
        return self.base2(x) + self.adapter(x)
