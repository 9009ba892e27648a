"""Convolutions in groups and transposed ones shrink with what they read, and are refitted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.models.compress_nets import array_of, gap, images, program, values
from tests.zoo.net import Net

from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.passes.pruning.compress.selection import solve
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.passes.pruning.refit.layers import layers_of
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry, NormalEquations
from cipm_ir.symmetry.program import Program


def grouped(groups: int = 2) -> Net:
    """A ResNeXt-like block: 1x1, in groups, 1x1, beside a shortcut."""
    net = Net(f"grouped{groups}")
    stem = net.relu(net.conv(net.image(), 3, 8))
    h = net.relu(net.conv(stem, 8, 16, k=1))
    h = net.relu(net.conv(h, 16, 16, group=groups))
    net.classify(net.relu(net.op("Add", stem, net.conv(h, 16, 8, k=1))), 8)
    return net


def transposed() -> Net:
    """An encoder and a decoder."""
    net = Net("transposed")
    h = net.relu(net.conv(net.image(), 3, 16, stride=2))
    weight = net.weight((16, 12, 3, 3), 16 * 9 // 4)
    h = net.op(
        "ConvTranspose",
        h,
        weight,
        net.bias(12),
        strides=[2, 2],
        pads=[1] * 4,
        output_padding=[1, 1],
        kernel_shape=[3, 3],
    )
    net.output(net.conv(net.relu(h), 12, 2), ["N", 2, 6, 6])
    return net


NETS = {"two groups": grouped, "four groups": lambda: grouped(4), "transposed": transposed}


def compress(made: Program, data: Any, **options: Any) -> PassResult:
    asked = {"macs": 0.6, "steps": 4, "min_keep": 1, "round_to": 1, "plain": False, **options}
    return Compress(**asked).run(made, Context(data=data, original=made))


@pytest.mark.parametrize("name", NETS)
def test_they_are_refitted(name: str) -> None:
    made, data, fresh = program(NETS[name]()), images(200), images(100, seed=9)
    result = compress(made, data)
    assert result.program.macs <= 0.6 * made.macs and "is not refitted" not in result.summary
    dense = values(made, fresh)[0]
    plain = made.restrict({made.space(n): kept for n, kept in result.witness["kept"].items()})
    ours, theirs = (gap(dense, values(p, fresh)[0]) for p in (result.program, plain))
    assert ours < 0.3 * theirs


@pytest.mark.parametrize("name", NETS)
def test_each_product_takes_up_what_its_inputs_lose(name: str) -> None:
    """Of the products that read a space that shrinks, also the convolution in groups or the transposed one."""
    made, data = program(NETS[name]()), images(200)
    kinds = {"ConvTranspose"} if name == "transposed" else {"Conv"}
    special = [x for x in layers_of(made) if not x.linear.plain]
    assert len(special) == 1 and {x.reader.op for x in special} == kinds
    result = compress(made, data)
    kept = {made.space(n): k for n, k in result.witness["kept"].items()}
    fitted = Compensation(data, seed=0).run(made, made.kept_classes(kept)).program
    weight = special[0].reader.weight
    assert np.abs(array_of(fitted, weight) - array_of(made, weight)).max() > 1e-3


@pytest.mark.parametrize("blind", [False, True])
def test_each_group_is_fitted_by_itself(blind: bool, rng: np.random.Generator) -> None:
    """As least squares on the inputs of the group alone gives; the control sees the other group's inputs too."""
    linear = LinearOpGeometry((6, 8), 1, groups=2)
    base = rng.standard_normal((400, 5))
    x = base @ rng.standard_normal((5, 8)) + 0.3 * rng.standard_normal((400, 8))
    y = rng.standard_normal((400, 6)) + base @ rng.standard_normal((5, 6))
    sums = NormalEquations(8, 6, blocks=None if blind else linear.blocks)
    sums.add(x, y)
    fitted = solve(sums.gram(centred=True), sums.cross(centred=True))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    for rows, outputs in ((slice(0, 4), slice(0, 3)), (slice(4, 8), slice(3, 6))):
        best, *_ = np.linalg.lstsq(x[:, rows], y[:, outputs], rcond=None)
        assert (np.abs(fitted[rows, outputs] - best).max() < 1e-8) == (not blind)
    assert (np.abs(fitted[:4, 3:]).max() < 1e-12) == (not blind)
