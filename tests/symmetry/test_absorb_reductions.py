"""`absorb` behind a reduction: over other axes units stay apart and may merge; units that are summed may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import Feeds, furthest, images, program, values
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
KEEP = np.array([0, 1, 2, 3, 5])


def pooled(op: str, axes: list[int], keepdims: int, opset: int = 20) -> Net:
    """Conv with six units of which the fifth is the second, relu, a reduction, a product."""
    net = Net(f"pooled_{op}_{opset}_{keepdims}", opset)
    weight, bias = net.normal((6, 3, 3, 3), 0.4), np.abs(net.normal((6,), 0.5)) + 0.5
    weight[4], bias[4] = weight[1], bias[1]
    h = net.relu(net.op("Conv", net.image(3, 6), net.const(weight), net.const(bias), kernel_shape=[3, 3]))
    named: dict[str, Any] = {"axes": axes} if opset < 18 else {}
    h = net.op(op, h, *([] if named else [net.const(axes)]), keepdims=keepdims, **named)
    h = net.op("Flatten", h) if keepdims else h
    net.output(net.gemm(h, 6, 3), ["N", 3])
    return net


def mixing(factor: float = 1.0) -> Array:
    made = np.eye(6)[:, KEEP]
    made[4, 1] = factor
    return made


def difference(made: Program, other: Program, data: Feeds) -> float:
    onnx.checker.check_model(ir.to_proto(other.emit()), full_check=True)
    return furthest(values(made, data), values(other, data))


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceLogSumExp"])
def test_a_duplicate_merges_behind_a_reduction_over_space(op: str, keepdims: int) -> None:
    made, data = program(pooled(op, [2, 3], keepdims)), images(8)
    merged = made.absorb(made.spaces[0], KEEP, mixing())
    assert merged.spaces[0].size == 5
    assert difference(made, merged, data) < 1e-5
    control = made.absorb(made.spaces[0], KEEP, mixing(0.0))
    assert difference(made, control, data) > 1e-2


def test_axes_as_an_attribute() -> None:
    made, data = program(pooled("ReduceMean", [-1, -2], 1, opset=13)), images(8)
    assert difference(made, made.absorb(made.spaces[0], KEEP, mixing()), data) < 1e-5


def test_the_same_as_behind_a_global_pool() -> None:
    """What the reduction lets through is what GlobalAveragePool does: equal weights afterwards."""
    net = pooled("ReduceMean", [2, 3], 1)
    twin = pooled("ReduceMean", [2, 3], 1)
    node = next(n for n in twin.nodes if n.op_type == "ReduceMean")
    node.CopyFrom(onnx.helper.make_node("GlobalAveragePool", list(node.input)[:1], list(node.output), name=node.name))
    made, other, data = program(net), program(twin), images(8)
    merged, same = (p.absorb(p.spaces[0], KEEP, mixing()) for p in (made, other))
    assert furthest(values(merged, data), values(same, data)) < 1e-6


def test_a_constant_unit_moves_into_the_bias_behind_a_mean() -> None:
    net = pooled("ReduceMean", [2, 3], 1)
    for tensor in net.initializers[:2]:
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[4] = 0.0 if array.ndim == 4 else 0.75
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    made, data, shift = program(net), images(8), np.zeros(6)
    shift[4] = 0.75
    assert difference(made, made.absorb(made.spaces[0], KEEP, mixing(0.0), shift), data) < 1e-5
    assert difference(made, made.absorb(made.spaces[0], KEEP, mixing(0.0)), data) > 1e-3


def summed(op: str, axes: list[int], outer: bool = False) -> Net:
    """Six units that weights read, and a reduction over the units beside them."""
    net = Net(f"summed_{op}_{outer}")
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 6))
    value = h
    if outer:  # units along two axes: over one of them they are summed
        across = [net.op("Unsqueeze", h, net.const([axis])) for axis in (1, 2)]
        value = net.op("Mul", *across)
    total = net.op(op, value, net.const(axes), keepdims=0)
    net.output(net.gemm(total, 6, 2) if outer else total, ["N", 2] if outer else ["N"])
    net.output(net.gemm(h, 6, 3), ["N", 3])
    return net


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMean", "ReduceMax"])
def test_units_that_are_summed_are_still_refused(op: str) -> None:
    made = program(summed(op, [1]))
    with pytest.raises(SymmetryError, match=f"{op} .* reads this space|normalization, softmax or mean"):
        made.absorb(made.spaces[0], KEEP, mixing())


@pytest.mark.parametrize("axis", [1, 2])
def test_units_that_lie_along_two_axes_are_refused(axis: int) -> None:
    """The other axis still carries them, but one copy is summed."""
    made = program(summed("ReduceSum", [axis], outer=True))
    with pytest.raises(SymmetryError, match=r"ReduceSum .* reads this space"):
        made.absorb(made.spaces[0], KEEP, mixing())
