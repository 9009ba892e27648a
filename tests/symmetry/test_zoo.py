"""Every model of the zoo is valid, runs, is reproducible, and gives finite outputs that depend on the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.zoo.net import Net

SYNTHETIC = zoo.names("synthetic")
LIGHT = zoo.names("light")
CONSTANT = zoo.names("constant")
OUTSIDE = [*zoo.names("data"), *zoo.names("torch")]


def complaint(first: list[NDArray[Any]], second: list[NDArray[Any]]) -> str | None:
    """Why two runs on different inputs are no use to a differential test; None when they are."""
    for index, value in enumerate([*first, *second]):
        if not np.isfinite(value).all():
            return f"output {index % len(first)} is not finite"
    if np.std(first[0].astype(np.float64)) < 1e-6:
        return "output 0 is constant"
    if np.array_equal(first[0], second[0]):
        return "output 0 does not depend on the input"
    return None


@pytest.mark.parametrize("name", [*SYNTHETIC, *OUTSIDE])
def test_valid_and_alive(name: str) -> None:
    model, entry = zoo.build_or_skip(name), zoo.entry(name)
    onnx.checker.check_model(model, full_check=True)
    expected = "output 0 does not depend on the input" if "faint" in entry.tags else None
    batches = [zoo.feeds(name, model, seed) for seed in (0, 1)]
    assert complaint(*zoo.runs(model, batches, reference=entry.reference)) == expected


@pytest.mark.parametrize("name", LIGHT)
def test_light_refilled(name: str) -> None:
    model = zoo.build_or_skip(name)
    assert not any(node.op_type == "ConstantOfShape" for node in model.graph.node)
    assert len(model.graph.input) == 1
    content = model.SerializeToString()
    onnx.checker.check_model(content)
    outputs, others = zoo.runs(content, [zoo.feeds(name, model, seed) for seed in (0, 1)])
    assert complaint(outputs, others) is None
    if model.graph.node[-1].op_type == "Softmax":
        assert outputs[0].max() < 0.5, "a one-hot softmax hides differences"
    assert np.abs(outputs[0] - others[0]).max() > 5e-3 * np.abs(outputs[0]).max()


@pytest.mark.parametrize("name", CONSTANT)
def test_light_original_is_the_file(name: str) -> None:
    model = zoo.build_or_skip(name)
    onnx.checker.check_model(model)
    assert model.ir_version == 3
    assert any(node.op_type == "ConstantOfShape" for node in model.graph.node)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_other_batch_sizes(name: str) -> None:
    model = zoo.build(name)
    symbolic = any(dim.dim_param == "N" for value in model.graph.input for dim in value.type.tensor_type.shape.dim)
    if not symbolic:
        assert "N" not in str(model.graph.output)
        return
    outputs = zoo.run(model, zoo.feeds(name, model, dims={"N": 3}), reference=zoo.entry(name).reference)
    assert all(np.isfinite(value).all() for value in outputs)


@pytest.mark.parametrize("name", [*SYNTHETIC, "squeezenet", "shufflenet"])
def test_same_bytes_every_time(name: str) -> None:
    first, second = (zoo.build(name).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_names_filter_by_tag() -> None:
    assert "vgg19" in zoo.names("large") and "vgg19" not in zoo.names("light", without=("large",))
    assert set(zoo.names("mlp")) < set(SYNTHETIC) < set(zoo.names())
    assert all(zoo.entry(name).at_least >= (zoo.entry(name).expected_units or 0) for name in zoo.names())
    with pytest.raises(KeyError):
        zoo.build("no-such-model")


def test_missing_data_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIPM_TEST_DATA", raising=False)
    with pytest.raises(zoo.UnavailableError, match="CIPM_TEST_DATA"):
        zoo.build("bert")


def test_complaint_catches_dead_models() -> None:
    """Negative control: a saturated model, a constant one and one that overflows are all refused."""

    def outputs(kind: str) -> list[list[NDArray[Any]]]:
        net = Net(f"control_{kind}")
        x = net.input("x", ["N", 4])
        shifted = net.op("Mul", x, net.const({"zero": 0.0, "overflow": 1e30}.get(kind, 1.0)))
        value = (
            net.op("Mul", shifted, shifted)
            if kind == "overflow"
            else net.op("Add", shifted, net.const(net.normal((4,), 1.0)))
        )
        if kind == "constant":
            value = net.op("Clip", value, net.const(100.0), net.const(101.0))
        net.output(value, ["N", 4])
        model = net.model()
        rng = np.random.default_rng(0)
        return [zoo.run(model, {"x": rng.standard_normal((2, 4)).astype(np.float32)}) for _ in range(2)]

    assert complaint(*outputs("live")) is None
    assert complaint(*outputs("zero")) == "output 0 does not depend on the input"
    assert complaint(*outputs("constant")) == "output 0 is constant"
    assert complaint(*outputs("overflow")) == "output 0 is not finite"
