"""Small audio nets: log-mel bands, dilated convolutions, recurrent layers, a mask, a speech encoder."""

from __future__ import annotations

from typing import Any

import torch
from tests.benchmarks.detection_convolutions import conv
from tests.benchmarks.detection_transformers import WIDTH, Attention, Block, feed_forward, layer_norm
from torch import Tensor, nn
from torch.nn import functional as F


class LogMel(nn.Module):
    """Windowed Fourier transform by a convolution, mel bands, log(x + 1e-10), and a small net."""

    fourier: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        size, bands = 64, 12
        n = torch.arange(size)
        angle = 2 * torch.pi * n * torch.arange(size // 2 + 1)[:, None] / size
        window = torch.hann_window(size)
        self.register_buffer("fourier", torch.cat([angle.cos() * window, -angle.sin() * window])[:, None])
        centre = torch.linspace(1, size // 2, bands)[:, None]
        self.register_buffer("mel", torch.relu(1 - (torch.arange(size // 2 + 1) - centre).abs() / 4))
        self.norm = nn.BatchNorm1d(bands)
        self.net = nn.Sequential(
            nn.Conv1d(bands, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1), nn.ReLU()
        )
        self.out = nn.Linear(24, 5)

    def forward(self, wave: Tensor) -> Any:
        spectrum = F.conv1d(wave[:, None], self.fourier, stride=32)
        real, imaginary = spectrum.chunk(2, 1)
        power = real**2 + imaginary**2
        logs = torch.log(self.mel @ power + 1e-10)
        return torch.sigmoid(self.out(self.net(self.norm(logs)).mean(-1)))


class Temporal(nn.Module):
    """Dilated one-dimensional convolutions with residuals and PReLU, as separators of speech have them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(1, 16, 16, 8), nn.ConvTranspose1d(16, 1, 16, 8)
        self.norms = nn.ModuleList(nn.GroupNorm(1, 32) for _ in range(3))
        self.into = nn.ModuleList(nn.Conv1d(16, 32, 1) for _ in range(3))
        self.depth = nn.ModuleList(nn.Conv1d(32, 32, 3, padding=2**k, dilation=2**k, groups=32) for k in range(3))
        self.back, self.slopes = nn.ModuleList(nn.Conv1d(32, 16, 1) for _ in range(3)), nn.PReLU(32, 0.2)

    def forward(self, wave: Tensor) -> Any:
        start = torch.relu(self.encode(wave))
        x = start
        for k in range(3):
            y = self.slopes(self.norms[k](self.into[k](x)))
            x = x + self.back[k](self.depth[k](y))
        return self.decode(start * torch.sigmoid(x))


class Recurrent(nn.Module):
    """Convolutions over a spectrogram, then a recurrent layer; one vector for each step."""

    def __init__(self, layer: nn.RNNBase, size: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(1, 8, 3, act=nn.ReLU()), nn.MaxPool2d((2, 1)), conv(8, 12, 3, act=nn.ReLU()))
        self.layer, self.out, self.activation = layer, nn.Linear(size, 7), activation

    def forward(self, spectrogram: Tensor) -> Any:
        y = self.conv(spectrogram[:, None]).flatten(1, 2).transpose(1, 2)
        y = self.out(self.layer(y)[0])
        return y.log_softmax(-1) if self.activation == "log_softmax" else torch.sigmoid(y)


class Masked(nn.Module):
    """A mask for a spectrogram, from a recurrent layer: large and small bins side by side in the output."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(2, -6, 20))
        self.into, self.layer, self.out = nn.Linear(20, 24), nn.GRU(24, 24, batch_first=True), nn.Linear(24, 20)

    def forward(self, magnitude: Tensor) -> Any:
        x = magnitude.abs() * torch.exp(self.mean)
        y = self.layer(torch.tanh(self.into(torch.log1p(x))))[0]
        return x * torch.sigmoid(self.out(y))


class Speech(nn.Module):
    """Strided convolutions with group norm and GELU over a wave, then a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 16, 10, 5, bias=False), nn.GroupNorm(16, 16)
        self.second, self.project = nn.Conv1d(16, 16, 3, 2, bias=False), nn.Linear(16, WIDTH)
        self.block, self.middle, self.out = (
            Block(Attention(), feed_forward(), layer_norm, False),
            nn.LayerNorm(16),
            nn.Linear(WIDTH, 8),
        )

    def forward(self, wave: Tensor) -> Any:
        x = F.gelu(self.second(F.gelu(self.norm(self.first(wave[:, None])))))
        return self.out(self.block(self.project(self.middle(x.transpose(1, 2)))))
