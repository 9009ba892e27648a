"""Small image classifiers in the manner of the well-known families."""

from __future__ import annotations

import os
import unittest
from pathlib import Path
from typing import Any

import torch
from tests.torch.torch_zoo_base import images, register, register_as_built
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the image size at stride 1, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class PadShortcut(nn.Module):
    """The parameter-free shortcut ("option A"): every second pixel, zero channels on both sides."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class CifarBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a residual."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut((outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6·`depth`+2 layers with option-A shortcuts, under the published parameter names."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, depth, 1)
        self.layer2 = self._stage(width, 2 * width, depth, 2)
        self.layer3 = self._stage(2 * width, 4 * width, depth, 2)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
        later = (CifarBlock(outputs, outputs, 1) for _ in range(depth - 1))
        return nn.Sequential(CifarBlock(inputs, outputs, stride), *later)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


@register("resnet20_random", "cnn", "resnet", inputs=images(3, 16))
def resnet20_random() -> nn.Module:
    """ResNet-20 at half width on small images."""
    return CifarResNet(width=8)


@register_as_built("cifar_resnet20", "cnn", "resnet", "trained", "data", inputs=images(3, 32))
def cifar_resnet20() -> nn.Module:
    """The trained ResNet-20 from $CIPM_TEST_DATA/cifar10; raises unittest.SkipTest, which pytest takes for a skip."""
    folder = os.environ.get("CIPM_TEST_DATA")
    path = Path(folder or "") / "cifar10" / "resnet20.safetensors"
    if not folder or not path.is_file():
        raise unittest.SkipTest("CIPM_TEST_DATA does not name the folder with cifar10/resnet20.safetensors")
    from safetensors.torch import load_file

    model = CifarResNet()
    faults = model.load_state_dict(load_file(path), strict=False)
    missing = [name for name in faults.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or faults.unexpected_keys:
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {faults.unexpected_keys}")
    return model


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with batch norm; a projection where the sizes differ."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        plain = stride == 1 and inputs == outputs
        self.downsample = None if plain else conv_norm(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


@register("resnet_bottleneck", "cnn", "resnet", inputs=images(3, 32))
class BottleneckResNet(nn.Module):
    """A 7×7 stem with max pooling and two stages of bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 12, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.layer1 = nn.Sequential(Bottleneck(12, 8, 20, 1), Bottleneck(20, 8, 20, 1))
        self.layer2 = nn.Sequential(Bottleneck(20, 14, 28, 2), Bottleneck(28, 14, 28, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(28, 11)

    def forward(self, x: Tensor) -> Any:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; a residual where the sizes agree."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.use_residual = stride == 1 and inputs == outputs
        widen = [conv_norm(inputs, inner, 1), nn.ReLU6(inplace=True)] if expand > 1 else []
        self.conv = nn.Sequential(
            *widen,
            conv_norm(inner, inner, stride=stride, groups=inner),
            nn.ReLU6(inplace=True),
            conv_norm(inner, outputs, 1),
        )

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x) if self.use_residual else self.conv(x)


@register("mobilenet_v2", "cnn", inputs=images(3, 32))
class MobileNetV2(nn.Module):
    """Inverted residuals with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 8, stride=2), nn.ReLU6(inplace=True),
            InvertedResidual(8, 6, 1, 1), InvertedResidual(6, 10, 3, 2), InvertedResidual(10, 10, 3, 1),
            conv_norm(10, 26, 1), nn.ReLU6(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(26, 11))

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x).mean([2, 3]))


class SqueezeExcitation(nn.Module):
    """Channel gates computed from the channel means by two 1×1 convolutions."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Any:
        scale = self.fc2(F.relu(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


class MobileBlockV3(nn.Module):
    """Inverted residual with squeeze-excitation and hardswish."""

    def __init__(self, inputs: int, inner: int, outputs: int, size: int, stride: int) -> None:
        super().__init__()
        self.use_residual = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            conv_norm(inputs, inner, 1), nn.Hardswish(),
            conv_norm(inner, inner, size, stride=stride, groups=inner), nn.Hardswish(),
            SqueezeExcitation(inner, 5), conv_norm(inner, outputs, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        result = self.block(x)
        if self.use_residual:
            result += x
        return result


@register("mobilenet_v3", "cnn", inputs=images(3, 32))
class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze-excitation and hardswish, and a two-layer head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 8, stride=2), nn.Hardswish(inplace=True),
            MobileBlockV3(8, 18, 10, 5, 2), MobileBlockV3(10, 22, 10, 3, 1),
            conv_norm(10, 26, 1), nn.Hardswish(inplace=True),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(26, 17), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(17, 11))

    def forward(self, x: Tensor) -> Any:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseLayer(nn.Module):
    """Norm, ReLU, 1×1, norm, ReLU, 3×3 on all that came before."""

    def __init__(self, inputs: int, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Any:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.Module):
    """Layers that each read the concatenation of all outputs before."""

    def __init__(self, inputs: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + i * growth, 13, growth) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


@register("densenet", "cnn", inputs=images(3, 32))
class DenseNet(nn.Module):
    """Two dense blocks with a transition between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 10, 3, 2, 1, bias=False)
        self.block1 = DenseBlock(10, 6, 3)
        self.transition = nn.Sequential(
            nn.BatchNorm2d(28), nn.ReLU(inplace=True), nn.Conv2d(28, 14, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = DenseBlock(14, 6, 2)
        self.norm5 = nn.BatchNorm2d(26)
        self.classifier = nn.Linear(26, 11)

    def forward(self, x: Tensor) -> Any:
        x = self.norm5(self.block2(self.transition(self.block1(self.conv0(x)))))
        x = F.adaptive_avg_pool2d(F.relu(x, inplace=True), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal groups."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    """Half of the channels pass unchanged, half through a branch; then both are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_norm(half, half, 1), nn.ReLU(inplace=True),
            conv_norm(half, half, groups=half), conv_norm(half, half, 1), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((kept, self.branch(changed)), dim=1), 2)


@register("shufflenet", "cnn", inputs=images(3, 32))
class ShuffleNet(nn.Module):
    """Channel split, concat and shuffle, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(conv_norm(3, 20, stride=2), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage = nn.Sequential(ShuffleBlock(20), ShuffleBlock(20))
        self.conv5 = nn.Sequential(conv_norm(20, 26, 1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(26, 11)

    def forward(self, x: Tensor) -> Any:
        x = self.conv5(self.stage(self.maxpool(self.conv1(x))))
        return self.fc(x.mean([2, 3]))
