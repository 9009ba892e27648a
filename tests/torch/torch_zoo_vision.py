"""Vision networks with branches: U-Net, YOLO's C2f, squeeze-excitation, ConvNeXt; convolutions of other ranks."""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, images, register
from tests.torch.torch_zoo_cnn import conv_norm
from torch import Tensor, nn
from torch.nn import functional as F


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3×3 convolutions with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


@register("unet", "cnn", "dense_output", inputs=images(3, 32))
class UNet(nn.Module):
    """Two levels: max pooling down, transposed convolutions up, skips joined by concat."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double_conv(3, 6), double_conv(6, 10), double_conv(10, 18)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(18, 9, 2, stride=2)
        self.join2 = double_conv(19, 10)
        self.up1 = nn.ConvTranspose2d(10, 7, 4, stride=2, padding=1)
        self.join1 = double_conv(13, 8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        x = self.up2(self.bottom(self.pool(second)))
        x = self.up1(self.join2(torch.cat([second, x], dim=1)))
        return self.out(self.join1(torch.cat([first, x], dim=1)))


class ConvSiLU(nn.Module):
    """YOLO's convolution: conv, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    """Two 3×3 convolutions with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvSiLU(channels, channels, 3), ConvSiLU(channels, channels, 3)

    def forward(self, x: Tensor) -> Any:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Chunk in two, a chain of bottlenecks on the second half, concat of all of them."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1 = ConvSiLU(inputs, 2 * self.c)
        self.cv2 = ConvSiLU((2 + count) * self.c, outputs)
        self.m = nn.ModuleList(YoloBottleneck(self.c) for _ in range(count))

    def forward(self, x: Tensor) -> Any:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2fSplit(C2f):
    """The same with split and indexing, which symbolic tracing follows."""

    def forward(self, x: Tensor) -> Any:
        halves = self.cv1(x).split((self.c, self.c), 1)
        y = [halves[0], halves[1]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Max pooling in a chain, all stages concatenated."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvSiLU(channels, inner), ConvSiLU(4 * inner, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Any:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class YoloNet(nn.Module):
    """Two C2f stages, SPPF, an upsampled neck and heads at two scales."""

    def __init__(self, block: type[C2f]) -> None:
        super().__init__()
        self.stem = ConvSiLU(3, 8, 3, 2)
        self.stage1 = nn.Sequential(ConvSiLU(8, 12, 3, 2), block(12, 12, 2))
        self.stage2 = nn.Sequential(ConvSiLU(12, 20, 3, 2), block(20, 20, 1), SPPF(20, 7))
        self.upsample = nn.Upsample(None, 2, "nearest")
        self.neck = block(32, 14, 1)
        self.heads = nn.ModuleList([nn.Conv2d(14, 9, 1), nn.Conv2d(20, 9, 1)])

    def forward(self, x: Tensor) -> Any:
        fine = self.stage1(self.stem(x))
        coarse = self.stage2(fine)
        merged = self.neck(torch.cat([self.upsample(coarse), fine], 1))
        scales = [self.heads[0](merged), self.heads[1](coarse)]
        return torch.cat([scale.view(scale.shape[0], 9, -1) for scale in scales], 2)


@register("yolo_c2f", "cnn", "dense_output", inputs=images(3, 32), symbolic=False)
def yolo_c2f() -> nn.Module:
    """With the list of chunks as Ultralytics writes it."""
    return YoloNet(C2f)


@register("yolo_c2f_split", "cnn", "dense_output", inputs=images(3, 32))
def yolo_c2f_split() -> nn.Module:
    """With split and indexing."""
    return YoloNet(C2fSplit)


@register("squeeze_excitation", "cnn", inputs=images(3, 16))
class SqueezeExcitationNet(nn.Module):
    """One squeeze-excitation block with Linear layers and a gate seen through view and expand_as."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(3, 14)
        self.fc = nn.Sequential(
            nn.Linear(14, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 14, bias=False), nn.Sigmoid()
        )
        self.head = nn.Conv2d(14, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv(x))
        b, c, _, _ = x.size()
        gate = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return self.head(x * gate.expand_as(x)).mean((2, 3))


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over the channels of an image, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Any:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, LayerNorm and MLP with the channels last, layer scale, residual."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Any:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


@register("convnext", "cnn", inputs=images(3, 32))
class ConvNeXt(nn.Module):
    """A patch stem, two stages with a strided convolution between, LayerNorm head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 10, 4, stride=4), ChannelsFirstNorm(10))
        self.stage1 = nn.Sequential(ConvNeXtBlock(10, 34), ConvNeXtBlock(10, 34))
        self.down = nn.Sequential(ChannelsFirstNorm(10), nn.Conv2d(10, 18, 2, stride=2))
        self.stage2 = ConvNeXtBlock(18, 44)
        self.norm = nn.LayerNorm(18, eps=1e-6)
        self.head = nn.Linear(18, 11)

    def forward(self, x: Tensor) -> Any:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


@register("conv1d_net", "cnn", "extra", inputs=floats((2, 5, 23)))
class Conv1dNet(nn.Module):
    """Dilated and grouped 1-D convolutions with a gated activation, as in audio models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(5, 12, 3, padding=2, dilation=2)
        self.bn = nn.BatchNorm1d(12)
        self.conv2 = nn.Conv1d(12, 18, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose1d(9, 8, 3, stride=2)
        self.pool = nn.AvgPool1d(2)
        self.head = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.bn(self.conv1(x)), 0.1)
        x = F.glu(self.conv2(x), dim=1)
        return self.head(self.pool(torch.tanh(self.up(x))))


@register("conv3d_net", "cnn", "extra", inputs=floats((2, 2, 6, 8, 10)))
class Conv3dNet(nn.Module):
    """3-D convolutions with batch norm, pooling and a Linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(6, 9, (1, 3, 3), padding=(0, 1, 1)), nn.ELU(), nn.ConvTranspose3d(9, 7, 2), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


@register("conv_modes", "cnn", "extra", inputs=images(4, 18))
class ConvModes(nn.Module):
    """Padding modes, "same" padding, depth multiplier 2, and a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(8, 8, 4, padding="same")
        self.multiplied = nn.Conv2d(8, 16, 3, groups=8)
        self.up = nn.ConvTranspose2d(16, 10, 3, stride=2, groups=2, output_padding=1)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.circular(F.relu(self.reflect(x))))
        x = F.relu(self.multiplied(F.relu(self.same(x))))
        return self.head(F.relu(self.up(x)))


@register("functional_conv", "cnn", "extra", inputs=images(3, 14))
class FunctionalConv(nn.Module):
    """Parameters and statistics that the module holds itself, used through F.conv2d, F.batch_norm and F.linear."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(12, 3, 3, 3))
        self.kernel_bias = nn.Parameter(torch.zeros(12))
        self.second = nn.Parameter(torch.zeros(8, 6, 3, 3))
        self.head = nn.Parameter(torch.zeros(5, 8))
        self.scale, self.shift_bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))
        self.register_buffer("running_mean", torch.zeros(12))
        self.register_buffer("running_var", torch.ones(12))

    def forward(self, x: Tensor) -> Any:
        x = F.conv2d(x, self.kernel, self.kernel_bias, padding=1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.scale, self.shift_bias)
        x = F.conv2d(F.relu(x), self.second, stride=2, groups=2)
        return F.linear(F.relu(x).amax((2, 3)), self.head)
