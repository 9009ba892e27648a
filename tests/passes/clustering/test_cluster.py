"""The pass `cluster`: planted modules come back exactly, the function stays, and what it reports is so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.benchmarks.cluster_table import HEAD, Bench, control, dimensions, lines
from tests.models.planted import WIDTHS, Planted, planted, same_partition

import cipm_ir
from cipm_ir.algebra import Element
from cipm_ir.errors import InputError, OptionError
from cipm_ir.passes import HeatMap, run_passes
from cipm_ir.passes.clustering.metrics import block_mass, equal_blocks
from cipm_ir.passes.clustering.weights import Weights, balanced

METHODS = ("leaf-order", "spectral", "path", "communities")
SCALES = ("layer", "aligned", "network")


@pytest.fixture(scope="module")
def net() -> Planted:
    return planted(noise=0.05, negative=0.1)


def run(source: Any, text: str, **given: Any) -> Any:
    return cipm_ir.optimize(source, passes=[text], **given)


def modules(result: Any) -> list[np.ndarray]:
    return [np.array(entry["module"]) for entry in result.witness[0].data.values()]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_planted_modules_are_recovered_exactly(net: Planted, by: str, method: str, scale: str) -> None:
    result = run(net.model, f"cluster{{by={by}, method={method}, scale={scale}}}", data=net.data)
    found = modules(result)
    assert all(same_partition(one, two) for one, two in zip(found, net.modules, strict=True))
    if scale == "network":  # modules are those of the network, not of a layer
        assert same_partition(np.concatenate(found), np.concatenate(net.modules))
    step = result.report.steps[0]
    assert step.kind == "exact" and step.changed
    assert step.verification is not None and step.verification.ok and step.verification.max_rel < 1e-5
    assert step.metrics["block_mass"][1] > step.metrics["block_mass"][0] + 0.1
    assert step.metrics["modularity"][1] > 0.1 > step.metrics["modularity"][0]


@pytest.mark.parametrize("measure", ["cosine", "distance"])
@pytest.mark.parametrize("scale", SCALES)
def test_measures_of_weights(net: Planted, measure: str, scale: str) -> None:
    found = modules(run(net.model, f"cluster{{by=weights, measure={measure}, scale={scale}}}"))
    assert all(same_partition(one, two) for one, two in zip(found, net.modules, strict=True))


@pytest.mark.parametrize("measure", ["spearman", "cofiring", "information", "cosine"])
def test_measures_of_activations(net: Planted, measure: str) -> None:
    found = modules(run(net.model, f"cluster{{measure={measure}, scale=aligned}}", data=net.data))
    assert all(same_partition(one, two) for one, two in zip(found, net.modules, strict=True))


def test_lagged_measure_runs(net: Planted) -> None:
    assert run(net.model, "cluster{measure=lagged}", data=net.data).report.steps[0].metrics["measure"] == "lagged"


def test_no_modules_are_found_where_none_are_planted(net: Planted) -> None:
    """The control: with the entries of every weight shuffled, nothing of the modules comes back."""
    rng, broken = np.random.default_rng(0), onnx.ModelProto()
    broken.CopyFrom(net.model)
    for tensor in broken.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(rng.permutation(array.ravel()).reshape(array.shape), tensor.name))
    result = run(broken, "cluster{by=weights}")
    found = modules(result)
    assert not any(same_partition(one, two) for one, two in zip(found, net.modules, strict=True))
    assert result.report.steps[0].metrics["modularity"][1] < 0.1


def test_weights_become_diagonal_by_blocks(net: Planted) -> None:
    """Aligned and network-wide, the middle matrix is block-diagonal; layer by layer the blocks need not correspond."""

    def mass(model: onnx.ModelProto) -> float:
        weight = np.square(numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w2")))
        rows, columns = (equal_blocks(n, 4) for n in weight.shape)
        return float(weight[rows[:, None] == columns].sum() / weight.sum())

    assert mass(net.model) < 0.5
    for scale in ("aligned", "network"):
        result = run(net.model, f"cluster{{by=weights, scale={scale}}}")
        assert mass(result.model) > 0.98
        before, after = result.report.steps[0].metrics["weight_mass"]
        assert before < 0.5 and after > 0.9


def test_witness_takes_the_weights_there(net: Planted) -> None:
    result = run(net.model, "cluster{by=weights}")
    old = {t.name: numpy_helper.to_array(t) for t in net.model.graph.initializer}
    new = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    perms = [np.array(entry["perm"]) for entry in result.witness[0].data.values()]
    assert np.array_equal(new["w1"], old["w1"][perms[0]])
    assert np.array_equal(new["w2"], old["w2"][np.ix_(perms[1], perms[0])])
    assert np.array_equal(new["head"], old["head"][perms[2]])
    labels = modules(result)[1][perms[1]]
    assert np.all(np.diff(labels) >= 0)


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_of_the_orbit_gives_the_same_modules(net: Planted, scale: str) -> None:
    program = cipm_ir.load(net.model)
    rng = np.random.default_rng(5)
    moved = {space: space.random(rng) for space in program.spaces}
    assert all(space.group.scales for space in moved)  # rescaled as well as shuffled
    text = f"cluster{{by=weights, scale={scale}}}"
    one, two = run_passes(program, text), run_passes(program.act(moved), text)
    for space, element in moved.items():
        first = np.array(one.witness[0].data[space.name]["module"])
        second = np.array(two.witness[0].data[space.name]["module"])
        assert same_partition(first[element.perm], second)
    for key in ("block_mass", "modularity"):
        a, b = one.report.steps[0].metrics[key][1], two.report.steps[0].metrics[key][1]
        assert a == pytest.approx(b, rel=1e-3)


def test_a_second_run_changes_nothing_in_the_blocks(net: Planted) -> None:
    first = run(net.model, "cluster{by=weights}")
    second = run(first.model, "cluster{by=weights}")
    one, two = (r.report.steps[0].metrics["block_mass"] for r in (first, second))
    assert two == pytest.approx([one[1], one[1]], rel=1e-3)


def test_report_and_figures(net: Planted) -> None:
    step = run(net.model, "cluster{by=weights, scale=aligned}").report.steps[0]
    assert "3 of 3 spaces" in step.summary and "12 modules" in step.summary
    spaces = step.metrics["spaces"]
    assert [entry["units"] for entry in spaces.values()] == list(WIDTHS)
    assert all(1 <= entry["effective_dimension"] <= entry["units"] for entry in spaces.values())
    json.dumps(step.metrics)
    maps = [figure for figure in step.figures if isinstance(figure, HeatMap)]
    assert len(maps) == 3 + 2  # a picture per space, and the weights between neighbours
    mass = block_mass(np.asarray(maps[0].after), np.sort(net.modules[0]))
    assert mass == pytest.approx(spaces[next(iter(spaces))]["block_mass"][1], rel=1e-5)


def test_resolution_makes_more_modules(net: Planted) -> None:
    few, many = (run(net.model, f"cluster{{by=weights, resolution={r}}}") for r in ("1.0", "4.0"))
    assert sum(len(set(m.tolist())) for m in modules(few)) < sum(len(set(m.tolist())) for m in modules(many))


def test_control_says_what_chance_gives(net: Planted) -> None:
    step = run(net.model, "cluster{by=weights, control=true}").report.steps[0]
    chance = step.metrics["chance"]
    assert chance["modularity"] < 0.5 * step.metrics["modularity"][1]
    assert chance["block_mass"] < step.metrics["block_mass"][1]
    assert "shuffled entries" in step.summary


def test_hierarchical_network_orders_modules(net: Planted) -> None:
    result = run(net.model, "cluster{by=weights, scale=network, hierarchical=true}")
    assert not result.report.steps[0].metrics["flat"]
    found = modules(result)
    assert same_partition(np.concatenate(found), np.concatenate(net.modules))


@pytest.mark.parametrize(
    ("text", "data", "error", "words"),
    [
        ("cluster{by=activations}", False, InputError, "give data=, or use by=weights"),
        ("cluster{measure=spearman}", False, InputError, "compares activations; give data="),
        ("cluster{by=weights, measure=cofiring}", True, OptionError, "use by=activations"),
        ("cluster{measure=distance}", True, OptionError, "use by=weights"),
        ("cluster{method=magic}", False, OptionError, "leaf-order"),
        ("cluster{scale=galaxy}", False, OptionError, "network"),
        ("cluster{resolution=0}", False, OptionError, "resolution"),
    ],
)
def test_bad_options_say_what_to_do(net: Planted, text: str, data: bool, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(net.model, text, data=net.data if data else None)


def test_few_samples_are_said(net: Planted) -> None:
    few = {"x": net.data["x"][:8]}
    summary = run(net.model, "cluster", data=few).report.steps[0].summary
    assert "fewer rows than units" in summary


def test_constant_and_nan_inputs(net: Planted) -> None:
    constant = {"x": np.ones((50, 24), np.float32)}
    step = run(net.model, "cluster", data=constant).report.steps[0]
    assert step.error is not None and step.error < 1e-4
    broken = net.data["x"].copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError):
        run(net.model, "cluster", data={"x": broken})


def test_nothing_to_order() -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    )
    step = run(made, "cluster").report.steps[0]
    assert not step.changed and "no space" in step.summary


def test_balanced_couplings_do_not_depend_on_scales() -> None:
    rng = np.random.default_rng(0)
    energy = rng.random((6, 9)) + 0.05
    scaled = energy * rng.lognormal(size=(6, 1)) * rng.lognormal(size=(1, 9))
    assert np.allclose(balanced(energy), balanced(scaled), rtol=1e-4)
    assert not np.allclose(energy, scaled, rtol=0.1)
    assert np.isfinite(balanced(np.zeros((3, 4)))).all()


def test_couplings_follow_the_weights(net: Planted) -> None:
    program = cipm_ir.load(net.model)
    found = Weights(program).couplings(program.spaces)
    assert sorted(found) == [(0, 1), (1, 2)]
    inside = net.modules[0][:, None] == net.modules[1]
    assert found[0, 1][inside].mean() > 20 * found[0, 1][~inside].mean()


def test_scales_and_signs_stay(net: Planted) -> None:
    program = cipm_ir.load(net.model)
    after = run_passes(program, "cluster{by=weights}").program
    back = run_passes(program, "cluster{by=weights}").witness[0].data
    undo = {}
    for space in after.spaces:
        neutral = space.identity()
        undo[space] = Element(np.array(back[space.name]["perm"]), neutral.scale, neutral.sign).inverse()
    again = after.act(undo)
    for name, value in program.model.graph.initializers.items():
        two = again.model.graph.initializers[name]
        assert value.const_value is not None and two.const_value is not None
        assert np.array_equal(value.const_value.numpy(), two.const_value.numpy())


def test_the_measured_table_has_its_columns(net: Planted) -> None:
    bench = Bench("planted", cipm_ir.load(net.model), net.data, 256)
    table = [*lines(bench, ("layer", "network, flat"), [("weights", "cosine")]), *dimensions(bench), *control(bench)]
    rows = [line for line in table if line.startswith("| weights")]
    assert len(rows) == 2 * 4
    assert all(line.count("|") == len(HEAD) + 1 for line in rows)
    assert sum(line.startswith("By chance") for line in table) == 4
