"""`compress` on data that does not vary: it says so, and which readers it concerns; elsewhere it keeps quiet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.models.compress_nets import images, mlp, program, residual, rows, two_convs
from tests.zoo.net import Net

from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.symmetry.program import Program


def summary(made: Program, data: Any, **options: Any) -> str:
    asked: dict[str, Any] = {"macs": 0.7, "steps": 3, "min_keep": 1, "rounds": 0, **options}
    return Compress(**asked).run(made, Context(data=data, original=made)).summary


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_data_is_said(value: float) -> None:
    """Also behind convolutions whose padding makes a constant look as if it varied."""
    said = summary(program(residual()), {"x": np.full((50, 3, 6, 6), value, np.float32)})
    assert "warning: all 44 samples that were compared are equal, so units" in said
    assert "warning" not in summary(program(residual()), images(200))


def test_one_image_again_and_again_is_said() -> None:
    """It varies over its positions, so that no Gram matrix tells."""
    one = images(1)["x"]
    again = summary(program(two_convs()), {"x": np.repeat(one, 60, axis=0)})
    assert "all 53 samples that were compared are equal" in again and "no variance" not in again
    assert "there is only one sample" in summary(program(two_convs()), {"x": one})
    two = np.concatenate([np.repeat(one, 59, axis=0), -one])
    assert "equal" not in summary(program(two_convs()), {"x": two})


def test_few_probes_of_data_that_varies_are_not_taken_for_one_sample() -> None:
    assert "only one sample" not in summary(program(mlp()), rows(200), probes=1, macs=0.8)


def still(share: float, padded: bool) -> Net:
    """Two products; a part of what the second reads is the same for every input, and not zero."""
    net = Net(f"still_{share}")
    mask = (np.arange(10) >= round(10 * share)).astype(np.float64).reshape((10, 1, 1) if padded else 10)
    if padded:
        h = net.op("Mul", net.conv(net.image(3, 6), 3, 10), net.const(mask))
        h = net.relu(net.op("Add", h, net.const(2.0 * (1 - mask))))
        net.classify(net.relu(net.conv(h, 10, 6)), 6)
    else:
        h = net.op("Mul", net.gemm(net.input("x", ["N", 6]), 6, 10), net.const(mask))
        h = net.relu(net.op("Add", h, net.const(2.0 * (1 - mask))))
        net.output(net.gemm(net.relu(net.gemm(h, 10, 6)), 6, 3), ["N", 3])
    return net


@pytest.mark.parametrize("padded", [False, True])
def test_inputs_of_a_reader_that_never_change_are_said(padded: bool) -> None:
    data = images(200) if padded else rows(300)
    said = summary(program(still(0.8, padded)), data, macs=0.9)
    assert "warning: up to 80% of the inputs of w_9 have no variance over the data, so they look useless" in said
    assert "no variance" not in summary(program(still(0.4, padded)), data, macs=0.9)


def test_maps_of_one_pixel_have_no_still_taps() -> None:
    """Of a 3 by 3 kernel on a map of one pixel only the middle is ever seen; the units vary nevertheless."""
    net = Net("pixel")
    h = net.relu(net.conv(net.input("x", ["N", 6, 1, 1]), 6, 10))
    net.classify(net.relu(net.conv(h, 10, 8)), 8)
    data = {"x": rows(300)["x"].reshape(300, 6, 1, 1)}
    assert "no variance" not in summary(program(net), data, macs=0.8)


def test_an_input_that_is_one_value_beside_one_that_varies() -> None:
    """A mask of ones is no reason for a warning."""
    net = Net("masked")
    x, mask = net.input("x", ["N", 6]), net.input("mask", ["N", 6])
    h = net.relu(net.gemm(net.op("Mul", x, mask), 6, 10))
    net.output(net.gemm(h, 10, 3), ["N", 3])
    data = {**rows(200), "mask": np.ones((200, 6), np.float32)}
    assert "warning" not in summary(program(net), data)
    data["x"] = np.ones((200, 6), np.float32)
    assert "are equal" in summary(program(net), data)
