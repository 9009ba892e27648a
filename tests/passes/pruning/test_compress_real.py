"""`compress` on trained networks and real data: accuracy without fine-tuning, against deletion of the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tests.benchmarks.compress_cifar import Images, divergence, logits
from tests.paths import DIGITS

import cipm_ir
from cipm_ir.passes import Compress, Prune

Array = npt.NDArray[Any]


def digits() -> tuple[Array, Array, Array]:
    """Images for calibration, test images, their labels; split as examples/digits/train.py does."""
    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, _, answers = train_test_split(scaled, labels, test_size=0.25, random_state=0, stratify=labels)
    return train, test, answers


def accuracy(program: cipm_ir.Program, images: Array, labels: Array) -> float:
    return float((logits(program, images).argmax(axis=1) == labels).mean())


def test_digits_keep_their_accuracy_at_half_the_cost() -> None:
    train, test, labels = digits()
    program = cipm_ir.load(DIGITS)
    data = {"images": train[:512]}
    made = cipm_ir.optimize(program, [Compress(macs=0.5, probes=128, steps=4, rounds=0)], data=data).program
    deleted = cipm_ir.optimize(program, [Prune(macs=0.5)]).program
    assert made.macs <= 0.5 * program.macs
    assert accuracy(program, test, labels) > 0.99
    assert accuracy(made, test, labels) > 0.98
    assert accuracy(deleted, test, labels) < 0.8, "deletion alone loses it: the test would notice"


def test_an_own_score_decides_how_far_it_goes() -> None:
    train, test, labels = digits()
    program = cipm_ir.load(DIGITS)

    def score(run: Any) -> float:
        (out,) = run({"images": test}).values()
        return float((out.argmax(axis=1) == labels).mean())

    todo = Compress(max_drop=0.02, evaluate=score, probes=128, steps=4, rounds=0)
    made = cipm_ir.optimize(program, [todo], data={"images": train[:128]}).program
    assert made.macs < 0.5 * program.macs
    assert accuracy(made, test, labels) >= accuracy(program, test, labels) - 0.02


@pytest.fixture(scope="module")
def halved(data_dir: Path) -> tuple[cipm_ir.Program, cipm_ir.Program, Images]:
    """ResNet-20, the same at half of its multiply-accumulates, and images."""
    images = Images.read(data_dir / "cifar10")
    program = cipm_ir.load(data_dir / "cifar10" / "resnet20.onnx")
    (value,) = program.model.graph.inputs
    todo = Compress(macs=0.5, probes=128, steps=4, rounds=0)
    made = cipm_ir.optimize(program, [todo], data={value.name or "": images.calibration[:512]})
    return program, made.program, images


def test_resnet20_at_half_the_cost(halved: tuple[cipm_ir.Program, cipm_ir.Program, Images]) -> None:
    program, made, images = halved
    dense, small = logits(program, images.held_out), logits(made, images.held_out)
    assert made.macs <= 0.5 * program.macs
    assert (dense.argmax(axis=1) == small.argmax(axis=1)).mean() > 0.87
    assert divergence(dense, small) < 0.45


def test_deletion_of_the_same_size_loses_resnet20(halved: tuple[cipm_ir.Program, cipm_ir.Program, Images]) -> None:
    program, _, images = halved
    deleted = cipm_ir.optimize(program, [Prune(macs=0.5)]).program
    dense, small = logits(program, images.held_out), logits(deleted, images.held_out)
    assert (dense.argmax(axis=1) == small.argmax(axis=1)).mean() < 0.5
