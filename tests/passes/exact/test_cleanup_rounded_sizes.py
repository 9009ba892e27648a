"""Sizes that are rounded quotients or products: clean-up knows them only where ONNX and the runtime must agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from tests.models.cleaning import Array, cleaned, model, node, operators, run, same_bits, value

INT = TensorProto.INT64
SEVEN = np.arange(14, dtype=np.float32).reshape(1, 2, 7)
TEN = np.arange(20, dtype=np.float32).reshape(1, 2, 10)
WEIGHT = np.ones((2, 3, 1), np.float32)


def _shape_of(operator: str, x: Array, constants: dict[str, Array], attributes: dict[str, Any]) -> tuple[Any, Any]:
    names = ["x", *("" if name == "none" else name for name in constants)]
    nodes = [node(operator, names, ["c"], **attributes), node("Shape", ["c"], ["y"])]
    given = {name: array for name, array in constants.items() if name != "none"}
    proto = model(nodes, given, inputs=[value("x", shape=x.shape)], outputs=[value("y", INT, shape=None)])
    return proto, cleaned(proto)


def _scales(*scales: float) -> dict[str, Array]:
    return {"none": np.zeros(0), "scales": np.array(scales, np.float32)}


NEAREST = {"mode": "nearest"}
SAME = {"auto_pad": "SAME_UPPER", "kernel_shape": [2], "strides": [3], "dilations": [2]}
OPEN: dict[str, tuple[str, Array, dict[str, Array], dict[str, Any]]] = {
    "resize by 2.3": ("Resize", TEN, _scales(1, 1, 2.3), NEAREST),
    "resize by 0.7": ("Resize", TEN, _scales(1, 1, 0.7), NEAREST),
    "resize an axis": ("Resize", TEN, _scales(2.3), {**NEAREST, "axes": [2]}),
    "resize the last axis": ("Resize", TEN, _scales(2.3), {**NEAREST, "axes": [-1]}),
    "dilated pool": ("MaxPool", SEVEN, {}, SAME),
    "dilated average": ("AveragePool", SEVEN, {}, SAME),
    "ceiling": (
        "AveragePool",
        np.ones((1, 2, 4), np.float32),
        {},
        {"auto_pad": "VALID", "kernel_shape": [1], "strides": [2], "ceil_mode": 1, "dilations": [2]},
    ),
    "transposed": ("ConvTranspose", SEVEN, {"w": WEIGHT}, {"strides": [3], "output_shape": [6]}),
}
KNOWN: dict[str, tuple[str, Array, dict[str, Array], dict[str, Any]]] = {
    "resize by 2": ("Resize", TEN, _scales(1, 1, 2), NEAREST),
    "resize by 0.25": ("Resize", TEN, _scales(1, 1, 0.25), NEAREST),
    "pool": ("MaxPool", SEVEN, {}, {"kernel_shape": [2], "strides": [2]}),
    "transposed": ("ConvTranspose", SEVEN, {"w": WEIGHT}, {"strides": [3]}),
}


@pytest.mark.parametrize("case", OPEN)
def test_sizes_that_may_be_rounded_otherwise_are_computed_when_the_model_runs(case: str) -> None:
    operator, x, constants, attributes = OPEN[case]
    proto, after = _shape_of(operator, x, constants, attributes)
    assert operators(after) == [operator, "Shape"]
    assert same_bits(run(proto, {"x": x}), run(after, {"x": x}))


@pytest.mark.parametrize("case", KNOWN)
def test_exact_sizes_are_constants(case: str) -> None:
    operator, x, constants, attributes = KNOWN[case]
    proto, after = _shape_of(operator, x, constants, attributes)
    assert operators(after) == ["Constant"]
    assert same_bits(run(proto, {"x": x}), run(after, {"x": x}))
