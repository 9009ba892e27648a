"""Torch models of real size with random weights, and how Torch-Pruning is told to read each of them.

The convolutional networks are written with torch.nn alone; the transformers come from the transformers library, which
is imported when one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode with its example inputs, and what its peer has to be told.

    Attributes:
        module: the model; `nn.Module`.
        inputs: positional arguments of its forward.
        ignored: layers that the peer leaves alone: the output layer.
        heads: for the peer: number of heads of every projection to queries, keys and values.
        whole_heads: for the peer: take whole heads away instead of their dimensions, as rotary embeddings need it.
        traces: whether `torch.fx` tracing works.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    ignored: list[nn.Module]
    heads: dict[nn.Module, int] = field(default_factory=dict)
    whole_heads: bool = False
    traces: bool = False


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut (He et al. 2016; stride on the 3x3)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        made: Tensor = self.relu(y)
        return made


class ResNet50(nn.Module):
    """ResNet-50: 3, 4, 6 and 3 bottlenecks, 25.6 million parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        stages, channels = [], 64
        for k, depth in enumerate((3, 4, 6, 3)):
            width, blocks = 64 << k, []
            for j in range(depth):
                blocks.append(Bottleneck(channels, width, 2 if k and not j else 1))
                channels = 4 * width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.fc(torch.flatten(self.pool(self.stages(self.stem(x))), 1))
        return made


class DenseLayer(nn.Module):
    """Adds 32 channels that are computed from all channels before."""

    def __init__(self, channels: int, growth: int = 32) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, parts: list[Tensor]) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(torch.cat(parts, 1))))
        made: Tensor = self.conv2(self.relu2(self.norm2(y)))
        return made


class DenseBlock(nn.Module):
    """Layers each of which reads the outputs of all before."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(channels + 32 * k) for k in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts))
        return torch.cat(parts, 1)


class DenseNet121(nn.Module):
    """DenseNet-121 (Huang et al. 2017): growth 32, 6, 12, 24 and 16 layers, 8.0 million parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        channels = 64
        for depth in (6, 12, 24, 16):
            parts.append(DenseBlock(channels, depth))
            channels += 32 * depth
            parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if depth != 16:
                parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(x), 1), 1))
        return made


class Field(nn.Module):
    """A model of the transformers library that returns one tensor of its output."""

    def __init__(self, model: nn.Module, name: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.name, self.fixed = model, name, fixed

    def forward(self, x: Tensor) -> Any:
        return self.model(x, **self.fixed)[self.name]


def resnet50() -> Case:
    """1 x 3 x 224 x 224."""
    module = ResNet50()
    return Case(module, (torch.randn(1, 3, 224, 224),), [module.fc], traces=True)


def densenet121() -> Case:
    """1 x 3 x 224 x 224."""
    module = DenseNet121()
    return Case(module, (torch.randn(1, 3, 224, 224),), [module.classifier], traces=True)


def vit_base() -> Case:
    """ViT-B/16 (Dosovitskiy et al. 2021), 1 x 3 x 224 x 224."""
    from transformers import ViTConfig, ViTForImageClassification

    labels: dict[str, Any] = {"num_labels": 1000}
    model = ViTForImageClassification(ViTConfig(**labels))
    return Case(Field(model, "logits"), (torch.randn(1, 3, 224, 224),), [model.classifier], _heads(model, 12))


def bert_base() -> Case:
    """BERT-base (Devlin et al. 2019), 1 x 128 tokens."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig())
    return Case(Field(model, "pooler_output"), (_tokens(30522),), [model.get_submodule("pooler")], _heads(model, 12))


def llama_small() -> Case:
    """A Llama of 12 layers and width 768, 12 heads of 64, 1 x 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, intermediate_size=2048
    )
    model = LlamaForCausalLM(config)
    module, heads = Field(model, "logits", use_cache=False), _heads(model, 12)
    return Case(module, (_tokens(32000),), [model.lm_head], heads, whole_heads=True)


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-50": resnet50,
    "DenseNet-121": densenet121,
    "ViT-B/16": vit_base,
    "BERT-base": bert_base,
    "Llama 12 x 768": llama_small,
}


def build(name: str) -> Case:
    """A model with seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    case = CASES[name]()
    case.module.eval()
    return case


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, 128))


def _heads(model: nn.Module, heads: int) -> dict[nn.Module, int]:
    """Projections to queries, keys and values, by their names in the library."""
    projections = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
    return {m: heads for name, m in model.named_modules() if name.rpartition(".")[2] in projections}
