"""Units of LSTM, GRU and RNN go, and what reads them is refitted: input, recurrent and output weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests import zoo
from tests.models.compress_nets import array_of, gap, values
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.passes.pruning.refit.layers import layers_of
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import products

NAMES = ("lstm", "lstm_bidirectional", "lstm_states", "gru", "gru_linear_before_reset", "rnn")


def program_and_data(name: str) -> tuple[Program, Any, Any]:
    model = zoo.build(name)
    data, fresh = (zoo.feeds(name, model, seed, {"N": 64, "T": 12}) for seed in (0, 5))
    return Program.of(ir.from_proto(model)), data, fresh


def compress(made: Program, data: Any, **options: Any) -> PassResult:
    asked = {"params": 0.6, "steps": 4, "min_keep": 1, "round_to": 1, "plain": False, **options}
    return Compress(**asked).run(made, Context(data=data, original=made))


@pytest.mark.parametrize("name", NAMES)
def test_hidden_units_go_and_what_reads_them_is_refitted(name: str) -> None:
    made, data, fresh = program_and_data(name)
    result = compress(made, data)
    assert any("w_6" in space for space in result.witness["kept"]) and "feeds its units back" not in result.summary
    kept = {made.space(n): k for n, k in result.witness["kept"].items()}
    dense = values(made, fresh)[0]
    ours, plain = (gap(dense, values(p, fresh)[0]) for p in (result.program, made.restrict(kept)))
    assert ours < 0.7 * plain
    changed = Compensation(data).run(made, made.kept_classes(kept)).program
    (states,) = (x.reader.weight for x in layers_of(made) if x.reader.index == 2)
    assert (array_of(changed, states) != array_of(made, states)).any()


@pytest.mark.parametrize("name", ["lstm", "lstm_bidirectional", "gru"])
def test_a_layer_in_front_shrinks_too(name: str) -> None:
    """Its units are read by the input weights, which make up for those that go."""
    made, data, fresh = program_and_data(name)
    result = compress(made, data, params=0.85, include=("w_1",))
    ((space, kept),) = result.witness["kept"].items()
    assert space == "w_1" and len(kept) < 8
    dense = values(made, fresh)[0]
    ours, plain = (gap(dense, values(p, fresh)[0]) for p in (result.program, made.restrict({made.space("w_1"): kept})))
    assert ours < 0.7 * plain


@pytest.mark.parametrize("name", ["lstm", "lstm_bidirectional", "gru"])
def test_control_without_the_recurrent_weights_the_error_is_larger(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The units that stay lose what the others told them, unless the recurrent weight makes up for it."""
    made, data, fresh = program_and_data(name)
    kept = {made.space(n): k for n, k in compress(made, data).witness["kept"].items()}
    stays, dense, errors = made.kept_classes(kept), values(made, fresh)[0], []
    for blind in (False, True):
        if blind:
            monkeypatch.setattr("cipm_ir.passes.pruning.refit.compensation.layers_of", without_states)
        fitted = Compensation(data).run(made, stays).program
        small = fitted.restrict({fitted.space(space.name): k for space, k in kept.items()})
        errors.append(gap(dense, values(small, fresh)[0]))
    assert errors[0] < errors[1]


def without_states(made: Program) -> Any:
    return [layer for layer in layers_of(made) if not layer.linear.stored]


@pytest.mark.parametrize("name", ["lstm", "lstm_bidirectional", "gru", "rnn"])
def test_products_of_a_recurrent_layer(name: str, rng: np.random.Generator) -> None:
    """With the input: as numpy gives it. With the states: of the step before, or behind in the backward direction."""
    made, data, _ = program_and_data(name)
    inner, state = (x for x in products(made, every=True) if x.index == 2 or x.op in ("LSTM", "GRU", "RNN"))
    assert (inner.index, state.index) == (1, 2) and inner.key != state.key
    for reader in (inner, state):
        linear, array = LinearOpGeometry.of(made, reader), array_of(made, reader.weight)
        np.testing.assert_array_equal(linear.weight(linear.matrix(array)), array)
        u = values(made, data, reader.source)[0].astype(np.float32)
        ours = linear.inputs(u) @ linear.matrix(array)
        assert ours.shape == (linear.positions(u), array.shape[0] * array.shape[1])
        if reader is inner:
            theirs = np.einsum("tni,dgi->tndg", u, array)
        else:
            before = [u[:-1, 0], *([u[1:, 1]] if u.shape[1] == 2 else [])]
            theirs = np.stack([h @ w.T for h, w in zip(before, array, strict=True)], axis=2)
        np.testing.assert_allclose(ours, theirs.reshape(ours.shape), atol=1e-5)
        places = rng.choice(len(ours), 5, replace=False)
        np.testing.assert_array_equal(linear.inputs(u, places), linear.inputs(u)[places])


def test_a_step_at_a_time_shows_its_states() -> None:
    linear = LinearOpGeometry((8, 4), 1, stored=(1, 8, 4), backward=(False,))
    state = np.arange(12.0).reshape(1, 1, 3, 4)
    np.testing.assert_array_equal(linear.inputs(state), state.reshape(3, 4))
    assert linear.positions(state) == 3


def test_states_that_cannot_be_seen_stay() -> None:
    """Only the last state is given out: the units stay, and the reason is said."""
    net = Net("last")
    x = net.input("x", ["T", "N", 4])
    weights = [net.weight((1, 24, 4), 4), net.weight((1, 24, 6), 6), net.bias(48)]
    bias = net.op("Reshape", weights[2], net.const([1, 48]))
    _, last = net.multi("LSTM", [x, *weights[:2], bias], 2, hidden_size=6)
    net.nodes[-1].output[0] = ""
    net.output(net.op("MatMul", net.op("Squeeze", last, net.const([0])), net.weight((6, 3), 6)), ["N", 3])
    made = Program.of(ir.from_proto(net.model()))
    data = {"x": np.random.default_rng(0).standard_normal((12, 40, 4)).astype(np.float32)}
    with pytest.raises(SymmetryError, match="finds no units"):
        compress(made, [data])


def test_states_that_nothing_else_reads() -> None:
    """The first output has a name, and only the last state is used: it is computed for the fit all the same."""
    net = Net("named")
    h = net.op("Relu", net.op("MatMul", net.input("x", ["T", "N", 4]), net.weight((4, 8), 4)))
    weights = [net.weight((1, 18, 8), 8), net.weight((1, 18, 6), 6)]
    _, last = net.multi("GRU", [h, *weights], 2, hidden_size=6)
    net.output(net.op("MatMul", net.op("Squeeze", last, net.const([0])), net.weight((6, 3), 6)), ["N", 3])
    made = Program.of(ir.from_proto(net.model()))
    data = [{"x": np.random.default_rng(k).standard_normal((9, 8, 4)).astype(np.float32)} for k in range(6)]
    result = compress(made, data, params=0.7)
    assert result.program.parameters <= 0.7 * made.parameters and len(result.witness["kept"]) >= 1
