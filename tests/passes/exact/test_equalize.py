"""`equalize` on whole models: nothing changes bit by bit, scrambled scales come back, and the report says so."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest
from tests import zoo
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.algebra import Element
from cipm_ir.errors import OptionError
from cipm_ir.passes import Equalize
from cipm_ir.passes.exact.canonicalize.members import Members
from cipm_ir.passes.exact.equalize.equalize import channels
from cipm_ir.passes.exact.equalize.terms import terms_of
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.framework.witness import undo
from cipm_ir.runtime.session import run as run_model
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

TRAINED = ["resnet20", "llama_gqa", "vit", "bert", "mobilenetv2_revived", "resnet_bottleneck"]


def load(name: str) -> Program:
    return Program.of(ir.from_proto(zoo.build_or_skip(name)))


def made(net: Net) -> Program:
    return Program.of(ir.from_proto(net.model()))


def scrambled(program: Program, seed: int = 0, spread: float = 1.5) -> Program:
    """Every exact scale multiplied by a power of two near e^N(0, spread)."""
    rng = np.random.default_rng(seed)
    chosen: dict[Space, Element] = {}
    for space in program.spaces:
        if space.group.scales and all(space.exact):
            power = np.rint(spread / np.log(2) * rng.standard_normal((space.group.scales, space.size)))
            chosen[space] = Element(
                np.arange(space.size), np.exp2(power), np.ones((space.group.signs, space.size), np.int8)
            )
    return program.act(chosen)


def run(program: Program, **options: Any) -> Any:
    return Equalize(**options).run(program, Context())


def outputs(program: Program, feeds: Any) -> list[Any]:
    return list(run_model(program.model, feeds).values())


def feeds_of(program: Program, name: str | None = None) -> dict[str, Any]:
    """Of a model of the zoo, or normal floats for 3 samples."""
    if name is not None:
        return dict(zoo.feeds(name, zoo.build_or_skip(name)))
    rng = np.random.default_rng(0)
    made = {}
    for value in program.model.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        made[value.name or ""] = rng.standard_normal(shape).astype(np.float32)
    return made


def value_of(program: Program, name: str) -> Any:
    tensor = program.model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


@pytest.mark.parametrize("name", TRAINED)
def test_scrambled_scales_come_back_bit_by_bit(name: str) -> None:
    """As good as without scrambling, to 0.2 dB, and every output the same bit for bit."""
    program = load(name)
    before = run(program).metrics.get("sqnr", [0.0, 0.0])
    wild = scrambled(program)
    result = run(wild)
    low, high = result.metrics["sqnr"]
    plain = before[1] if before[1] else run(program, exact=False).metrics["sqnr"][0]
    assert low < plain - 3
    assert high > plain - 0.2
    feeds = feeds_of(program, name)
    for x, y in zip(outputs(program, feeds), outputs(result.program, feeds), strict=True):
        assert x.tobytes() == y.tobytes()
    broken = Program.of(ir.from_proto(ir.to_proto(result.program.emit())))
    tensor = next(t for t in result.metrics["tensors"])
    weight = value_of(broken, tensor)
    nudged = broken.refit({tensor: weight * 1.01})  # the comparison would see it
    assert any(x.tobytes() != y.tobytes() for x, y in zip(outputs(program, feeds), outputs(nudged, feeds), strict=True))


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_real_scales_do_better_than_powers_of_two(per: str) -> None:
    program = load("resnet20")
    exact, real = (run(program, per=per, exact=flag) for flag in (True, False))
    assert real.metrics["sqnr"][1] > exact.metrics["sqnr"][1] + 0.1
    assert real.metrics["sqnr"][1] > real.metrics["sqnr"][0] + 0.5
    feeds = feeds_of(program, "resnet20")
    (x,), (y,) = outputs(program, feeds), outputs(real.program, feeds)
    assert 0 < np.abs(x - y).max() < 1e-5 * np.abs(x).max()


def gated() -> Net:
    """A gated unit, up * relu(gate), whose down projection shares its input with nothing; a residual stream around."""
    net = Net("equalize_gated")
    x = net.input("x", ("n", 6))
    stream = net.op("MatMul", x, net.weight((6, 8), 6))
    gate = net.op("Relu", net.op("MatMul", stream, net.weight((8, 12), 8)))
    up = net.op("MatMul", stream, net.weight((8, 12), 8))
    down = net.op("MatMul", net.op("Mul", up, gate), net.weight((12, 8), 12))
    total = net.op("Add", stream, down)
    net.output(net.op("MatMul", net.op("Relu", total), net.weight((8, 3), 8)), ("n", 3))
    return net


def concatenated() -> Net:
    """Two depthwise chains, concatenated, read by two consumers."""
    net = Net("equalize_concat")
    x = net.input("x", ("n", 3, 6, 6))
    parts = []
    for width in (4, 6):
        h = net.op("Relu", net.op("Conv", x, net.weight((width, 3, 1, 1), 3), net.bias(width)))
        h = net.op("Relu", net.op("Conv", h, net.weight((width, 1, 3, 3), 9), group=width, pads=[1, 1, 1, 1]))
        parts.append(h)
    both = net.op("Concat", *parts, axis=1)
    for k in (2, 3):
        net.output(net.op("Conv", both, net.weight((k, 10, 1, 1), 10)), ("n", k, 6, 6))
    return net


@pytest.mark.parametrize("build", [gated, concatenated])
def test_every_free_scale_takes_part(build: Any) -> None:
    """Gates, streams, depthwise kernels, pieces of a concatenation: one unit each made 64 times as large is found."""
    program = made(build())
    feeds = feeds_of(program)
    for space in program.spaces:
        for direction in range(space.group.scales):
            scale = np.ones((space.group.scales, space.size))
            scale[direction, 1] = 64.0
            wild = program.act(
                {space: Element(np.arange(space.size), scale, np.ones((space.group.signs, space.size), np.int8))}
            )
            back = run(wild)
            found = np.asarray(back.witness[space.name]["scale"])[direction]
            others = np.delete(found, 1)
            assert found[1] <= np.median(others) / 16
            for x, y in zip(outputs(program, feeds), outputs(back.program, feeds), strict=True):
                assert x.tobytes() == y.tobytes()


def test_shared_weights_take_one_scale() -> None:
    """A weight that two layers use stays one tensor; what cannot move without the other does not."""
    net = Net("equalize_tied")
    x = net.input("x", ("n", 6))
    shared = net.weight((6, 6), 6)
    h = net.op("Relu", net.op("MatMul", net.op("Relu", net.op("MatMul", x, shared)), shared))
    net.output(net.op("MatMul", h, net.weight((6, 2), 6)), ("n", 2))
    program = made(net)
    result = run(program, exact=False)
    assert result.program.model.graph.initializers.keys() == program.model.graph.initializers.keys()
    feeds = feeds_of(program)
    (a,), (b,) = outputs(program, feeds), outputs(result.program, feeds)
    assert np.allclose(a, b, rtol=1e-5)


def test_dead_units_keep_their_scale() -> None:
    net = Net("equalize_dead")
    x = net.input("x", ("n", 4))
    first = net.normal((4, 6), 1.0)
    first[:, 2] = 0.0
    first[:, 3] *= 256
    h = net.op("Relu", net.op("MatMul", x, net.const(first)))
    net.output(net.op("MatMul", h, net.weight((6, 3), 6)), ("n", 3))
    result = run(made(net))
    (entry,) = result.witness.values()
    assert entry["scale"][0][2] == 1.0
    assert entry["scale"][0][3] < 0.1


def test_report() -> None:
    program = load("resnet20")
    report = cipm_ir.optimize(program, ["equalize"]).report
    (step,) = report.steps
    assert step.error == 0.0
    metrics = step.metrics
    assert len(metrics["tensors"]) == 20
    space = program.spaces[0]
    entry = metrics["spaces"][space.name]
    assert entry["group"] == str(space.group) and entry["units"] == space.size
    assert sum(entry["histogram"].values()) == space.size * space.group.scales
    assert min(entry["histogram"]) == entry["log2_scale"][0]
    assert metrics["sqnr"][1] > metrics["sqnr"][0] + 0.3
    assert "equalize" in str(report) and "dB" in step.summary
    assert {figure.title for figure in step.figures} == {"Predicted weight SQNR", "Scales", "Spaces"}


def test_the_predicted_ratio_is_what_rounding_gives() -> None:
    program = load("resnet20")
    result = run(program, exact=False)
    for name, (_, told) in result.metrics["tensors"].items():
        w = value_of(result.program, name).astype(np.float64)
        step = np.abs(w).max() / 127
        noise = np.rint(w / step) * step - w
        assert told == pytest.approx(10 * np.log10(np.square(w).sum() / np.square(noise).sum()), abs=1.0)


def uneven() -> Program:
    """The second weight has a large column where its input is small, as networks have behind a batch normalization."""
    net = Net("equalize_uneven")
    x = net.input("x", ("n", 32))
    first, second = net.normal((32, 16), 1.0), net.normal((16, 8), 1.0)
    first[:, 3:] /= 64
    h = net.op("Relu", net.op("MatMul", x, net.const(first)))
    net.output(net.op("MatMul", h, net.const(second)), ("n", 8))
    return made(net)


def product_noise(program: Program, names: Any) -> float:
    """Mean over weights, in dB: noise in the output when one weight alone is rounded to int8."""
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((256, 32)).astype(np.float32)}
    (exact,) = outputs(program, feeds)
    found = []
    for name in names:
        w = value_of(program, name)
        step = np.abs(w).max() / 127
        (rough,) = outputs(program.refit({name: (np.rint(w / step) * step).astype(np.float32)}), feeds)
        found.append(10 * np.log10(np.square(exact).sum() / np.square(rough - exact).sum()))
    return float(np.mean(found))


def test_the_products_of_weights_are_what_gets_better() -> None:
    """The entries' own ratio falls here, and the noise in what the model computes does too: the report says both."""
    program = uneven()
    result = run(program)
    low, high = result.metrics["product_sqnr"]
    assert result.metrics["sqnr"][1] < result.metrics["sqnr"][0]
    measured = [product_noise(one, result.metrics["tensors"]) for one in (program, result.program)]
    assert measured[1] > measured[0] + 1
    assert high - low == pytest.approx(measured[1] - measured[0], abs=1.0)
    assert f"{low:.2f} -> {high:.2f} dB" in result.summary


def test_scales_that_make_it_worse_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(objective: Any, found: Any) -> Any:
        return np.where(np.arange(len(found)) % 2, 3, -3)

    monkeypatch.setattr("cipm_ir.passes.exact.equalize.equalize.rounded", bad)
    result = run(uneven())
    assert not result.changed and "would fall" in result.summary


def test_data_moves_the_scales_and_can_be_all_that_counts() -> None:
    """With alpha = 1 channels of activations become alike; without data alpha is not looked at."""
    program = load("resnet20")
    (name,) = (v.name for v in program.model.graph.inputs)
    x = np.random.default_rng(0).standard_normal((32, 3, 32, 32), np.float32)
    sources = {t.source for t in terms_of(Members(program, exact=True)) if t.source}

    def unevenness(one: Program) -> float:
        found = channels(one, sources, {name: x}, 32)
        spread = [np.std(np.log(peak[peak > 0])) for key, (_, peak) in found.items() if key != name]
        return float(np.mean(spread))

    made = [Equalize(exact=False, alpha=alpha).run(program, Context(data={name: x})).program for alpha in (0.0, 1.0)]
    assert unevenness(made[1]) < 0.6 * unevenness(program)
    assert unevenness(made[1]) < unevenness(made[0])
    plain = [Equalize(alpha=alpha).run(program, Context()).witness for alpha in (0.0, 1.0)]
    assert plain[0] == plain[1]


def test_the_witness_takes_it_back() -> None:
    program = load("vit")
    result = run(scrambled(program))
    again = undo(result.program, result.elements)
    wild = scrambled(program)
    for name in result.metrics["tensors"]:
        assert np.array_equal(value_of(wild, name), value_of(again, name))
        assert not np.array_equal(value_of(result.program, name), value_of(wild, name))


def test_nothing_to_do_and_wrong_options() -> None:
    net = Net("equalize_tanh")
    x = net.input("x", ("n", 4))
    net.output(
        net.op("MatMul", net.op("Tanh", net.op("MatMul", x, net.weight((4, 4), 4))), net.weight((4, 2), 4)), ("n", 2)
    )
    program = made(net)
    result = run(program)
    assert not result.changed and result.program is program
    for wrong in ({"alpha": 2.0}, {"per": "row"}, {"samples": 0}):
        with pytest.raises(OptionError):
            Equalize(**cast(Any, wrong))
