"""Importance from gradients: derivatives against finite differences, scores against what leaving a unit out changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.models.dead_units import program_of
from tests.models.importance_nets import (
    FAINT,
    attention,
    one_hidden_layer,
    planted,
    program,
    samples,
    scaled_readers,
    scores,
    stream,
)
from tests.zoo.net import Net

from cipm_ir.errors import InputError, SymmetryError, UnsupportedError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.importance.gradient import Taylor
from cipm_ir.passes.pruning.importance.reads import find_reads
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers
from cipm_ir.symmetry.space import Space

pytest.importorskip("torch")
from cipm_ir.backends.torch.gradients import products

NAMES = ("taylor", "taylor2", "fisher")
Floats = NDArray[np.float64]


def on(made: Program, count: int = 64, seed: int = 0) -> Context:
    return Context(data=samples(made, count, seed), options={"gradients": products}, seed=seed)


def output(made: Program, feeds: dict[str, NDArray[Any]]) -> Floats:
    return next(iter(run(made.model, feeds).values())).astype(np.float64)


def without(made: Program, space: Space, element: int) -> Program:
    return made.restrict({space: np.delete(np.arange(space.size), element)})


def divergence(a: Floats, b: Floats) -> float:
    """Mean KL of the predictions that two arrays of logits stand for."""
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (a, b))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


# ---------------------------------------------------------------- derivatives
@pytest.mark.parametrize("build", [stream, attention, one_hidden_layer])
def test_derivatives_are_finite_differences(build: Any) -> None:
    """Units, a residual stream with several readers, and heads: each scaled at everything that reads it.

    The model gives one number for a sample, so the sign that is drawn drops out of the square.
    """
    made = build()
    feeds = samples(made, 12)
    found = scores(Taylor("test", loss="output", size=5), made, on(made, 12))
    step, checked = 1e-2, []
    for space in made.spaces:
        if not _readable(made, space):
            continue  # queries and keys: no weight reads them
        wanted = []
        for k in range(space.size):
            up, down = (output(scaled_readers(made, space, k, 1 + s * step), feeds) for s in (1, -1))
            wanted.append(0.5 * np.square((up - down) / (2 * step)).mean())
        np.testing.assert_allclose(found[space.name], wanted, rtol=2e-2, atol=1e-6, err_msg=space.name)
        checked.append(space.kind)
    assert "units" in checked and ("blocks" in checked) == (build is attention)


def _readable(made: Program, space: Space) -> bool:
    try:
        readers(made, space)
    except SymmetryError:
        return False
    return True


def test_gradients_of_the_value_itself_would_be_wrong_on_a_stream() -> None:
    """The control: what flows on through the stream counts once for each reader, so reads must be kept apart."""
    made = stream()
    reads = find_reads(made)
    space = next(s for s in made.spaces if s.size == 6)
    apart = scores(Taylor("test", loss="output"), made, on(made))[space.name]
    first = [r for r, _ in reads.first() if r.axes == (1,)]
    batch = next(products(made.model, first, samples(made, 64), loss="output", size=64))
    mine = reads.of(space)
    each = [
        0.5 * np.square(matrix.T @ sums.T)[mine].mean(axis=1)
        for sums, (_, matrix) in zip(batch.sums, reads.first(), strict=True)
    ]
    assert not np.allclose(np.sum(each, axis=0), apart, rtol=0.05)  # derivatives are added before they are squared


# ---------------------------------------------------------------- against leaving out
def test_first_order_is_exact_where_the_rest_is_linear() -> None:
    made = one_hidden_layer()
    space, feeds = made.spaces[0], samples(made, 64)
    dense = output(made, feeds)
    found = scores(Taylor("test", order=1, loss="output"), made, on(made))[space.name]
    change = [np.abs(output(without(made, space, k), feeds) - dense).mean() for k in range(space.size)]
    np.testing.assert_allclose(found, change, rtol=1e-3)


def test_second_order_is_the_squared_change_where_the_rest_is_linear() -> None:
    made = one_hidden_layer(outputs=4)
    space, feeds = made.spaces[0], samples(made, 200)
    dense = output(made, feeds)
    change = [0.5 * np.square(output(without(made, space, k), feeds) - dense).sum(1).mean() for k in range(space.size)]
    found = scores(Taylor("test", loss="output", draws=60), made, on(made, 200))[space.name]
    np.testing.assert_allclose(found, change, rtol=0.1)
    once = scores("taylor2", made, on(made, 200))[space.name]
    np.testing.assert_allclose(once, change, rtol=0.4)  # two draws for each sample: unbiased, but noisy


def test_fisher_is_the_divergence_for_small_changes() -> None:
    """Within 15% where no unit moves the logits far, and no longer where they do (the control)."""
    errors = []
    for faint in (0.1, 3.0):
        made = one_hidden_layer(outputs=4, faint=faint)
        space, feeds = made.spaces[0], samples(made, 200)
        dense = output(made, feeds)
        rise = np.array([divergence(dense, output(without(made, space, k), feeds)) for k in range(space.size)])
        found = scores(Taylor("test", draws=60), made, on(made, 200))[space.name]
        errors.append(np.abs(found / rise - 1).max())
    assert errors[0] < 0.15 < errors[1]


def test_deep_units_are_ranked_as_leaving_them_out_does() -> None:
    """Two layers below the output: each prediction within a factor of 4, and the order much like the true one."""
    made = planted()
    space, feeds = made.spaces[0], samples(made, 128)
    dense = output(made, feeds)
    rise = np.array([divergence(dense, output(without(made, space, k), feeds)) for k in range(space.size)])
    found = scores("fisher", made, on(made, 128))[space.name]
    others = np.delete(np.arange(12), FAINT)
    assert (np.abs(np.log(found[others] / rise[others])) < np.log(4)).all(), found / rise
    order = np.corrcoef(np.argsort(np.argsort(found)), np.argsort(np.argsort(rise)))[0, 1]
    chance = scores("random", made, on(made))[space.name]
    assert order > 0.85 > np.corrcoef(np.argsort(np.argsort(chance)), np.argsort(np.argsort(rise)))[0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_faint_units_come_last(name: str) -> None:
    made = planted()
    found = scores(name, made, on(made))[made.spaces[0].name]
    assert set(np.argsort(found)[:3].tolist()) == set(FAINT)
    assert found[list(FAINT)].max() < 0.05 * np.delete(found, FAINT).min()


@pytest.mark.parametrize("name", NAMES)
def test_prune_keeps_what_matters(name: str) -> None:
    made = planted()
    kept = Prune(ratio=0.13, importance=name, scope="global").run(made, on(made)).witness["kept"]
    assert not set(FAINT) & set(kept[made.spaces[0].name].tolist())


# ---------------------------------------------------------------- invariance
@pytest.mark.parametrize("build", [stream, attention, lambda: one_hidden_layer(outputs=3), planted])
@pytest.mark.parametrize("name", NAMES)
def test_scores_move_with_units_and_ignore_scales(build: Any, name: str) -> None:
    made = build()
    elements = {s: s.random(np.random.default_rng(3)) for s in made.spaces if s.kind != "blocks"}
    moved = made.act(elements)
    before, after = scores(name, made, on(made)), scores(name, moved, on(moved))
    for space, element in elements.items():
        np.testing.assert_allclose(after[space.name], before[space.name][element.perm], rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter_where_no_sign_does(name: str) -> None:
    made = attention()
    a, b = (Taylor("test", order=2, loss="output", size=size) for size in (7, 64))
    first, second = scores(a, made, on(made, 21)), scores(b, made, on(made, 21))
    for space in first:
        np.testing.assert_allclose(first[space], second[space], rtol=1e-3)


def test_samples_that_do_not_lie_first() -> None:
    """A model that works on (time, samples, width) inside: derivatives stay apart by sample."""
    net = Net("time_first")
    x = net.op("Transpose", net.input("x", ["N", 4, 5]), perm=[1, 0, 2])
    hidden = net.op("Tanh", net.linear(x, 5, 8))
    mean = net.op("ReduceMean", net.op("Tanh", net.linear(hidden, 8, 6)), net.const([0]), keepdims=0)
    net.output(net.gemm(mean, 6, 1), ["N", 1])
    made = program(net)
    reads = find_reads(made).reads
    assert {r.samples for r in reads} == {0, 1}
    together = scores(Taylor("test", loss="output", size=64), made, on(made, 20))
    alone = scores(Taylor("test", loss="output", size=1), made, on(made, 20))
    for space in alone:
        np.testing.assert_allclose(together[space], alone[space], rtol=1e-3)


def test_limit_and_seed() -> None:
    made = one_hidden_layer(outputs=3)
    data = samples(made, 40)
    data["x"][20:] = 0.0
    few = Context(data=data, options={"gradients": products})
    half = Context(data={"x": data["x"][:20]}, options={"gradients": products})
    limited = scores(Taylor("test", limit=20, size=10), made, few)
    np.testing.assert_array_equal(limited["w_1"], scores(Taylor("test", size=10), made, half)["w_1"])
    again = Context(data=data, options={"gradients": products}, seed=1)
    assert not np.array_equal(limited["w_1"], scores(Taylor("test", limit=20, size=10), made, again)["w_1"])


def test_a_limit_within_a_batch_is_kept() -> None:
    """Fifteen samples in batches of ten are fifteen: what comes behind them has no say."""
    made = one_hidden_layer(outputs=3)
    data = samples(made, 40)
    fifteen = {"x": data["x"][:15]}
    exact = scores(Taylor("test", size=10), made, Context(data=fifteen, options={"gradients": products}))
    limited, more = (
        scores(Taylor("test", limit=n, size=10), made, Context(data=data, options={"gradients": products}))
        for n in (15, 20)
    )
    np.testing.assert_array_equal(limited["w_1"], exact["w_1"])
    assert not np.array_equal(limited["w_1"], more["w_1"])


# ---------------------------------------------------------------- predictions
@pytest.mark.parametrize("last", ["", "Softmax", "LogSoftmax"])
def test_probabilities_and_logits_are_the_same_prediction(last: str) -> None:
    net = Net("prediction")
    logits = net.gemm(net.relu(net.gemm(net.input("x", ["N", 6]), 6, 8)), 8, 5)
    net.output(net.op(last, logits, axis=1) if last else logits, ["N", 5])
    found = scores("fisher", made := program(net), on(made))["w_1"]
    plain = Net("prediction")
    plain.output(plain.gemm(plain.relu(plain.gemm(plain.input("x", ["N", 6]), 6, 8)), 8, 5), ["N", 5])
    wanted = scores("fisher", program(plain), on(made))["w_1"]
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_one_logit_and_one_probability_are_a_yes_or_no() -> None:
    """½ p (1 − p) (Δ logit)² to second order, whichever of the two the model gives out."""
    made = one_hidden_layer(faint=0.1)
    space, feeds = made.spaces[0], samples(made, 200)
    dense = output(made, feeds)[:, 0]
    p = 1 / (1 + np.exp(-dense))
    change = [output(without(made, space, k), feeds)[:, 0] - dense for k in range(space.size)]
    wanted = [0.5 * (p * (1 - p) * np.square(c)).mean() for c in change]
    found = scores(Taylor("test", draws=40), made, on(made, 200))[space.name]
    np.testing.assert_allclose(found, wanted, rtol=0.1)


# ---------------------------------------------------------------- refusals
def test_operators_without_torch_are_named() -> None:
    made = program_of("contrib_op")
    with pytest.raises(UnsupportedError, match=r"'fisher' needs gradients: node .* \(BiasGelu\) cannot be written"):
        scores("fisher", made, on(made))


def test_outputs_that_are_integers() -> None:
    net = Net("argmax")
    scored = net.gemm(net.relu(net.gemm(net.input("x", ["N", 6]), 6, 8)), 8, 5)
    net.output(net.op("ArgMax", scored, axis=1), ["N", 1], elem=7)
    made = program(net)
    with pytest.raises(UnsupportedError, match="need an output of real numbers"):
        scores("taylor", made, on(made))


def test_rounding_ends_gradients() -> None:
    made = program_of("qdq_conv_net")
    with pytest.raises(UnsupportedError, match="no gradient comes there, since that of QuantizeLinear is zero"):
        scores("taylor", made, on(made))


def test_bad_samples() -> None:
    made = one_hidden_layer()
    data = samples(made, 8)
    data["x"][3, 0] = np.inf
    with pytest.raises(InputError, match="NaN or infinite on samples 0 to 7"):
        scores("taylor", made, Context(data=data, options={"gradients": products}))
    with pytest.raises(InputError, match="no samples"):
        scores("taylor", made, Context(data={"x": data["x"][:0]}, options={"gradients": products}))


def test_the_model_is_not_changed() -> None:
    made = stream()
    before = ir.to_proto(made.emit()).SerializeToString()
    scores("fisher", made, on(made))
    assert ir.to_proto(made.emit()).SerializeToString() == before
