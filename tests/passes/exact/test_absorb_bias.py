"""High-bias folding: exact where bounds prove it, within the reported bound where data say so, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tests import zoo
from tests.symmetry.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.errors import OptionError
from cipm_ir.passes.exact.absorb_bias.absorb_bias import AbsorbBias, proven
from cipm_ir.passes.exact.absorb_bias.sites import find_places
from cipm_ir.passes.framework.base import Context, Kind, PassResult
from cipm_ir.passes.framework.pipeline import run_passes
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]


def high(net: Net, size: int) -> str:
    """A bias that lifts most units well above zero, and a few below."""
    array = net.rng.uniform(6.0, 9.0, size)
    array[::4] = net.rng.uniform(-1.0, 0.5, array[::4].shape)
    return net.const(array, "lift")


def squashed(net: Net) -> str:
    """(N, 8) within [0, 1]."""
    return net.op("Sigmoid", net.gemm(net.input("x", ["N", 5]), 5, 8))


def lifted(act: str, style: str = "gemm", source: Callable[[Net], str] = squashed, **attributes: Any) -> Net:
    """source -> Linear with high biases -> act -> Linear -> Relu -> Linear."""
    net = Net(f"lifted_{act}_{style}")
    h, w = source(net), net.const(net.normal((8, 10), 0.5), "into")
    if style == "gemm":
        h = net.op("Gemm", h, w, high(net, 10))
    elif style == "batch_norm":
        h = net.op("MatMul", h, w)
        h = net.op(
            "BatchNormalization", h, net.positive((10,)), high(net, 10), net.bias(10, "mean"), net.positive((10,))
        )
    else:
        h = net.op("Add", net.op("MatMul", h, w), high(net, 10))
    extra = {"PRelu": [net.positive((10,), "slope")], "Clip": [net.const(0.0)]}.get(act, [])
    h = net.op(act, h, *extra, **attributes)
    read = net.op("MatMul", h, net.weight((10, 6), 10)) if style == "add" else net.gemm(h, 10, 6)
    net.output(net.gemm(net.relu(read), 6, 3), ["N", 3])
    return net


def plain(net: Net) -> str:
    """(N, 8) without bounds: the graph input itself."""
    return net.input("x", ["N", 8])


def samples(width: int, count: int = 64, seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)}


def run(model: onnx.ModelProto, data: Any = None, **options: Any) -> PassResult:
    return AbsorbBias(**options).run(program_of(model), Context(data=data))


def change(model: onnx.ModelProto, result: PassResult, feeds: dict[str, Array]) -> float:
    return largest_change(zoo.run(model, feeds), zoo.run(ir.to_proto(result.program.emit()), feeds))


def before_relu(program: Program, feeds: dict[str, Array], op: str) -> Array:
    """What enters the first node of this kind."""
    node = next(n for n in program.model.graph if n.op_type == op)
    name = node.inputs[0].name or "" if node.inputs[0] is not None else ""
    with Runner(program.model, extra_outputs=[name]) as runner:
        return np.asarray(runner.run(feeds, [name])[name])


# ---------------------------------------------------------------- exact
@pytest.mark.parametrize("style", ["gemm", "add", "batch_norm"])
@pytest.mark.parametrize("act", ["Relu", "LeakyRelu", "PRelu", "Clip"])
def test_what_bounds_prove_is_moved_and_nothing_changes(act: str, style: str) -> None:
    model = lifted(act, style).model()
    result = run(model)
    assert result.changed and result.kind is None and result.metrics["bound"] == 0.0
    assert result.metrics["units"] >= 5 and result.metrics["largest"] > 1.0
    for seed in range(3):
        feeds = {"x": 30.0 * samples(5, seed=seed)["x"]}
        assert change(model, result, feeds) <= 1e-5
    entering = before_relu(result.program, {"x": 30.0 * samples(5)["x"]}, act)
    moved = np.asarray(result.witness["shift"][next(iter(result.witness["shift"]))]) > 0
    assert (entering[:, moved] >= -1e-5).all(), "a moved unit is cut off"
    assert entering[:, moved].max() < before_relu(program_of(model), {"x": samples(5)["x"]}, act)[:, moved].max()


def test_constants_are_the_bounds(rng: np.random.Generator) -> None:
    """c is the least of b + sum of negative weights, as the Sigmoid before lies within [0, 1]."""
    model = lifted("Relu").model()
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    weight = next(a for n, a in arrays.items() if n.startswith("into"))
    bias = next(a for n, a in arrays.items() if n.startswith("lift"))
    want = np.maximum(bias + np.minimum(weight, 0).sum(axis=0), 0)
    (got, *_) = (np.asarray(c) for c in run(model).witness["shift"].values())
    assert np.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert (got <= want + 1e-6).all()


def test_a_later_layer_sees_what_the_first_gave_it() -> None:
    """Two lifted layers in a row: the bias of the second takes the first's constant before it gives its own."""
    net = Net("lifted_twice")
    h = squashed(net)
    for n_in, n_out in ((8, 10), (10, 12)):
        weight = net.const(np.abs(net.normal((n_in, n_out), 0.3)), "into")
        h = net.relu(net.op("Gemm", h, weight, high(net, n_out)))
    net.output(net.gemm(h, 12, 3), ["N", 3])
    result = run(net.model())
    assert result.metrics["spaces"] == 2
    assert change(net.model(), result, {"x": 10.0 * samples(5)["x"]}) <= 1e-5


def test_convolutions_without_padding() -> None:
    net = Net("lifted_conv")
    h = net.op("Sigmoid", net.conv(net.image(), 3, 6))
    h = net.op("Conv", h, net.const(net.normal((8, 6, 3, 3), 0.1)), high(net, 8), pads=[1] * 4)
    h = net.op("MaxPool", net.relu(h), kernel_shape=[2, 2], strides=[2, 2])
    h = net.relu(net.op("Conv", h, net.weight((6, 8, 1, 1), 8), net.bias(6)))
    net.classify(h, 6)
    model = net.model()
    result = run(model)
    assert result.changed
    feeds = {"x": 5 * np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    assert change(model, result, feeds) <= 1e-5


@pytest.mark.parametrize("name", ["mlp_relu", "conv_pool", "depthwise", "residual_blocks", "resnet20", "vit"])
def test_nothing_is_proven_for_unbounded_inputs(name: str) -> None:
    model = zoo.build_or_skip(name)
    result = run(model)
    assert not result.changed or change(model, result, zoo.feeds(name, model)) <= 1e-5


# ---------------------------------------------------------------- with data
def test_observed_is_exact_on_the_data_and_bounded_elsewhere() -> None:
    model, data = lifted("Relu", source=plain).model(), samples(8)
    assert not run(model).changed
    result = run(model, data, observed=True)
    assert result.changed and result.kind is Kind.APPROXIMATE
    assert result.metrics["units"] >= 5 and result.metrics["cut"] == 0.0
    assert change(model, result, data) <= 1e-5
    entering = before_relu(result.program, data, "Relu")
    shift = np.asarray(next(iter(result.witness["shift"].values())))
    assert np.allclose(entering.min(axis=0)[shift > 0], 0.0, atol=1e-5), "c could be larger"
    assert result.metrics["bound"] == pytest.approx(max(np.max(c) for c in result.witness["shift"].values()))
    assert change(model, result, {"x": 20.0 * data["x"]}) > 1e-3  # where z < c it is not exact


def test_error_of_a_unit_is_at_most_its_constant() -> None:
    """relu(z - c) + c - relu(z) lies in [0, c]: read from outputs that show the units one by one."""
    net = Net("lifted_shown")
    h = net.relu(net.op("Gemm", plain(net), net.const(net.normal((8, 10), 0.5), "into"), high(net, 10)))
    net.output(net.op("Gemm", h, net.const(np.eye(10)), net.const(np.zeros(10))), ["N", 10])
    model, data = net.model(), samples(8)
    result = run(model, data, observed=True)
    wild = {"x": 30.0 * data["x"]}
    error = zoo.run(ir.to_proto(result.program.emit()), wild)[0] - zoo.run(model, wild)[0]
    shift = np.asarray(next(iter(result.witness["shift"].values())))
    assert error.max() > 1.0
    assert (error >= -1e-4).all() and (error <= shift + 1e-4).all()


def test_quantile_cuts_off_what_it_says() -> None:
    model, data = lifted("Relu", source=plain).model(), samples(8, 400)
    none, some = (run(model, data, observed=True, quantile=q) for q in (0.0, 0.05))
    assert some.metrics["largest"] > none.metrics["largest"]
    assert 0.03 <= some.metrics["cut"] <= 0.07
    assert 0 < some.metrics["cut_worst"] <= some.metrics["bound"]
    assert 1e-5 < change(model, some, data) < 0.2
    assert "cut off" in some.summary


def test_in_a_pipeline_the_error_is_measured() -> None:
    model, data = lifted("Relu", source=plain).model(), samples(8, 40)
    outcome = run_passes(program_of(model), "absorb-bias{observed=true, quantile=0.1}", data=data)
    (step,) = outcome.report.steps
    assert step.kind == "approximate" and step.checked == "measured"
    exact = run_passes(program_of(lifted("Relu").model()), "absorb-bias")
    assert exact.report.steps[0].kind == "exact" and exact.report.steps[0].checked == "verified"


# ---------------------------------------------------------------- refused
def refusals(net: Net) -> dict[str, str]:
    result = run(net.model())
    assert not result.changed
    return dict(result.metrics["refused"])


def test_zero_padding_is_refused() -> None:
    net = Net("lifted_padded")
    h = net.op("Sigmoid", net.conv(net.image(), 3, 6))
    h = net.relu(net.op("Conv", h, net.const(net.normal((8, 6, 1, 1), 0.1)), high(net, 8)))
    net.classify(net.relu(net.conv(h, 8, 6)), 6)
    assert any("border" in why for why in refusals(net).values())


def test_residual_sums_are_refused() -> None:
    net = Net("lifted_residual")
    h = net.relu(net.op("Gemm", squashed(net), net.const(net.normal((8, 8), 0.1)), high(net, 8)))
    h = net.op("Add", h, net.gemm(h, 8, 8))
    net.output(net.gemm(h, 8, 3), ["N", 3])
    assert any("Add" in why for why in refusals(net).values())


def test_shown_shared_and_missing_biases_are_refused() -> None:
    shown = Net("lifted_output")
    h = shown.relu(shown.op("Gemm", squashed(shown), shown.const(shown.normal((8, 8), 0.1)), high(shown, 8)))
    both = shown.op("Concat", h, shown.op("Sigmoid", h), axis=1)
    shown.output(shown.gemm(both, 16, 3), ["N", 3])
    assert any("Sigmoid" in why for why in refusals(shown).values())
    shared = Net("lifted_shared")
    h, bias = squashed(shared), high(shared, 8)
    for _ in range(2):
        h = shared.relu(shared.op("Gemm", h, shared.const(np.abs(shared.normal((8, 8), 0.1))), bias))
    shared.output(shared.gemm(h, 8, 3), ["N", 3])
    assert any("shared" in why for why in refusals(shared).values())
    missing = Net("lifted_missing")
    h = missing.relu(missing.op("MatMul", squashed(missing), missing.const(np.abs(missing.normal((8, 8), 1.0)))))
    missing.output(missing.gemm(h, 8, 3), ["N", 3])
    assert any("no bias" in why for why in refusals(missing).values())


def test_a_value_read_twice_is_refused() -> None:
    net = Net("lifted_forked")
    z = net.op("Gemm", squashed(net), net.const(net.normal((8, 8), 0.1)), high(net, 8))
    h = net.gemm(net.relu(z), 8, 6)
    net.output(net.gemm(net.op("Add", h, net.gemm(net.op("Tanh", z), 8, 6)), 6, 3), ["N", 3])
    assert any("elsewhere" in why for why in refusals(net).values())


def test_options() -> None:
    with pytest.raises(OptionError, match="data"):
        run(lifted("Relu").model(), observed=True)
    with pytest.raises(OptionError, match="observed"):
        run(lifted("Relu").model(), quantile=0.1)
    with pytest.raises(OptionError, match="quantile"):
        AbsorbBias(quantile=0.9)


# ---------------------------------------------------------------- controls
def test_a_constant_that_is_not_given_back_is_seen() -> None:
    """Negative control: the bias alone is lowered, its readers are left as they are."""
    model = lifted("Relu").model()
    program = program_of(model)
    (place, *_), _ = find_places(program)
    name = program.spaces[place.space].name
    c = proven(program, [place])[name]
    value = program.model.graph.initializers[place.bias].const_value
    assert value is not None and c.max() > 1.0
    broken = program.refit({place.bias: (np.asarray(value.numpy()) - c).astype(np.float32)})
    feeds = samples(5)
    assert largest_change(zoo.run(model, feeds), zoo.run(ir.to_proto(broken.emit()), feeds)) > 1e-2


def test_a_bound_that_is_too_high_is_seen() -> None:
    """Negative control: twice the proven constant cuts units off."""
    model = lifted("Relu").model()
    program = program_of(model)
    (place, *_), _ = find_places(program)
    space = program.spaces[place.space]
    c = 2 * proven(program, [place])[space.name]
    value = program.model.graph.initializers[place.bias].const_value
    assert value is not None
    lowered = program.refit({place.bias: (np.asarray(value.numpy()) - c).astype(np.float32)})
    wrong = lowered.absorb(lowered.space(space.name), np.arange(space.size), np.eye(space.size), c)
    feeds = {"x": 30.0 * samples(5)["x"]}
    assert largest_change(zoo.run(model, feeds), zoo.run(ir.to_proto(wrong.emit()), feeds)) > 1e-3
