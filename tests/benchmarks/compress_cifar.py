"""Accuracy of compressed CIFAR-10 ResNets without fine-tuning and without labels, as a markdown table.

    CIPM_TEST_DATA=folder python -m tests.benchmarks.compress_cifar [resnet20 resnet32] [--budgets .9,.5] [--draws 3]

The folder holds `cifar10/`: calibration takes the first 3000 images of `calib.npz`; what is said is measured on the 400
test images of `val.npz` and on the last 1000 images of `calib.npz`, which calibration does not see (but training did).
`--draws`: the same again with other 3000 of the 4000, which shows what depends on the calibration images.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

import cipm_ir
from cipm_ir.passes import Compress
from cipm_ir.runtime.session import Runner

Array = npt.NDArray[Any]
CALIBRATION = 3000
_MEAN, _SPREAD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def prepared(images: Array) -> Array:
    """Images as the networks take them: float32, (n, 3, 32, 32)."""
    return np.asarray(((images / 255.0 - _MEAN) / _SPREAD).transpose(0, 3, 1, 2), np.float32)


@dataclass(frozen=True)
class Images:
    """Calibration images, test images with labels, and training images that calibration does not see."""

    calibration: Array
    test: Array
    labels: Array
    held_out: Array

    @classmethod
    def read(cls, folder: Path, draw: int = 0) -> Images:
        """From the folder of the test data. ``draw``: seed of the order; 0 takes calibration images as they come."""
        calib, val = np.load(folder / "calib.npz"), np.load(folder / "val.npz")
        images = prepared(calib["images"])
        if draw:
            images = images[np.random.default_rng(draw).permutation(len(images))]
        return cls(images[:CALIBRATION], prepared(val["images"]), val["labels"], images[CALIBRATION:])


def logits(program: cipm_ir.Program, images: Array) -> Array:
    """Outputs of a classifier in onnxruntime."""
    with Runner(program.model, fast=True) as runner:
        (name,) = runner.inputs
        parts = [runner.run({name: images[k : k + 250]}) for k in range(0, len(images), 250)]
    return np.concatenate([next(iter(part.values())) for part in parts])


def divergence(a: Array, b: Array) -> float:
    """KL divergence in nats per image."""
    p, q = log_softmax(a.astype(np.float64), axis=1), log_softmax(b.astype(np.float64), axis=1)
    return float((np.exp(p) * (p - q)).sum() / len(a))


def compared(program: cipm_ir.Program, made: cipm_ir.Program, images: Images) -> str:
    """Accuracy, the paired difference with its standard error, agreement and divergence."""
    before, after = logits(program, images.test), logits(made, images.test)
    right = after.argmax(1) == images.labels
    gain = right.astype(float) - (before.argmax(1) == images.labels)
    kept, seen = logits(program, images.held_out), logits(made, images.held_out)
    return (
        f"{right.mean():.2%} | {100 * gain.mean():+.2f} ± {100 * gain.std() / len(gain) ** 0.5:.2f} | "
        f"{(after.argmax(1) == before.argmax(1)).mean():.2%} | {divergence(before, after):.4f} | "
        f"{(seen.argmax(1) == kept.argmax(1)).mean():.2%} | {divergence(kept, seen):.4f}"
    )


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["resnet20", "resnet32"])
    parser.add_argument("--budgets", default=".9,.8,.7,.5")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--draws", type=int, default=1)
    given = parser.parse_args()
    folder = Path(os.environ["CIPM_TEST_DATA"]) / "cifar10"
    budgets = [float(text) for text in given.budgets.split(",")]
    print("| model | MACs | accuracy | against dense, points | agreement | KL | held out: agreement | KL | s | MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in given.models:
        for draw in range(given.draws):
            table(folder / f"{name}.onnx", Images.read(folder, draw), budgets, given.rounds)


def table(path: Path, images: Images, budgets: list[float], rounds: int) -> None:
    """Rows of one model."""
    program = cipm_ir.load(path)
    (value,) = program.model.graph.inputs
    data, plans = {value.name or "": images.calibration}, dict[Any, Any]()
    print(f"| {path.stem} | 100% | {compared(program, program, images)} | | |", flush=True)
    for budget in budgets:
        start = time.perf_counter()
        result = cipm_ir.optimize(program, [Compress(macs=budget, rounds=rounds)], data=data, options={"plans": plans})
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        left = result.program.macs / program.macs
        row = f"| {path.stem} | {left:.1%} | {compared(program, result.program, images)} | {seconds:.0f} | {peak:.0f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
