"""What equalization does for quantization, as markdown tables: nothing, pairwise to convergence, whole graph.

    CIPM_TEST_DATA=folder python -m tests.benchmarks.quantize_cifar [resnet20 resnet32 mobilenet mobilenet6]
        [--scrambled] [--expose steps] [--no-static] [--rows none pairwise]

ResNets are trained on CIFAR-10 and measured on 400 test images; the MobileNetV2 (Relu, or Relu6) is trained on
scikit-learn's digits and measured on 450 test images. With `--scrambled`, weights are first moved by a random element
of the scaling group, e^N(0, 1.5). Batch norms are folded first in every row; before `equalize` comes
`expose{relu6=true}`, which lets units behind a Relu6 scale.

A cell: mean SQNR of the weights in dB, squared error of the logits relative to the float model's, accuracy. Weights are
rounded to nearest, symmetrically; error and accuracy are means over `DRAWS` lengths of the step, one to three percent
apart, since the error of one rounding is an accident. The last columns are onnxruntime's own static quantization of
weights and activations to signed bytes. Seconds are those of the change for steps per tensor.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from tests.benchmarks import pairwise
from tests.benchmarks.compress_cifar import prepared
from tests.benchmarks.quantizers import Loss, outputs, static, weights_rounded

import cipm_ir
from cipm_ir.algebra import Element

Array = NDArray[Any]
Change = Callable[[onnx.ModelProto, str], onnx.ModelProto]
"""Gets the model and what has one step: "tensor" or "channel"."""
MODELS = ("resnet20", "resnet32", "mobilenet", "mobilenet6")
KINDS = {
    "W8 per tensor": (8, False),
    "W8 per channel": (8, True),
    "W4 per tensor": (4, False),
    "W4 per channel": (4, True),
}
SPREAD = 1.5
DRAWS = (1.0, 1.01, 1.02, 1.03)


@dataclass(frozen=True)
class Task:
    """A float model, its test images with labels, calibration images, and what is said on the test images.

    ``wanted`` is what the model says as it was trained, ``source`` what this one says, bit for bit.
    """

    name: str
    model: onnx.ModelProto
    images: Array
    labels: Array
    calibration: Array
    wanted: Array
    source: Array

    @property
    def input(self) -> str:
        """Name of the model's only input."""
        return str(self.model.graph.input[0].name)

    @classmethod
    def load(cls, name: str) -> Task:
        """One of `MODELS`, batch norm folded."""
        if name.startswith("resnet"):
            folder = Path(os.environ["CIPM_TEST_DATA"]) / "cifar10"
            val, calib = np.load(folder / "val.npz"), np.load(folder / "calib.npz")
            path, images, labels = folder / f"{name}.onnx", prepared(val["images"]), val["labels"]
            calibration = prepared(calib["images"][:200])
        else:
            from tests.benchmarks import torch_mobilenet
            from torch import nn

            path = torch_mobilenet.exported(nn.ReLU6 if name.endswith("6") else nn.ReLU)
            train, images, _, labels = torch_mobilenet.digits()
            calibration = train[:200]
        program = cipm_ir.optimize(path, ["fold-batch-norm"]).program
        model = ir.to_proto(program.emit())
        said = outputs(model, model.graph.input[0].name, images)
        return cls(name, model, images, labels, calibration, said, said)

    def scrambled(self, seed: int = 0) -> Task:
        """The same function with other weights: a random element of the scaling group."""
        program = cipm_ir.Program.of(ir.from_proto(self.model))
        rng, chosen = np.random.default_rng(seed), {}
        for space in program.spaces:
            scale = np.exp(SPREAD * rng.standard_normal((space.group.scales, space.size)))
            chosen[space] = Element(np.arange(space.size), scale, np.ones((space.group.signs, space.size), np.int8))
        model = ir.to_proto(program.act(chosen).emit())
        said = outputs(model, self.input, self.images)
        return replace(self, name=f"{self.name}, scrambled", model=model, source=said)


def whole_graph(expose: str, data: Any = None, more: str = "") -> Change:
    """The passes of this project."""

    def change(model: onnx.ModelProto, per: str) -> onnx.ModelProto:
        steps = [*([expose] if expose else []), f"equalize{{per={per}{more}}}"]
        return ir.to_proto(cipm_ir.optimize(model, steps, data=data, verify=False).program.emit())

    return change


def changes_for(task: Task, given: argparse.Namespace) -> dict[str, Change]:
    """The rows of a table."""
    data = {task.input: task.calibration}
    rows: dict[str, Change] = {
        "none": lambda model, per: model,
        "pairwise": lambda model, per: pairwise.equalized(model),
        "pairwise, powers of two": lambda model, per: pairwise.equalized(model, power_of_two=True),
        "whole graph, powers of two": whole_graph(given.expose),
        "whole graph, real": whole_graph(given.expose, more=",exact=false"),
        "whole graph, powers of two, data": whole_graph(given.expose, data),
        "whole graph, real, data": whole_graph(given.expose, data, ",exact=false"),
    }
    return {name: rows[name] for name in rows if name in given.rows} if given.rows else rows


# ---------------------------------------------------------------- one row
def weights_alone(task: Task, model: onnx.ModelProto, bits: int, *, per_channel: bool) -> str:
    """Mean SQNR, error and accuracy with rounded weights."""
    ratios, losses = [], []
    for stretch in DRAWS:
        made, ratio = weights_rounded(model, bits, per_channel=per_channel, stretch=stretch)
        found = outputs(made, task.input, task.images, fast=True)
        losses.append(Loss.of(task.wanted, found, task.labels))
        ratios.append(ratio)
    return f"{ratios[0]:.2f}, {Loss.mean(losses)}"


def row(task: Task, change: Change, *, static_too: bool) -> list[str]:
    """Prepare the weights, quantize in every way, compare."""
    start = time.perf_counter()
    models = [change(task.model, "tensor")]
    seconds = time.perf_counter() - start
    models.append(change(task.model, "channel"))
    worst = max(np.abs(outputs(m, task.input, task.images) - task.source).max() for m in models)
    cells = [f"{seconds:.2f}", "0" if worst == 0 else f"{worst:.0e}"]
    cells += [weights_alone(task, models[per], bits, per_channel=per) for bits, per in KINDS.values()]
    feeds = [{task.input: task.calibration[k : k + 50]} for k in range(0, len(task.calibration), 50)]
    for per_channel in (False, True) if static_too else ():
        found = outputs(static(models[per_channel], feeds, per_channel=per_channel), task.input, task.images)
        cells.append(str(Loss.of(task.wanted, found, task.labels)))
    return cells


def table(task: Task, changes: dict[str, Change], *, static_too: bool) -> None:
    """Print the rows of a model."""
    accuracy = Loss.of(task.wanted, task.wanted, task.labels).accuracy
    print(f"\n**{task.name}** (float: {accuracy:.1%})\n")
    head = ["", "s", "max Δ", *KINDS, *(("QDQ per tensor", "QDQ per channel") if static_too else ())]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, change in changes.items():
        print(f"| {name} | {' | '.join(row(task, change, static_too=static_too))} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--expose", default="expose{relu6=true}", help="what comes before equalize; empty: nothing")
    parser.add_argument("--scrambled", action="store_true", help="also with weights moved by a random scaling")
    parser.add_argument("--no-static", action="store_true", help="weights only: leave out onnxruntime's quantization")
    parser.add_argument("--rows", nargs="*", help="which rows, by name")
    given = parser.parse_args(arguments)
    for name in given.models:
        task = Task.load(name)
        for one in (task, task.scrambled()) if given.scrambled else (task,):
            table(one, changes_for(one, given), static_too=not given.no_static)


if __name__ == "__main__":
    main()
