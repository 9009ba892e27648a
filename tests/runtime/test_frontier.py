"""Inner values over data: whole runs, runs in steps, what is refused, and temporary files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests import zoo
from tests.models.compress_nets import array_of, images, mlp, names_in, program, residual, rows, values
from tests.zoo.net import Net

from cipm_ir.errors import InputError
from cipm_ir.runtime.activations import cache as frontier_module
from cipm_ir.runtime.activations.cache import ActivationCache, SharedEnds, SuffixRunner, moving
from cipm_ir.runtime.activations.observe import extract_subgraph, observe
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program

Feeds = dict[str, NDArray[np.float32]]
NETS = ["residual_blocks", "attention_gqa", "unet_concat_skip", "loop_capture", "mlp_weight_norm", "tied_embedding"]


def case(name: str, count: int = 10) -> tuple[Program, Feeds]:
    """A program of the zoo, and data for it."""
    model = zoo.build(name)
    return Program.of(ir.from_proto(model)), zoo.feeds(name, model, 0, {"N": count})


def finals(made: Program) -> list[str]:
    return [v.name or "" for v in made.model.graph.outputs]


def whole(frontier: ActivationCache, made: Program) -> list[NDArray[np.float32]]:
    """The outputs, from where the frontier is."""
    parts = list(frontier.tail(made.model, finals(made)))
    return [np.concatenate([p[name] for p in parts]) for name in finals(made)]


# ---------------------------------------------------------------- observe
def test_observed_values_are_those_of_a_whole_run() -> None:
    made, data = program(residual()), images(11)
    names = [n.outputs[0].name or "" for n in list(made.model.graph)[2:7:2]]
    found = list(observe(made.model, names, data, size=4))
    assert [len(feeds["x"]) for feeds, _ in found] == [4, 4, 3]
    for name, wanted in zip(names, values(made, data, *names), strict=True):
        np.testing.assert_allclose(np.concatenate([v[name] for _, v in found]), wanted, atol=1e-5)


def test_limit_and_progress() -> None:
    made = program(mlp())
    seen: list[float | None] = []
    found = list(observe(made.model, finals(made), rows(40), size=8, limit=16, progress=lambda _, f: seen.append(f)))
    assert sum(len(feeds["x"]) for feeds, _ in found) == 16
    assert seen == [0.5, 1.0]


def test_only_what_is_needed_is_run() -> None:
    """A part leaves out what the wanted values do not depend on."""
    made = program(mlp())
    nodes = list(made.model.graph)
    first = extract_subgraph(made.model, None, [nodes[1].outputs[0].name or ""])
    assert [n.op_type for n in first.graph] == ["Gemm", "Relu"] and len(first.graph.initializers) == 2
    middle = np.zeros((2, 12), np.float32)
    last = extract_subgraph(made.model, {nodes[1].outputs[0].name or "": middle}, finals(made))
    assert len(list(last.graph)) == 3 and [v.name for v in last.graph.inputs] == [nodes[1].outputs[0].name]
    assert len(nodes) == 5 == len(list(made.model.graph))


@pytest.mark.parametrize(
    ("names", "data", "complaint"),
    [
        (["nothing"], rows(4), "no value 'nothing'"),
        (None, {"y": rows(4)["x"], "z": rows(4)["x"]}, "no array for input 'x'"),
        (None, rows(4, 5), "has shape"),
        (None, rows(0), "holds no samples"),
        (None, [], "holds no samples"),
        (None, {"x": rows(4)["x"].astype(np.complex64)}, "takes float32"),
    ],
)
def test_bad_data(names: list[str] | None, data: object, complaint: str) -> None:
    made = program(mlp())
    with pytest.raises(InputError, match=complaint):
        list(observe(made.model, names or finals(made), data))  # type: ignore[arg-type]


def test_nan_names_value_node_and_samples() -> None:
    made, data = program(mlp()), rows(12)
    data["x"][9] = np.inf
    gemm = next(iter(made.model.graph))
    name = gemm.outputs[0].name or ""
    with pytest.raises(InputError, match=f"'{name}', made by Gemm {gemm.name}, is NaN or infinite on samples 8 to 11"):
        list(observe(made.model, [name], data, size=4))
    assert len(list(observe(made.model, [name], {"x": data["x"][:8]}, size=4))) == 2


# ---------------------------------------------------------------- frontier
@pytest.mark.parametrize("name", NETS)
def test_in_steps_as_at_once(name: str) -> None:
    made, data = case(name)
    wanted = list(run(made.model, data, finals(made)).values())
    with ActivationCache(made.model, data, size=4) as frontier:
        for position in range(0, len(list(made.model.graph)), 2):
            frontier.advance(made.model, position)
            found = whole(frontier, made)
            assert frontier.position == position
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_control_what_is_kept_is_not_run_again() -> None:
    """Weights that change before the frontier change nothing behind it; those after it do."""
    made, data = program(residual()), images(8)
    weights = [names_in(node)[1] for node in made.model.graph if node.op_type == "Conv"]
    early, late = (made.refit({w: 2.0 * array_of(made, w)}) for w in (weights[0], weights[-1]))
    with ActivationCache(made.model, data) as frontier:
        frontier.advance(made.model, 5)
        dense = whole(frontier, made)[0]
        np.testing.assert_array_equal(whole(frontier, early)[0], dense)
        assert np.abs(whole(frontier, late)[0] - dense).max() > 1e-2
    assert np.abs(values(early, data)[0] - dense).max() > 1e-2


def test_weights_that_are_computed_are_those_of_the_model_that_runs() -> None:
    """A norm of a weight does not depend on the input: it is never kept, wherever the frontier is."""
    made, data = case("mlp_weight_norm")
    direction = max(made.model.graph.initializers, key=lambda n: array_of(made, n).size)
    other = made.refit({direction: array_of(made, direction)[::-1].copy()})
    computed = {v.name for n in made.model.graph for v in n.outputs} - moving(made.model)
    assert computed
    first = next(k for k, n in enumerate(made.model.graph) if n.outputs[0].name in moving(made.model))
    wanted = next(iter(run(other.model, data, finals(made)).values()))
    with ActivationCache(made.model, data) as frontier:
        frontier.advance(made.model, first)
        assert not computed & set(frontier.values[0])
        np.testing.assert_allclose(whole(frontier, other)[0], wanted, atol=1e-5)


def test_forks_go_their_own_way() -> None:
    made, data = program(residual()), images(6)
    wanted = values(made, data)[0]
    with ActivationCache(made.model, data) as one:
        one.advance(made.model, 3)
        with one.fork() as other:
            other.advance(made.model, 8)
            assert (one.position, other.position) == (3, 8)
        np.testing.assert_allclose(whole(one, made)[0], wanted, atol=1e-5)


def test_kept_names_stay_for_one_step() -> None:
    made, data = program(residual()), images(6)
    inner = list(made.model.graph)[2].outputs[0].name or ""
    with ActivationCache(made.model, data) as frontier:
        frontier.advance(made.model, 6, [inner])
        np.testing.assert_allclose(frontier.values[0][inner], values(made, data, inner)[0], atol=1e-5)
        frontier.advance(made.model, 7)
        assert inner not in frontier.values[0]


def test_limit_and_static_batches() -> None:
    made = program(mlp())
    with ActivationCache(made.model, rows(40), size=8, limit=20) as frontier:
        assert sum(frontier.samples) in (20, 24)
    fixed = program(mlp(batch=4))
    with ActivationCache(fixed.model, rows(11), size=64) as frontier:
        assert frontier.samples == [4, 4]
    with pytest.raises(InputError, match="no samples"):
        ActivationCache(made.model, rows(0))


def test_nan_in_a_step() -> None:
    made = program(mlp())
    data = {"x": np.where(np.arange(8)[:, None] == 5, np.nan, rows(8)["x"]).astype(np.float32)}
    with ActivationCache(made.model, data, size=4) as frontier, pytest.raises(InputError, match="samples 4 to 7"):
        frontier.advance(made.model, 2)


def test_large_values_go_to_files_that_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frontier_module, "_IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data, net = images(64, size=8), Net("residual8")
    stream = net.relu(net.conv(net.image(3, 8), 3, 16))
    net.classify(net.relu(net.op("Add", stream, net.conv(stream, 16, 16))), 16)
    made = program(net)
    wanted = values(made, data)[0]
    with ActivationCache(made.model, data, size=32) as frontier:
        frontier.advance(made.model, 2)
        with frontier.fork() as other:
            assert any(isinstance(a, np.memmap) for known in frontier.values for a in known.values())
            assert list(tmp_path.glob("cipm-ir-*/*.npy"))
            frontier.advance(made.model, 3)
            for one in (frontier, other):
                np.testing.assert_allclose(whole(one, made)[0], wanted, atol=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [6, 40])
def test_loose_weights_are_those_that_are_given(count: int) -> None:
    """One session gives what one for each set of weights gives; without new ones (control) what the model gives."""
    made, data = program(residual()), images(count)
    weight = [names_in(node)[1] for node in made.model.graph if node.op_type == "Conv"][-1]
    other = {weight: 2.0 * array_of(made, weight).astype(np.float64)}
    with ActivationCache(made.model, data, size=4) as frontier:
        frontier.advance(made.model, 5)
        wanted = whole(frontier, made.refit(other))[0]
        with SuffixRunner(frontier, made.model, finals(made), [weight]) as rest:
            found, dense = (np.concatenate([p[finals(made)[0]] for p in rest.run(w)]) for w in (other, None))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        np.testing.assert_allclose(dense, whole(frontier, made)[0], atol=1e-5 * np.abs(dense).max())
        assert np.abs(found - dense).max() > 1e-2


def test_files_that_nothing_needs_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was written once is not written again, and goes when the run is past it."""
    monkeypatch.setattr(frontier_module, "_IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data, net = images(64, size=8), Net("chain8")
    stream = net.relu(net.conv(net.image(3, 8), 3, 16))
    net.classify(net.relu(net.conv(net.relu(net.conv(stream, 16, 16)), 16, 16)), 16)
    made = program(net)
    with ActivationCache(made.model, data, size=32) as frontier:
        counts = []
        for position in (2, 4, 6):
            frontier.advance(made.model, position)
            counts.append(len(list(tmp_path.glob("cipm-ir-*/*.npy"))))
        assert counts == [2, 2, 2] and frontier._written == 6


def deep(layers: int = 24) -> ir.Model:
    """MatMul, a bias and a Relu, many times; the first weight is transposed, and used in the middle again."""
    rng = np.random.default_rng(3)
    nodes, weights, x = [helper.make_node("Transpose", ["w0"], ["turned"], perm=[1, 0])], [], "x"
    for k in range(layers):
        weight = "turned" if k in (0, layers // 2) else f"w{k}"
        nodes += [
            helper.make_node("MatMul", [x, weight], [f"m{k}"]),
            helper.make_node("Add", [f"m{k}", f"b{k}"], [f"a{k}"]),
            helper.make_node("Relu", [f"a{k}"], [f"r{k}"]),
        ]
        if k != layers // 2:
            weights.append(numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), f"w{k}"))
        weights.append(numpy_helper.from_array(np.ones(4, np.float32), f"b{k}"))
        x = f"r{k}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(("weight", "end"), [("w0", 48), ("w1", 16), ("b1", 16), ("w20", None), ("w23", None)])
def test_shared_ends_compute_the_same(weight: str, end: int | None) -> None:
    """Also for a weight that is used far behind, through a Transpose in front of the place where the end begins."""
    model, data = deep(), {"x": np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)}
    name = model.graph.outputs[0].name or ""
    rng = np.random.default_rng(1)
    old = model.graph.initializers[weight].const_value
    assert old is not None
    trials = [rng.normal(size=tuple(old.shape.numpy())) for _ in range(2)]
    with ActivationCache(model, data, size=4) as cache, SharedEnds(model, [name]) as ends:
        cache.advance(model, 1 + 3 * int(weight[1:]))
        with (
            SuffixRunner(cache, model, [name], [weight], ends) as cut,
            SuffixRunner(cache, model, [name], [weight]) as one,
        ):
            for trial in trials:
                a, b = (np.concatenate([x[name] for x in runner.run({weight: trial})]) for runner in (cut, one))
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
        assert ends.behind(cache, [weight]) == end
        with SuffixRunner(cache, model, [name], [weight], ends) as cut:  # a control: the model's own weight
            own = np.concatenate([x[name] for x in cut.run()])
        assert np.abs(own - b).max() > 1e-3 * np.abs(b).max()
