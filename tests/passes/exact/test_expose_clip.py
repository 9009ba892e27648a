"""Clips whose bounds every unit has of its own: equal bit for bit, and free to scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.models.expose_nets import array_of, check, difference, expose, operators, program
from tests.zoo.net import Net

from cipm_ir.algebra import Element
from cipm_ir.passes.exact.expose.gain import directions
from cipm_ir.symmetry.program import Program

ON = "relu6=true, hardtanh=true"


def mlp(name: str, low: float | None, high: float | None, *, opset: int = 20, dtype: str = "float32") -> Net:
    net = Net(name, opset=opset, dtype=dtype)
    x = net.linear(net.input("x", ["N", 4]), 4, 9)
    if opset >= 11:
        bounds = ["" if bound is None else net.const(bound) for bound in (low, high)]
        x = net.op("Clip", x, *bounds)
    else:
        given: dict[str, Any] = {key: value for key, value in (("min", low), ("max", high)) if value is not None}
        x = net.op("Clip", x, **given)
    net.output(net.linear(x, 9, 3), ["N", 3])
    return net


def scaled(made: Program) -> Program:
    """Every scale direction moved by random powers of two; the order, in which sums round, stays."""
    rng = np.random.default_rng(1)
    drawn = {space: space.random(rng, power_of_two=True) for space in made.spaces if space.group.scales}
    return made.act({space: Element(np.arange(space.size), one.scale, one.sign) for space, one in drawn.items()})


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 6.0, ["Relu", "Min"]),
        (0.0, 0.5, ["Relu", "Min"]),
        (-1.0, 1.0, ["Max", "Min"]),
        (-0.5, 1.5, ["Max", "Min"]),
        (0.25, None, ["Max"]),
        (None, 0.5, ["Min"]),
        (-1.0, 0.0, ["Max", "Min"]),
    ],
)
def test_bounds(low: float | None, high: float | None, wanted: list[str]) -> None:
    before = program(mlp(f"{low} {high}", low, high))
    after, step = expose(before, ON, exact=True)
    assert step.metrics["clips"] == 1 and operators(after)[2:-2] == wanted
    assert step.metrics["after"]["exact_scales"] - step.metrics["before"]["exact_scales"] == 9
    moved = scaled(after)
    check(moved)
    assert difference(after, moved) == 0, "powers of two change no bit"


@pytest.mark.parametrize("opset", [8, 10, 12])
def test_old_opsets(opset: int) -> None:
    after, step = expose(program(mlp(f"opset {opset}", 0.0, 6.0, opset=opset)), ON, exact=True)
    assert step.metrics["clips"] == 1 and "Min" in operators(after)


def test_opset_7_has_no_broadcasting_min() -> None:
    _, step = expose(program(mlp("opset 7", 0.0, 6.0, opset=7)), ON)
    assert not step.changed and "opset 7 has no Min that broadcasts" in step.summary


def test_images() -> None:
    """A depthwise chain as in MobileNet: bounds of shape (C, 1, 1)."""
    net = Net("inverted")
    x = net.image(3, 6)
    for n_in, n_out, k, group in ((3, 8, 1, 1), (8, 8, 3, 8)):
        x = net.op("Clip", net.conv(x, n_in, n_out, k, group), net.const(0.0), net.const(6.0))
    net.classify(net.conv(x, 8, 5, 1), 5)
    after, step = expose(program(net), ON, exact=True)
    assert step.metrics["clips"] == 2
    bounds = [name for name in after.model.graph.initializers if name.endswith("_high")]
    assert [array_of(after, name).shape for name in bounds] == [(8, 1, 1)] * 2
    assert difference(after, scaled(after)) == 0


def test_sequences_and_a_residual_stream() -> None:
    """Along the last axis; where a sum shares its scale with another clip, both are written anew or none."""
    net = Net("residual")
    x = net.linear(net.input("x", ["N", "L", 4]), 4, 6)
    a = net.op("Clip", x, net.const(0.0), net.const(6.0))
    b = net.op("Clip", net.linear(a, 6, 6), net.const(0.0), net.const(1.0))
    net.output(net.linear(net.op("Add", a, b), 6, 3), ["N", "L", 3])
    after, step = expose(program(net), ON, exact=True)
    assert step.metrics["clips"] == 2
    assert difference(after, scaled(after)) == 0


def test_half_precision() -> None:
    after, step = expose(program(mlp("half", 0.0, 6.0, dtype="float16")), ON, exact=True)
    assert step.metrics["clips"] == 1
    (bound,) = [name for name in after.model.graph.initializers if name.endswith("_high")]
    assert array_of(after, bound).dtype == np.float16


# --- left alone -----------------------------------------------------------------------------------


def untouched(net: Net, options: str = ON) -> str:
    _, step = expose(program(net), options)
    assert not step.changed
    return step.summary


def test_off_by_default() -> None:
    untouched(mlp("default", 0.0, 6.0), "")
    untouched(mlp("default odd", -1.0, 1.0), "")
    untouched(mlp("only odd", 0.0, 6.0), "hardtanh=true")
    untouched(mlp("only six", -1.0, 1.0), "relu6=true")


def test_scales_end_elsewhere() -> None:
    """A Sigmoid behind allows none, so nothing would be gained."""
    net = Net("sigmoid")
    x = net.op("Clip", net.linear(net.input("x", ["N", 4]), 4, 9), net.const(0.0), net.const(6.0))
    net.output(net.linear(net.op("Sigmoid", x), 9, 3), ["N", 3])
    assert untouched(net) == "1 clip kept: scales end elsewhere on its units"


def test_one_of_two() -> None:
    """Only the clip that gains is written anew."""
    net = Net("one of two")
    x = net.op("Clip", net.linear(net.input("x", ["N", 4]), 4, 9), net.const(0.0), net.const(6.0))
    y = net.op("Clip", net.linear(net.op("Sigmoid", x), 9, 5), net.const(0.0), net.const(6.0))
    net.output(net.linear(y, 5, 3), ["N", 3])
    after, step = expose(program(net), ON, exact=True)
    assert step.metrics["clips"] == 1 and operators(after).count("Clip") == 1


@pytest.mark.parametrize("bounds", [(0.0, None), (None, 0.0), (None, None)])
def test_scales_pass_as_it_is(bounds: tuple[Any, Any]) -> None:
    assert untouched(mlp("free", *bounds)) == "nothing to expose"


def test_computed_bound() -> None:
    net = Net("computed")
    bound = net.input("bound", [])
    x = net.op("Clip", net.linear(net.input("x", ["N", 4]), 4, 9), net.const(0.0), bound)
    net.output(net.linear(x, 9, 3), ["N", 3])
    assert untouched(net) == "nothing to expose"


def test_no_units() -> None:
    net = Net("input")
    x = net.op("Clip", net.input("x", ["N", 4]), net.const(0.0), net.const(6.0))
    net.output(net.linear(x, 4, 3), ["N", 3])
    assert "no units along exactly one axis" in untouched(net)


def test_symmetric_clips_trade_signs_for_scales() -> None:
    before = program(mlp("odd", -1.0, 1.0))
    after, _ = expose(before, ON, exact=True)
    assert (directions(before)["signs"], directions(before)["free_scales"]) == (9, 0)
    assert (directions(after)["signs"], directions(after)["free_scales"]) == (0, 9)


def test_a_relu_in_its_place_is_caught() -> None:
    """Negative control: without the bound the outputs differ."""
    before = program(mlp("control", 0.0, 0.5))
    after, _ = expose(before, ON, exact=True)
    model = after.emit()
    (node,) = [one for one in model.graph if one.op_type == "Min"]
    bound = node.inputs[1]
    assert bound is not None and bound.name is not None
    unbounded = Program.of(model).refit({bound.name: np.full(9, 1e9, np.float32)})
    assert difference(before, unbounded) > 1e-2
