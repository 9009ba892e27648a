"""Cases for sampling at given places, Fourier transforms, windows and crops."""

from __future__ import annotations

import numpy as np
from tests.ops.cases_runtime import RUNTIME
from tests.ops.sample import Sample, case

FULL = "R* wr S(6)"


def _grid_sample(op: str, name: str, mode: str, opset: int = 20) -> None:
    @case(op, FULL, name=name, opset=opset)
    def write(net: Sample) -> None:
        net.feeds["grid"] = net.rng.uniform(-1, 1, (2, 4, 5, 2)).astype(np.float32)
        grid = net.input("grid", [2, 4, 5, 2])
        domain, _, bare = op.rpartition("::")
        net.read(net.op(bare, net.picture(), grid, domain=domain, mode=mode), image=True)


_grid_sample("GridSample", "linear", "linear")
_grid_sample("GridSample", "nearest", "nearest")
_grid_sample(f"{RUNTIME}::GridSample", "bilinear", "bilinear")


def ramp(net: Sample) -> str:
    """Eight numbers from outside, (1, 1, 8)."""
    net.feeds["ramp"] = net.rng.uniform(0.5, 1.5, (1, 1, 8)).astype(np.float32)
    return net.input("ramp", [1, 1, 8])


def offsets(net: Sample, taps: int) -> str:
    """Offsets of taps of a 3 by 3 kernel, from outside."""
    net.feeds["offsets"] = net.rng.uniform(-1, 1, (2, 2 * taps, 6, 6)).astype(np.float32)
    return net.input("offsets", [2, 2 * taps, 6, 6])


@case("DeformConv", FULL, "R>0 wr S(6)", opset=19)
def offsets_from_outside(net: Sample) -> None:
    w, b = net.weight((6, 6, 3, 3), 54), net.bias(6)
    h, given = net.picture(), offsets(net, 9)
    net.taken("h", w, 1)
    net.made("c", w, 0)
    net.made("c", b, 0)
    y = net.op("DeformConv", h, w, given, b, kernel_shape=[3, 3], pads=[1] * 4)
    net.read(net.op("Relu", y), units="c", image=True)


@case("DeformConv", opset=19)
def two_groups_of_offsets(net: Sample) -> None:
    w = net.weight((6, 6, 3, 3), 54)
    h, given = net.picture(), offsets(net, 18)
    net.result(net.op("DeformConv", h, w, given, kernel_shape=[3, 3], pads=[1] * 4, offset_group=2))


@case("Col2Im", FULL)
def blocks_of_two(net: Sample) -> None:
    """(3, 6, 4): each of 6 channels in blocks of 1 by 2."""
    h = net.op("Reshape", net.vector(), net.const([3, 6, 1]))
    h = net.op("Mul", h, ramp(net))
    h = net.op("Reshape", h, net.const([3, 12, 4]))  # two taps of a channel lie next to each other
    y = net.op("Col2Im", h, net.const([1, 8]), net.const([1, 2]), strides=[1, 2])
    net.read(y, image=True)


@case("CumProd", "S(6)", opset=26)
def products_over_positions(net: Sample) -> None:
    net.read(net.op("CumProd", net.sequence(), net.const(1)))


@case("DFT", FULL)
def over_positions(net: Sample) -> None:
    """(2, 5, 6, 1): transformed along axis 1."""
    y = net.op("DFT", net.op("Unsqueeze", net.sequence(), net.const([3])), "", net.const(1))
    net.read(net.op("Transpose", y, perm=[0, 1, 3, 2]))


@case("DFT", opset=17)
def over_units(net: Sample) -> None:
    net.result(net.op("DFT", net.op("Unsqueeze", net.sequence(), net.const([3])), axis=2, onesided=1))


@case("STFT", FULL)
def signals_of_units(net: Sample) -> None:
    """Each of 6 units is a signal of 8 positions."""
    h = net.op("Reshape", net.op("ReduceSum", net.vector(), net.const([0])), net.const([6, 1]))
    h = net.op("Mul", h, net.op("Reshape", ramp(net), net.const([1, 8])))
    y = net.op("STFT", h, net.const(2), net.const(np.ones(4)), net.const(4))
    net.read(net.op("Transpose", y, perm=[1, 2, 3, 0]))


for _name in ("BlackmanWindow", "HammingWindow", "HannWindow"):

    @case(_name, FULL, name="of_a_size")
    def window(net: Sample, op: str = _name) -> None:
        net.feeds["size"] = np.array(5, np.int64)
        scale = net.op("Reshape", net.op(op, net.input("size", [], 7)), net.const([1, 5, 1]))
        net.read(net.op("Mul", net.sequence(), scale))


@case("MelWeightMatrix", FULL)
def of_two_bands(net: Sample) -> None:
    bands = net.op("MelWeightMatrix", net.const(5), net.const(8), net.const(16), net.const(1.0), net.const(8.0))
    h = net.op("Transpose", net.sequence(), perm=[0, 2, 1])  # (2, 6, 5)
    net.read(net.op("Transpose", net.op("MatMul", h, bands), perm=[0, 2, 1]))


@case("CenterCropPad", FULL, opset=18)
def of_positions(net: Sample) -> None:
    net.read(net.op("CenterCropPad", net.sequence(), net.const([3]), axes=[1]))


@case("CenterCropPad", opset=18)
def of_units(net: Sample) -> None:
    net.read(net.op("CenterCropPad", net.sequence(), net.const([4]), axes=[2]), 4, "cut")


@case("SwiGLU", FULL, opset=28)
def gated(net: Sample) -> None:
    net.read(net.op("SwiGLU", net.sequence(), net.sequence()))
