"""At which sizes multiply-accumulates are counted: those of the data, else stand-ins that are said."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tests.models.cost_models import count, model, sequence, weights
from tests.oracles.second_count import second_count

import cipm_ir


def sequence_macs(n: int) -> int:
    return n * 16 * 16 + 2 * n * n * 16 + 2 * n * 16 * 64


def test_dynamic_sizes_count_at_stand_ins_that_are_said() -> None:
    counted = count(sequence("N", "T", 16))
    assert counted.sizes == {"N": 1, "T": 128}
    assert counted.total == sequence_macs(128)
    result = cipm_ir.optimize(sequence("N", "T", 16), ["prune{macs=0.9}"])
    assert "MACs are counted at N=1, T=128" in str(result.report)
    assert result.report.to_dict()["before"]["sizes"] == {"N": 1, "T": 128}


@pytest.mark.parametrize("length", [7, 50])
def test_sizes_are_those_of_the_data(length: int) -> None:
    """A budget is one of the sequences that are given: at other lengths attention weighs differently."""
    data = {"x": weights(4, length, 16)}
    result = cipm_ir.optimize(sequence("N", "T", 16), ["prune{macs=0.7}"], data=data)
    assert result.report.before.macs == sequence_macs(length)
    assert f"MACs are counted at N=1, T={length}" in str(result.report)
    made = ir.to_proto(result.program.emit())
    second = sum(second_count(made, {"x": weights(1, length, 16)}).values())
    assert result.report.after.macs == second <= 0.7 * sequence_macs(length)
    assert second > 0.6 * sequence_macs(length)


def test_sizes_grow_until_a_model_can_run() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[160])
    made = model([node], {"x": ["N", 1, "T"]}, {"y": None}, {"w": weights(8, 1, 400)})
    counted = count(made)
    assert counted.sizes == {"N": 1, "T": 512} and counted.total == 8 * 400
    assert "does not fit into 128" in count(made, {"T": 128}).unknown[0].reason


@pytest.mark.parametrize("size", [-1, 0, "n", None])
@pytest.mark.parametrize("place", ["input", "both"])
def test_a_size_of_minus_one_or_zero_is_unknown(size: Any, place: str) -> None:
    """Some exporters write such sizes for what they do not know; the model counts and prunes as with a name."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["y"], pads=[1] * 4),
    ]
    parameters = {"w0": weights(32, 3, 3, 3), "w1": weights(8, 32, 3, 3)}
    made = model(nodes, {"x": [size, 3, 16, 16]}, {"y": [size if place == "both" else "m", 8, 16, 16]}, parameters)
    if place == "both":
        made.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [size, 32, 16, 16]))
    program = cipm_ir.load(made)
    assert program.macs == 256 * 27 * 32 + 256 * 288 * 8
    result = cipm_ir.optimize(made, ["prune{macs=0.5}"])
    assert result.report.steps[0].changed and 0 < result.report.after.macs <= 0.5 * program.macs


def test_an_empty_tensor_keeps_its_size_of_zero() -> None:
    """The region of a Resize is an empty constant, and means it."""
    nodes = [helper.make_node("Resize", ["x", "roi", "scales"], ["r"]), helper.make_node("Conv", ["r", "w"], ["y"])]
    parameters = {
        "roi": np.zeros(0, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "w": weights(4, 3, 3, 3),
    }
    assert count(model(nodes, {"x": [1, 3, 8, 8]}, {"y": None}, parameters)).total == 4 * 14 * 14 * 27


# ---------------------------------------------------------------- sizes that are easy to get wrong
def test_a_squeeze_of_all_ones_keeps_the_batch() -> None:
    """Over one sample it would drop the first axis too, so two are counted, and that is said."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Unsqueeze", ["a", "ax"], ["u"]),
        helper.make_node("Squeeze", ["u"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    parameters = {"w": weights(8, 16), "v": weights(16, 4), "ax": np.array([1], np.int64)}
    made = model(nodes, {"x": ["N", 8]}, {"y": None}, parameters)
    assert (count(made).total, count(made).sizes) == (2 * 16 * 12, {"N": 2})
    report = cipm_ir.optimize(made, ["prune{macs=0.5}"]).report
    assert report.after.macs == report.before.macs // 2


def test_a_size_that_is_also_a_length_is_no_batch() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["mask", "a"], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    parameters = {"w": weights(8, 16), "v": weights(16, 4)}
    counted = count(model(nodes, {"x": ["N", 8], "mask": ["N", "N"]}, {"y": None}, parameters))
    assert (counted.sizes, counted.total) == ({"N": 128}, 128 * 8 * 16 + 128 * 128 * 16 + 128 * 16 * 4)


def test_axes_without_a_name_have_sizes_of_their_own() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["z", "w"], ["b"]),
        helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "t"], ["s"]),
        helper.make_node("MatMul", ["s", "b"], ["y"]),
    ]
    made = model(nodes, {"x": [None, None, 8], "z": [None, None, 8]}, {"y": None}, {"w": weights(8, 16)})
    data = {"x": weights(2, 5, 8), "z": weights(2, 9, 8)}
    before = cipm_ir.optimize(made, ["canonicalize"], data=data).report.before
    assert before.sizes == {"x[0]": 1, "x[1]": 5, "z[0]": 1, "z[1]": 9}
    assert before.macs == sum(second_count(made, {k: v[:1] for k, v in data.items()}).values())
