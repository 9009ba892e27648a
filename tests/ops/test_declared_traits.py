"""Each declared trait makes passes find more, and without it they are conservative."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto
from tests.models.compress_nets import program, values
from tests.zoo.net import Net

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ops import load_rules, registry
from cipm_ir.passes import AbsorbBias, Context, Fold, RemoveDead
from cipm_ir.symmetry.program import Program


def without(monkeypatch: pytest.MonkeyPatch, trait: str, name: str) -> None:
    """Take a trait from one operator."""
    load_rules()
    entry = registry._REGISTRY["", name]
    fields = {"moves": ("moves", "linear", "shifts", "positionwise", "mergeable"), "pools": ("pools", "mergeable")}
    nothing: dict[str, Any] = {field: None if field == "pads" else False for field in fields.get(trait, (trait,))}
    monkeypatch.setitem(registry._REGISTRY, ("", name), dataclasses.replace(entry, **nothing))


def shifted(between: Callable[[Net, str], str], *, padded: bool = False) -> Net:
    """A Relu of units that are always on, something, and a convolution that can take up what they are shifted by."""
    net = Net("shifted")
    x = net.op("Tanh", net.image())
    h = net.op("Conv", x, net.weight((8, 3, 3, 3), 27), net.const(np.full(8, 50.0)), kernel_shape=[3, 3])
    h = between(net, net.relu(h))
    y = net.conv(h, 8, 4) if padded else net.conv(h, 8, 4, k=1)
    net.output(y, ["N", 4, "h", "w"])
    return net


def as_it_is(_net: Net, x: str) -> str:
    return x


def pooled(net: Net, x: str) -> str:
    return net.op("MaxPool", x, kernel_shape=[2, 2])


def measured(net: Net, x: str) -> str:
    """The shape is an output of the model."""
    net.output(net.op("Shape", x), [4], TensorProto.INT64)
    return x


def beside_zeros(net: Net, x: str) -> str:
    return net.op("Concat", x, net.op("ConstantOfShape", net.op("Shape", x)), axis=2)


def beside_units(net: Net, x: str) -> str:
    """Other units beside these: the constants stay whole."""
    other = net.op("Conv", "x", net.weight((8, 3, 3, 3), 27), kernel_shape=[3, 3])
    joined = net.op("Concat", x, other, axis=1)
    return net.op("Slice", joined, *(net.const([k]) for k in (0, 8, 1)))


def moved(net: Net) -> int:
    """How many units `absorb-bias` shifts; that nothing changes is checked."""
    made = program(net)
    result = AbsorbBias().run(made, Context(original=made))
    data = {"x": np.random.default_rng(0).standard_normal((20, 3, 6, 6)).astype(np.float32)}
    for a, b in zip(values(made, data), values(result.program, data), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    return 8 if result.changed else 0


@pytest.mark.parametrize(
    ("trait", "name", "between"), [("shifts", "MaxPool", pooled), ("sizes_only", "Shape", measured)]
)
def test_constants_pass_what_says_so(
    trait: str, name: str, between: Callable[[Net, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = shifted(between)
    assert moved(net) == 8
    without(monkeypatch, trait, name)
    assert moved(net) == 0


def test_constants_stop_where_numbers_are_put_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros at the border, by padding or by Concat, are not shifted; control: Concat of units with units."""
    assert moved(shifted(as_it_is)) == 8
    assert moved(shifted(as_it_is, padded=True)) == 0
    assert moved(shifted(beside_zeros)) == 0
    assert moved(shifted(beside_units)) == 8
    without(monkeypatch, "pads", "Conv")
    with pytest.raises(AssertionError):  # the trait is what stops it
        moved(shifted(as_it_is, padded=True))


def duplicates(between: Callable[[Net, str], str]) -> Net:
    """Of eight units two are equal."""
    net = Net("duplicates")
    weight = net.rng.standard_normal((8, 3, 3, 3)) / 5
    weight[5] = weight[2]
    h = net.relu(net.op("Conv", net.image(), net.const(weight), kernel_shape=[3, 3]))
    net.output(net.op("Gemm", between(net, h), net.weight((8, 4), 8)), ["N", 4])
    return net


def averaged(net: Net, x: str) -> str:
    return net.op("ReduceMean", x, net.const([2, 3]), keepdims=0)


def flattened(net: Net, x: str) -> str:
    return net.op("Flatten", net.op("GlobalAveragePool", x))


def merged(net: Net) -> int:
    made = program(net)
    result = Fold().run(made, Context(original=made)).program
    data = {"x": np.random.default_rng(0).standard_normal((20, 3, 6, 6)).astype(np.float32)}
    np.testing.assert_allclose(values(made, data)[0], values(result, data)[0], atol=1e-5)
    return 8 - next(s.size for s in result.spaces)


@pytest.mark.parametrize(
    ("trait", "name", "between"),
    [
        ("reduces", "ReduceMean", averaged),
        ("moves", "Flatten", flattened),
        ("pools", "GlobalAveragePool", flattened),
    ],
)
def test_equal_units_are_merged_behind_what_says_so(
    trait: str, name: str, between: Callable[[Net, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = duplicates(between)
    assert merged(net) == 1
    without(monkeypatch, trait, name)
    assert merged(net) == 0


def test_dead_units_are_found_behind_reductions_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("dead")
    h = net.relu(net.op("Conv", net.image(), net.weight((8, 3, 3, 3), 27), kernel_shape=[3, 3]))
    last = net.rng.standard_normal((8, 4))
    last[3] = 0.0
    net.output(net.op("Gemm", averaged(net, h), net.const(last)), ["N", 4])
    made = program(net)

    def left() -> int:
        fresh = Program.of(made.emit())
        return next(s.size for s in RemoveDead().run(fresh, Context(original=fresh)).program.spaces)

    assert left() == 7
    without(monkeypatch, "reduces", "ReduceMean")
    assert left() == 8


def test_a_basis_changes_behind_what_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("linear")
    h = net.op("Neg", net.gemm(net.input("x", ["N", 4]), 4, 8))
    net.output(net.op("MatMul", h, net.weight((8, 3), 8)), ["N", 3])
    made = program(net)
    assert [s.dense for s in made.spaces] == ["GL"]
    without(monkeypatch, "linear", "Neg")
    assert [s.dense for s in Program.of(ir.from_proto(net.model())).spaces] == [""]


def test_what_is_not_said_to_be_free_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("free")
    net.output(net.op("Neg", net.gemm(net.input("x", ["N", 4]), 4, 8)), ["N", 8])
    assert not program(net).count({}).unknown
    without(monkeypatch, "free", "Neg")
    assert [one.op for one in program(net).count({}).unknown] == ["Neg"]


def test_an_operator_without_an_entry_has_no_traits() -> None:
    node = ir.Node("elsewhere", "Nothing", [])
    entry = registry.entry_of(node)
    assert not any(getattr(entry, trait) for trait in registry.Traits.__annotations__)
    with pytest.raises(UnsupportedPattern):
        entry.labels(None)  # type: ignore[arg-type]
