"""A small MobileNetV2 (Sandler et al. 2018) trained on scikit-learn's digits: some seconds, once per machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

Array = NDArray[Any]
EPOCHS, BATCH, SEED = 25, 64, 0
BLOCKS = ((16, 4, 1), (16, 4, 1), (24, 4, 2), (24, 4, 1), (32, 4, 1), (32, 4, 1))
"""Width, expansion and stride of each inverted residual."""


def digits() -> tuple[Array, Array, Array, Array]:
    """Training images, test images, their labels; split as examples/digits/train.py does."""
    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    split = train_test_split(scaled, labels, test_size=0.25, random_state=0, stratify=labels)
    return split[0], split[1], split[2], split[3]


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its batch normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Inverted(nn.Module):
    """Expand, depthwise, project; a shortcut where sizes agree."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        inner = inputs * expand
        layers = [*conv_norm(inputs, inner, 1), activation(), *conv_norm(inner, inner, 3, stride, inner), activation()]
        self.layers = nn.Sequential(*layers, *conv_norm(inner, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """Stem, inverted residuals, a last 1x1 convolution, pooling and a linear read-out: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_norm(1, 16, 3), activation()]
        width = 16
        for outputs, expand, stride in BLOCKS:
            layers.append(Inverted(width, outputs, expand, stride, activation))
            width = outputs
        self.features = nn.Sequential(*layers, *conv_norm(width, 96, 1), activation())
        self.classifier = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The ten logits of each image."""
        made: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return made


def moved(images: Tensor) -> Tensor:
    """Images shifted and zoomed a little."""
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1.0 + (torch.rand(len(images)) - 0.5) * 0.2
    matrix[:, :, 2] = (torch.rand(len(images), 2) - 0.5) * 0.3
    return functional.grid_sample(
        images, functional.affine_grid(matrix, list(images.shape), False), align_corners=False
    )


def trained(activation: type[nn.Module]) -> MobileNet:
    """The network after training; the same for the same torch build."""
    torch.manual_seed(SEED)
    images, _, labels, _ = digits()
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    model = MobileNet(activation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.02)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for start in range(0, len(x), BATCH):
            index = order[start : start + BATCH]
            loss = functional.cross_entropy(model(moved(x[index])), y[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def exported(activation: type[nn.Module]) -> Path:
    """The trained network as ONNX, dynamic batch, input "images"; kept in CIPM_TEST_CACHE or the temporary folder."""
    root = os.environ.get("CIPM_TEST_CACHE") or Path(tempfile.gettempdir()) / f"cipm-zoo-{os.getuid()}"
    target = Path(root) / f"mobilenet-{activation.__name__.lower()}-{importlib.metadata.version('torch')}.onnx"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    model = trained(activation)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partial = Path(folder) / "model.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                model,
                (torch.zeros(2, 1, 8, 8),),
                partial,
                dynamo=True,
                opset_version=20,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=False,
            )
        os.replace(partial, target)
    return target
