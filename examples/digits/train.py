"""Train the digit classifier of the demo and write it as digits.onnx beside this file.

Needs torch and scikit-learn; takes about a minute on two cores. The demo itself needs neither training nor torch:
it reads the committed digits.onnx and recomputes the same test split.

    python examples/digits/train.py
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

MODEL_PATH = Path(__file__).with_name("digits.onnx")
SEED = 0
EPOCHS = 60
BATCH = 64
OPSET = 20


class ConvNorm(nn.Module):
    """A 3x3 convolution without bias, followed by batch normalization."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return self.norm(self.conv(x))


class Residual(nn.Module):
    """Two convolutions around an inner width, added to their input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.widen = ConvNorm(width, inner)
        self.narrow = ConvNorm(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [N, width, H, W]."""
        return functional.relu(x + self.narrow(functional.relu(self.widen(x))))


class DigitNet(nn.Module):
    """Stem, two residual blocks, a strided convolution, pooling and a linear read-out: [N, 1, 8, 8] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32)
        self.block1 = Residual(32, 48)
        self.block2 = Residual(32, 48)
        self.down = ConvNorm(32, 64, stride=2)
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(64 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = functional.relu(self.stem(images))
        x = functional.relu(self.down(self.block2(self.block1(x))))
        return self.classifier(torch.flatten(self.pool(x), 1))


def load_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images as float32 [N, 1, 8, 8] in 0..1 and labels: train images, test images, train labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(scaled, labels, test_size=0.25, random_state=0, stratify=labels)
    return train_x, test_x, train_y, test_y


def jitter(images: Tensor) -> Tensor:
    """Turn, scale and shift each image a little, so that 1347 images are enough to train on."""
    count = images.shape[0]
    angle = (torch.rand(count) - 0.5) * 0.4
    zoom = 1.0 + (torch.rand(count) - 0.5) * 0.2
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle) * zoom
    matrix[:, 0, 1] = -torch.sin(angle) * zoom
    matrix[:, 1, 0] = torch.sin(angle) * zoom
    matrix[:, :, 2] = (torch.rand(count, 2) - 0.5) * 0.35
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor) -> DigitNet:
    """Fit a DigitNet to the training split, the same one for the same seed and torch build."""
    torch.manual_seed(SEED)
    model = DigitNet().train()
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(images)).split(BATCH):
            loss = functional.cross_entropy(model(jitter(images[index])), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3d}: loss {total / len(images):.4f}")
    return model.eval()


def tidy(model: ir.Model, leaves: set[str]) -> None:
    """Fold constants, drop the exporter's zero biases and traces of this machine, and name values after their modules.

    The exporter's own optimizer would fold the batch normalizations away too; the demo wants to show that step.
    """
    fold_constants(model)
    for node in model.graph:
        bias = ir.convenience.get_const_tensor(node.inputs[2]) if node.op_type == "Conv" else None
        if bias is not None and not bias.numpy().any():
            node.resize_inputs(2)
    RemoveUnusedNodesPass()(model)
    used: Counter[str] = Counter()
    for node in model.graph:
        name = value_name(node, leaves)
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.name = node.name
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "digits"


def value_name(node: ir.Node, leaves: set[str]) -> str:
    """The module that a node came from; with the operator where the module holds more than one, as in block1.relu."""
    module = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])[-2]
    if module in leaves:
        return str(module)
    # Nodes that the exporter adds for the batch size belong to no module; their scope starts with an underscore.
    return node.op_type.lower() if not module or module.startswith("_") else f"{module}.{node.op_type.lower()}"


def export(model: DigitNet, path: Path) -> None:
    """Write the model with its batch normalizations as nodes, a dynamic batch axis and all weights inside the file."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        optimize=False,
        verbose=False,
    )
    assert program is not None
    tidy(program.model, {name for name, module in model.named_modules() if not list(module.children())})
    program.save(str(path), external_data=False)


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of images that onnxruntime classifies correctly with the model in this file."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {"images": images})[0])
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def main() -> None:
    """Train, export, check the file and print its test accuracy."""
    train_x, test_x, train_y, test_y = load_split()
    model = train(torch.from_numpy(train_x), torch.from_numpy(train_y).long())
    export(model, MODEL_PATH)
    onnx.checker.check_model(str(MODEL_PATH), full_check=True)
    score = accuracy(MODEL_PATH, test_x, test_y)
    print(f"{MODEL_PATH.name}: {MODEL_PATH.stat().st_size} bytes, test accuracy {score:.4f} on {len(test_y)} images")


if __name__ == "__main__":
    main()
