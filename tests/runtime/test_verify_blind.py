"""Verification that would see nothing: other random numbers, empty outputs, sizes taken for noise; and its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from tests.models.cleaning import Array, model, node, value

import cipm_ir
from cipm_ir.runtime.inputs.generate import Feeds
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verification import compare
from cipm_ir.runtime.verification.cases import affordable_cases
from cipm_ir.runtime.verification.compare import Outputs
from cipm_ir.runtime.verification.noise import DRAWS, MORE_DRAWS
from cipm_ir.runtime.verification.verify import OnnxVariants

RNG = np.random.default_rng(5)


def _noisy(weight: Array) -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("RandomNormalLike", ["a"], ["r"], seed=1.0),
        node("Add", ["a", "r"], ["y"]),
    ]
    return model(nodes, {"w": weight})


def test_numbers_drawn_from_a_seed_are_the_same_in_every_run() -> None:
    weight = RNG.standard_normal((4, 4)).astype(np.float32)
    feeds = {"x": np.zeros((2, 4), np.float32)}
    with Runner(ir.from_proto(_noisy(weight))) as runner:
        first, second = runner.run(feeds)["y"], runner.run(feeds)["y"]
    assert first.any() and np.array_equal(first, second)
    same = cipm_ir.verify(_noisy(weight), _noisy(weight))
    assert same.ok and same.max_abs == 0
    assert cipm_ir.verify(_noisy(weight), _noisy(weight * np.float32(1.001))).ok is False


def _boxes(scale: float, threshold: float) -> onnx.ModelProto:
    nodes = [
        node("Mul", ["x", "w"], ["boxes"]),
        node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "least"], ["y"]),
    ]
    constants = {
        "w": np.linspace(0.1, scale, 24, dtype=np.float32).reshape(1, 6, 4),
        "most": np.array([3]),
        "iou": np.array([0.5], np.float32),
        "least": np.array([threshold], np.float32),
    }
    inputs = [value("x", shape=(1, 6, 4)), value("scores", shape=(1, 1, 6))]
    return model(nodes, constants, inputs=inputs, outputs=[value("y", TensorProto.INT64, (None, 3))])


def test_outputs_that_are_empty_on_all_inputs_prove_nothing() -> None:
    found = cipm_ir.verify(_boxes(1, 1e6), _boxes(9, 1e6))
    assert found.ok is None and "no output" in found.reason
    assert cipm_ir.verify(_boxes(1, -1e6), _boxes(1, -1e6)).ok


def _sizes(channels: int) -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Resize", ["a", "", "scales"], ["b"], mode="nearest"),
        node("Shape", ["b"], ["y"]),
    ]
    constants = {"w": np.ones((channels, 3, 1, 1), np.float32), "scales": np.array([1, 1, 2.3, 2.3], np.float32)}
    inputs = [value("x", shape=("N", 3, 10, 10))]
    return model(nodes, constants, inputs=inputs, outputs=[value("y", TensorProto.INT64, (4,))])


def test_another_size_is_no_rounding() -> None:
    assert cipm_ir.verify(_sizes(8), _sizes(8)).ok
    assert cipm_ir.verify(_sizes(8), _sizes(7)).ok is False


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.001, 8, 10**6), (0.5, 3, 3), (1.6, 3, 3), (5.0, 1, 1)])
def test_slow_models_are_run_less(seconds: float, least: int, most: int) -> None:
    assert least <= affordable_cases(seconds) <= most


@pytest.mark.parametrize(("patience", "draws"), [(0.0, DRAWS), (1e9, DRAWS + MORE_DRAWS)])
def test_doubt_has_an_end(monkeypatch: pytest.MonkeyPatch, patience: float, draws: int) -> None:
    seen: set[str] = set()
    outputs = OnnxVariants.outputs

    def noted(self: OnnxVariants, feeds: Sequence[Feeds], way: str = "") -> Iterator[Outputs]:
        seen.add(way)
        return outputs(self, feeds, way)

    monkeypatch.setattr(OnnxVariants, "outputs", noted)
    monkeypatch.setattr(compare, "_PATIENCE", patience)
    weight = np.ones((4, 4), np.float32)
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    assert not cipm_ir.verify(model(nodes, {"w": weight}), model(nodes, {"w": weight * np.float32(1 + 1e-5)}))
    assert len([way for way in seen if way.startswith("draw")]) == draws
