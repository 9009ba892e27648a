"""Criteria for `prune`: registration, those without gradients, and what they say where something is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.models.dead_units import program_of
from tests.models.importance_nets import (
    FAINT,
    attention,
    one_hidden_layer,
    planted,
    program,
    rescaled,
    samples,
    scores,
    stream,
)
from tests.torch.test_torch_absent import ABSENT, PIP, python
from tests.zoo.net import Net

from cipm_ir.errors import InputError, OptionError, SymmetryError, UnsupportedError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.importance.criteria import (
    Magnitude,
    Scores,
    make_importance,
    register_importance,
    registered_importances,
)
from cipm_ir.passes.pruning.importance.data import ActivationVariance, BrainSurgeon
from cipm_ir.passes.pruning.importance.reads import find_reads
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers
from cipm_ir.symmetry.space import Space

WITHOUT_GRADIENTS = ("magnitude", "batch-norm-scale", "activation-variance", "wanda", "obs")
WITH_DATA = ("activation-variance", "wanda", "obs", "taylor", "taylor2", "fisher")


def on(made: Program, count: int = 64, **settings: Any) -> Context:
    return Context(data=samples(made, count), **settings)


# ---------------------------------------------------------------- registration
def by_index(program: Program, space: Space, ctx: Context) -> Scores:
    return 1.0 + np.arange(space.size, dtype=np.float64)


class FromIndex:
    """The same as an object."""

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        return by_index(program, space, ctx)


def test_all_criteria_are_known_by_name() -> None:
    assert {*WITHOUT_GRADIENTS, *WITH_DATA, "random"} <= set(registered_importances())


@pytest.mark.parametrize("what", [by_index, FromIndex(), FromIndex, lambda _norm: FromIndex()])
def test_a_criterion_is_a_function_an_object_a_class_or_a_factory(what: Any) -> None:
    made = one_hidden_layer()
    np.testing.assert_array_equal(make_importance(what, "l2").score(made, made.spaces[0], Context()), np.arange(1, 13))
    name = f"test-{what if isinstance(what, type) else type(what)}-{id(what)}"
    register_importance(name, what)
    register_importance(name, what)  # again, as when a module is loaded anew
    kept = Prune(ratio=0.5, importance=name).run(made, Context()).witness["kept"]
    np.testing.assert_array_equal(next(iter(kept.values())), np.arange(6, 12))


def test_names_are_taken_once_and_nonsense_is_refused() -> None:
    with pytest.raises(OptionError, match="'wanda' exists already"):
        register_importance("wanda", by_index)
    with pytest.raises(OptionError, match="no criterion named 'guess'; there are activation-variance, batch-norm"):
        make_importance("guess", "l2")
    with pytest.raises(OptionError, match="7 is no criterion"):
        make_importance(7, "l2")  # type: ignore[arg-type]


# ---------------------------------------------------------------- what they find
@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_faint_units_come_last(name: str) -> None:
    made = planted()
    space = made.spaces[0]
    found = make_importance(name, "l2").score(made, space, on(made))
    assert found.shape == (12,) and (found >= 0).all()
    assert set(np.argsort(found)[:3].tolist()) == set(FAINT)
    others = np.delete(found, FAINT)
    assert found[list(FAINT)].max() < 0.2 * others.min()


def test_chance_does_not_find_them() -> None:
    made = planted()
    space = made.spaces[0]
    drawn = [make_importance("random", "l2").score(made, space, Context(seed=k)) for k in range(40)]
    hits = [set(np.argsort(one)[:3].tolist()) == set(FAINT) for one in drawn]
    assert sum(hits) <= 2
    np.testing.assert_array_equal(drawn[3], make_importance("random", "l2").score(made, space, Context(seed=3)))
    assert not np.array_equal(drawn[3], make_importance("random", "l2").score(made, made.spaces[1], Context(seed=3)))


def test_a_unit_that_never_fires_is_useless_by_data_though_its_weights_are_large() -> None:
    net = Net("never_fires")
    hidden = net.relu(net.gemm(net.input("x", ["N", 6]), 6, 8))
    net.output(net.gemm(hidden, 8, 3), ["N", 3])
    model = net.model()
    weight, bias = model.graph.node[0].input[1:]
    dead = np.arange(8) == 2
    for tensor in model.graph.initializer:
        if tensor.name == bias:
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[dead] = -500.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, bias))
    made = rescaled(model, {weight: (0, np.where(dead, 30.0, 1.0))})
    found = {
        name: scores(name, made, on(made))[made.spaces[0].name] for name in WITHOUT_GRADIENTS if "norm" not in name
    }
    assert found["magnitude"].argmax() == 2  # the control: weights alone do not tell
    for name in ("activation-variance", "wanda", "obs"):
        assert found[name].argmin() == 2 and found[name][2] < 1e-6 * np.delete(found[name], 2).min(), name


def test_constant_and_repeated_units_are_cheap_for_the_surgeon_alone() -> None:
    net = Net("constant_unit")
    hidden = net.relu(net.gemm(net.input("x", ["N", 6]), 6, 8))
    net.output(net.gemm(hidden, 8, 3), ["N", 3])
    model = net.model()
    weight, bias = model.graph.node[0].input[1:]
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name == weight:
            array[2] = 0.0  # constant: the bias of the next layer can take it over
            array[5] = array[4]  # the same as its neighbour
        if tensor.name == bias:
            array[2] = 2.0
            array[5] = array[4]
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    made = rescaled(model, {})
    found = {n: scores(n, made, on(made, 256))[made.spaces[0].name] for n in ("obs", "wanda", "activation-variance")}
    assert set(np.argsort(found["obs"])[:3].tolist()) == {2, 4, 5}
    assert found["obs"][[2, 4, 5]].max() < 0.02 * np.delete(found["obs"], [2, 4, 5]).min()
    assert found["activation-variance"].argmin() == 2 and found["activation-variance"][2] < 1e-9
    assert set(np.argsort(found["wanda"])[:3].tolist()) != {2, 4, 5}


def test_the_surgeon_predicts_the_error_after_the_best_refit() -> None:
    """Against a least-squares solution without the unit, on the same samples."""
    made = one_hidden_layer(outputs=3)
    space, ctx = made.spaces[0], on(made, 200)
    (reader,) = readers(made, space)
    values = run(made.model, samples(made, 200), [reader.source, reader.output])
    u = np.concatenate([values[reader.source], np.ones((200, 1))], axis=1).astype(np.float64)
    y = values[reader.output].astype(np.float64)
    left = []
    for k in range(space.size):
        rest = np.delete(u, k, axis=1)
        refitted = np.linalg.lstsq(rest, y, rcond=None)[0]
        left.append(0.5 * np.square(rest @ refitted - y).sum() / 200)
    found = BrainSurgeon(damping=1e-9).score(made, space, ctx)
    np.testing.assert_allclose(found, left, rtol=1e-2)
    assert not np.allclose(BrainSurgeon(damping=0.5).score(made, space, ctx), left, rtol=0.1)  # the control


def test_weights_whose_squares_overflow_have_a_magnitude_and_infinite_ones_do_not() -> None:
    net = Net("importance_far")
    first = net.normal((3, 4), 1.0) * np.float32(1e24)
    h = net.op("Relu", net.op("MatMul", net.input("x", ("n", 3)), net.const(first)))
    net.output(net.op("MatMul", h, net.const(net.normal((4, 2), 1e-24))), ("n", 2))
    made = Program.of(ir.from_proto(net.model()))
    (space,) = made.spaces
    found = Magnitude().score(made, space, Context())
    assert np.allclose(found, np.linalg.norm(first.astype(np.float64), axis=0), rtol=1e-5)
    (name,) = (n for n in made.model.graph.initializers if made.model.graph.initializers[n].shape == (3, 4))
    with pytest.raises(InputError, match="NaN or infinity"):
        Magnitude().score(made.refit({name: first * np.float32(np.inf)}), space, Context())


def test_wanda_is_weight_times_activation() -> None:
    made = one_hidden_layer(outputs=3)
    (reader,) = readers(made, made.spaces[0])
    hidden = run(made.model, samples(made, 50), [reader.source])[reader.source].astype(np.float64)
    weight = made.model.graph.initializers[reader.weight].const_value
    assert weight is not None
    wanted = np.abs(weight.numpy()).sum(axis=0) * np.sqrt(np.square(hidden).mean(axis=0))
    np.testing.assert_allclose(scores("wanda", made, on(made, 50))[made.spaces[0].name], wanted, rtol=1e-5)


def test_variance_is_merged_over_batches_far_from_zero() -> None:
    net = Net("offset")
    hidden = net.op("Add", net.gemm(net.input("x", ["N", 6]), 6, 8), net.const(3000.0))
    net.output(net.gemm(net.op("LeakyRelu", hidden), 8, 3), ["N", 3])
    made = program(net)
    (reader,) = readers(made, made.spaces[0])
    value = run(made.model, samples(made, 300), [reader.source])[reader.source].astype(np.float64)
    found = ActivationVariance().score(made, made.spaces[0], on(made, 300))
    np.testing.assert_allclose(found, value.var(axis=0), rtol=1e-3)


# ---------------------------------------------------------------- gauge
@pytest.mark.parametrize(
    ("name", "tolerance"), [("wanda", 1e-4), ("obs", 2e-2), ("activation-variance", None), ("magnitude", None)]
)
def test_scores_move_with_units_and_ignore_scales(name: str, tolerance: float | None) -> None:
    """Rescaling a unit does not change what it is worth; criteria that look at one side alone are the control."""
    made = one_hidden_layer(outputs=3)
    space = made.spaces[0]
    element = space.random(np.random.default_rng(5))
    moved = made.act({space: element})
    before = scores(name, made, on(made))[space.name]
    after = scores(name, moved, on(moved))[space.name]
    match = np.allclose(after, before[element.perm], rtol=tolerance or 1e-1)
    assert match == (tolerance is not None)


# ---------------------------------------------------------------- where they look
def places(made: Program) -> dict[str, list[tuple[str, str, int]]]:
    """For each space the operators that read it, the value, and the turn of the input."""
    found = find_reads(made)
    out: dict[str, list[tuple[str, str, int]]] = {}
    for space in made.spaces:
        mine = found.of(space)
        for p in found.places:
            inside = (p.elements >= mine.start) & (p.elements < mine.stop)
            if inside.any():
                read = found.reads[p.read]
                op = made.analysis.walk.nodes[read.node].op_type
                out.setdefault(space.name, []).append((op, read.value, p.turn))
                assert read.samples == 0
    return out


def test_a_residual_stream_is_read_by_every_block() -> None:
    made = stream()
    by_size = {space.size: places(made)[space.name] for space in made.spaces}
    assert [op for op, _, _ in by_size[6]] == ["Gemm", "MatMul", "Gemm"]
    assert len({value for _, value, _ in by_size[6]}) == 3
    assert [op for op, _, _ in by_size[8]] == ["Gemm"]


def test_heads_are_read_where_they_are_merged_and_queries_meet_keys() -> None:
    made = attention()
    found = places(made)
    for space in made.spaces:
        ops = [(op, turn) for op, _, turn in found[space.name]]
        if space.kind == "blocks":
            assert ops == [("MatMul", 0)]  # the output projection, not the products inside
        elif space.parent is not None and len(ops) == 2:
            assert ops == [("MatMul", 0), ("MatMul", 1)]  # queries, and the keys that they meet
    pairs = [s for s in made.spaces if s.parent is not None and len(found[s.name]) == 2]
    assert len(pairs) == 3
    for name in ("wanda", "obs", "activation-variance"):
        assert all((v > 0).all() for v in scores(name, made, on(made)).values()), name


@pytest.mark.parametrize(
    "name", ["repvgg_branches", "pixel_shuffle_dcr", "channel_shuffle", "conv_flatten_gemm", "lstm", "attention_gqa"]
)
@pytest.mark.parametrize("criterion", ["wanda", "obs", "activation-variance"])
def test_every_space_of_many_models_gets_scores(name: str, criterion: str) -> None:
    made = program_of(name)
    ctx = Context(data=[zoo.feeds(name, zoo.build(name), k) for k in range(4)])
    for space, found in scores(criterion, made, ctx).items():
        assert found.shape == (made.space(space).size,) and np.isfinite(found).all() and found.any(), space


# ---------------------------------------------------------------- what is missing
@pytest.mark.parametrize("name", WITH_DATA)
def test_without_data_they_say_so(name: str) -> None:
    made = one_hidden_layer()
    with pytest.raises(InputError, match=f"criterion '{name}' needs calibration data; give data=.*--data"):
        Prune(ratio=0.5, importance=name).run(made, Context())


@pytest.mark.parametrize("name", ["taylor", "taylor2", "fisher"])
def test_without_an_engine_they_say_so(name: str) -> None:
    made = one_hidden_layer()
    with pytest.raises(OptionError, match=f"criterion '{name}' needs gradients, and nothing here computes any"):
        Prune(ratio=0.5, importance=name).run(made, on(made))


def test_no_batch_norm() -> None:
    made = one_hidden_layer()
    with pytest.raises(SymmetryError, match=r"No batch normalization scales @.*leave it out with exclude"):
        Prune(ratio=0.5, importance="batch-norm-scale").run(made, Context())


def test_units_that_are_integers_where_they_are_read() -> None:
    made = program_of("qlinear_matmul_net")
    ctx = Context(data=samples(made, 8))
    for name in ("wanda", "activation-variance", "obs"):
        with pytest.raises(UnsupportedError, match="No value of real numbers shows the units of @"):
            make_importance(name, "l2").score(made, made.spaces[0], ctx)


@pytest.mark.parametrize("name", ["wanda", "obs", "activation-variance"])
def test_bad_samples_are_named(name: str) -> None:
    made = one_hidden_layer()
    data: dict[str, NDArray[Any]] = samples(made, 8)
    data["x"][3, 0] = np.nan
    with pytest.raises(InputError, match="is NaN or infinite on samples 0 to 7"):
        scores(name, made, Context(data=data))
    with pytest.raises(InputError, match="no samples"):
        scores(name, made, Context(data={"x": data["x"][:0]}))


RANK = """
import numpy as np
import cipm_ir
from cipm_ir.passes.base import Context
from cipm_ir.passes.importance import make_importance
from cipm_ir.sources import torch_module

program = cipm_ir.load(sys.argv[1])
def engine(*arguments, **settings):
    return torch_module("backends.torch.gradients").products(*arguments, **settings)
x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
ctx = Context(data={"x": x}, options={"gradients": engine})
for name in sys.argv[2:]:
    try:
        print(make_importance(name, "l2").score(program, program.spaces[0], ctx).shape)
    except cipm_ir.CipmError as error:
        print(type(error).__name__, error)
"""


def test_without_torch_only_gradients_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(one_hidden_layer().emit()), path)
    done = python(ABSENT + RANK, path, "obs", "fisher", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by_curvature, by_gradients = done.stdout.strip().splitlines()
    assert by_curvature == "(12,)"
    assert by_gradients.startswith("UnsupportedError The criterion 'fisher' needs gradients:")
    assert PIP in by_gradients
