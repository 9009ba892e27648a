"""What people with ONNX files of their own ran into: statistics of shards, odd data, layers and names, sweeps."""

from __future__ import annotations

import json
import runpy
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from tests.runtime.test_statistics import drawn, mlp, wide_mlp
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.cli import main
from cipm_ir.errors import InputError, OptionError, SymmetryError, UnsupportedError
from cipm_ir.passes.framework.base import Context
from cipm_ir.runtime.statistics.collect import Statistics
from cipm_ir.sweeps import passes_for, sweep

Array = np.ndarray[Any, Any]


def two_layers(names: str = "{}", widths: tuple[int, int] = (16, 12), scale: float = 1.0) -> onnx.ModelProto:
    """x (N, 6) -> widths[0] -> widths[1] -> y (N, 4), Relu between; ``names``: a pattern for the weights."""
    rng, sizes = np.random.default_rng(3), (6, *widths, 4)
    nodes, tensors, current = [], [], "x"
    for k, (n, m) in enumerate(pairwise(sizes)):
        weight = (scale * rng.standard_normal((n, m))).astype(np.float32)
        w, b = names.format(f"w{k}"), names.format(f"b{k}")
        tensors += [onnx.numpy_helper.from_array(weight, w)]
        tensors += [onnx.numpy_helper.from_array(rng.standard_normal(m).astype(np.float32), b)]
        nodes.append(onnx.helper.make_node("Gemm", [current, w, b], [f"z{k}"]))
        current = f"z{k}"
        if k < 2:
            nodes.append(onnx.helper.make_node("Relu", [current], [f"h{k}"]))
            current = f"h{k}"
    value = onnx.helper.make_tensor_value_info
    shown = value("x", onnx.TensorProto.FLOAT, ["N", 6]), value(current, onnx.TensorProto.FLOAT, ["N", 4])
    graph = onnx.helper.make_graph(nodes, "two-layers", [shown[0]], [shown[1]], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def samples(count: int = 64, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(5)
    return {"x": (scale * rng.standard_normal((count, 6))).astype(np.float32)}


def part(data: dict[str, Array], start: int, stop: int | None) -> dict[str, Array]:
    return {name: array[start:stop] for name, array in data.items()}


def relative_gap(one: Statistics, other: Statistics) -> float:
    """The largest difference of all sums, each over the largest entry of its array."""
    worst = 0.0
    for name, space in one.items():
        for key, found in space.parts.items():
            state = other[name].parts[key].state()
            for field, array in found.state().items():
                worst = max(worst, float(np.abs(array - state[field]).max() / max(np.abs(array).max(), 1e-300)))
    return worst


# ------------------------------------------------------------ shards
@pytest.mark.parametrize("shard", [10, 37])
def test_shards_agree_with_one_process_to_the_last_digits(rng: np.random.Generator, shard: int) -> None:
    program, data = mlp(), drawn(rng, 150, 5)
    data["x"] += 100.0  # a mean that is large against the spread
    whole = cipm_ir.statistics(program, data, gram=True)
    assert relative_gap(whole, cipm_ir.statistics(program, data, gram=True, engine="local", shard=shard)) < 1e-12
    pieces = [cipm_ir.statistics(program, part(data, *ends), gram=True) for ends in ((0, shard), (shard, None))]
    assert relative_gap(whole, sum(pieces)) < 1e-12


def test_statistics_of_a_model_with_other_weights_are_refused(tmp_path: Path) -> None:
    one, other = (cipm_ir.statistics(two_layers(scale=scale), samples()) for scale in (1.0, 1.5))
    assert list(one) == list(other) and one.model != other.model
    one.save(tmp_path / "one.npz")
    again = Statistics.load(tmp_path / "one.npz")
    assert (again + one).samples == 128
    with pytest.raises(InputError, match="of two models cannot be added"):
        again + other
    with pytest.raises(TypeError):
        one + 3


def test_sketches_of_shards_with_alike_samples(rng: np.random.Generator) -> None:
    """Sample 7 of one shard resembles sample 7 of the other: in a sketch the two must not share sign and bucket."""
    program, first = wide_mlp(24), drawn(rng, 400, 16)
    second = {"x": first["x"] + 0.01 * rng.standard_normal((400, 16)).astype(np.float32)}
    name = program.spaces[0].name
    exact = cipm_ir.statistics(program, {"x": np.concatenate([first["x"], second["x"]])})[name].correlation
    options: dict[str, Any] = {"pairs": "sketch", "partners": 0, "buckets": 256}
    one, two = (cipm_ir.statistics(program, data, **options) for data in (first, second))
    for added in (one + two, one + one):
        off = (added[name].correlation - exact)[np.triu_indices(24, 1)]
        assert np.sqrt((off**2).mean()) < added[name].standard_error


def test_options_of_statistics() -> None:
    model, data = two_layers(), samples()
    one = cipm_ir.statistics(model, data, measures="spearman", lags=1)["w0"]
    assert one.similarity("spearman").shape == one.lagged(1).shape == (16, 16)
    for engine in (None, "local"):
        with pytest.raises(OptionError, match="size is 0"):
            cipm_ir.statistics(model, data, engine=engine, size=0)


# ------------------------------------------------------------ data in any form
def test_files_folders_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cipm_ir.passes.framework.sweep_report.svg", lambda report: None)
    onnx.save(two_layers(), "net.onnx")
    data = samples()
    np.savez("all.npz", x=data["x"])
    np.save("x.npy", data["x"])
    Path("folder").mkdir()
    for k in range(2):
        np.savez(f"folder/{k}.npz", x=part(data, 32 * k, 32 * k + 32)["x"])
    forms: tuple[Any, ...] = ("all.npz", Path("x.npy"), data["x"], "folder", ["folder/0.npz", "folder/1.npz"])
    found = [cipm_ir.statistics("net.onnx", form, gram=True) for form in forms]
    assert all(relative_gap(found[0], other) < 1e-12 for other in found[1:])
    assert (
        main(["optimize", "net.onnx", "-p", "prune{macs=0.7, importance=wanda}", "--data", "folder", "-q", "--dry-run"])
        == 0
    )
    assert main(["verify", "net.onnx", "net.onnx", "--data", "x.npy"]) == 0
    first, again = (
        sweep("net.onnx", output_folder="out", budgets=[0.6], passes_template="prune", data=form, threads=None)
        for form in ("folder", "folder")
    )
    assert (first.reused, again.reused) == (0, 1)
    np.savez("folder/1.npz", x=part(data, 0, 32)["x"])
    changed = sweep(
        "net.onnx", output_folder="out", budgets=[0.6], passes_template="prune", data="folder", threads=None
    )
    assert changed.reused == 0


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("empty", "The folder 'empty' holds no .npz or .npy files"),
        ("none.npy", "no data file 'none.npy'"),
        ("objects.npy", "'objects.npy' is not a .npy file of numbers"),
        (None, "Statistics need data"),
        (["a.npz", 3], "Batch 0 of the data is of type str; give a dict of arrays by input name"),
    ],
)
def test_data_that_is_none(data: Any, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    np.save("objects.npy", np.array([1, None], object))
    with pytest.raises(InputError, match=complaint):
        cipm_ir.statistics(two_layers(), data)


def test_one_array_for_two_inputs(tmp_path: Path) -> None:
    net = Net("two-inputs")
    net.output(net.op("Add", net.input("a", ["N", 2]), net.input("b", ["N", 2])), ["N", 2])
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(InputError, match=r"'.*x\.npy' is one array, but the model has inputs 'a', 'b'"):
        cipm_ir.verify(net.model(), net.model(), data=tmp_path / "x.npy")


# ------------------------------------------------------------ data that says little
def test_activations_whose_squares_overflow_in_float32() -> None:
    program = cipm_ir.load(two_layers())
    big = cipm_ir.statistics(program, samples(scale=1e30))["w0"]
    small = cipm_ir.statistics(program, samples(scale=1e3))["w0"]
    np.testing.assert_allclose(big.correlation, small.correlation, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = cipm_ir.optimize(program, ["prune{params=0.7, importance=obs}"], data=samples(scale=1e30), verify=False)
    assert made.report.steps[0].changed


def test_units_that_are_constant_are_not_clustered() -> None:
    model, still = two_layers(), {"x": np.ones((40, 6), np.float32)}
    step = cipm_ir.optimize(model, ["cluster"], data=still).report.steps[0]
    assert not step.changed and "@w0 and 1 more, whose units are constant on the data" in step.summary
    assert cipm_ir.optimize(model, ["cluster"], data=samples()).report.steps[0].changed


def test_fold_says_that_the_data_is_constant() -> None:
    model, still = two_layers(), {"x": np.full((40, 6), 0.3, np.float32)}
    for method in ("least-squares", "correlation"):
        step = cipm_ir.optimize(model, [f"fold{{params=0.7, method={method}}}"], data=still).report.steps[0]
        assert "all units of @w0 (and of 1 more) are constant on the data" in step.summary
        assert step.metrics["warnings"] and step.changed


def remaining(passes: str, data: dict[str, Array]) -> tuple[float, str]:
    report = cipm_ir.optimize(two_layers(), [passes], data=data).report
    return report.after.parameters / report.before.parameters, report.steps[0].summary


def test_equal_scores_do_not_go_all_at_once() -> None:
    """A criterion that tells nothing apart once left 24% of the parameters where 70% were asked for."""
    for still in ({"x": np.ones((40, 6), np.float32)}, samples(1)):
        left, summary = remaining("prune{params=0.7, importance=activation-variance}", still)
        assert 0.65 < left <= 0.7
        assert "all units of @w0 (and those of 1 more) have the same activation-variance" in summary
    assert "have the same" not in remaining("prune{params=0.7, importance=activation-variance}", samples())[1]


def test_a_score_with_few_values() -> None:
    def coarse(program: Any, space: Any, ctx: Context) -> Array:
        return (np.arange(space.size) % 2).astype(np.float64)

    report = cipm_ir.optimize(two_layers(), [cipm_ir.passes.Prune(params=0.8, importance=coarse)]).report
    assert 0.75 < report.after.parameters / report.before.parameters <= 0.8


@pytest.mark.parametrize(
    ("criterion", "complaint"),
    [
        (lambda program, space, ctx: ["a"] * space.size, "'<lambda>' must give 16 finite numbers for @w0"),
        (lambda program, space, ctx: np.ones(space.size) * 1j, "must give 16 finite numbers"),
        (
            lambda program, space, ctx: -np.arange(space.size),
            "gives negative numbers for @w0, which cannot be compared",
        ),
        (lambda program, space: 1.0, "'<lambda>' is no criterion"),
    ],
)
def test_criteria_that_are_none(criterion: Any, complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        cipm_ir.optimize(two_layers(), [cipm_ir.passes.Prune(macs=0.7, importance=criterion)])


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (samples(5), "5 rows for the 16 inputs of 'z1' (and so for 1 more), so their Gram matrix has rank 5 at most"),
        ({"x": np.ones((40, 6), np.float32)}, "are the same in every row of the data"),
        (samples(), ""),
    ],
)
def test_the_brain_surgeon_says_what_rank_it_had(data: dict[str, Array], warning: str) -> None:
    report = cipm_ir.optimize(two_layers(), ["prune{params=0.7, importance=obs}"], data=data).report
    found = report.steps[0].metrics["warnings"]
    assert (warning in found[0] and found[0] in report.steps[0].summary) if warning else found == []


def test_certain_answers_have_no_gradient() -> None:
    def none(model: Any, reads: Any, data: Any, **settings: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(samples=64, sums=[np.zeros(1) for _ in reads])

    for name, complaint in (
        ("taylor", r"certain, with a probability of 1 \(taylor2"),
        ("taylor2", "units; choose one"),
    ):
        with pytest.raises(UnsupportedError, match=complaint):
            passes = [f"prune{{params=0.7, importance={name}}}"]
            cipm_ir.optimize(two_layers(), passes, data=samples(), options={"gradients": none})


def test_a_layer_without_units() -> None:
    empty = two_layers(widths=(0, 12))
    for text in ("canonicalize", "prune{params=0.7}"):  # the layer behind it computes its biases
        (step,) = cipm_ir.optimize(empty, [text], data=samples()).report.steps
        assert step.changed and step.checked
    assert step.metrics["params"][1] <= 0.7 * step.metrics["params"][0]


def test_a_budget_that_unknown_operators_put_out_of_reach() -> None:
    model = two_layers()
    model.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    for k in (1, 3):
        model.graph.node[k].op_type, model.graph.node[k].domain, model.graph.node[k].name = "Mystery", "my.own", f"m{k}"
    with pytest.raises(SymmetryError, match=r"cannot be counted.*Mystery 'm1'.*Mystery 'm3'.*params="):
        cipm_ir.optimize(model, ["prune{macs=0.5}"])
    with pytest.raises(SymmetryError, match=r"Mystery 'm1', .*Mystery 'm3' is pinned, for want of a rule"):
        cipm_ir.optimize(model, ["prune{params=0.01}"])
    model.graph.node[3].op_type, model.graph.node[3].domain = "Relu", ""
    with pytest.raises(SymmetryError) as found:
        cipm_ir.optimize(model, ["prune{macs=0.01}"])
    assert "m1" in str(found.value) and "m3" not in str(found.value)


def test_an_operator_that_nothing_runs() -> None:
    model = two_layers()
    model.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Mystery", "my.own"
    with pytest.raises(UnsupportedError, match="by=weights runs nothing"):
        cipm_ir.optimize(model, ["cluster"], data=samples())
    assert cipm_ir.optimize(model, ["cluster{by=weights}"]).report.steps[0].changed


# ------------------------------------------------------------ the command line
def test_a_sweep_on_data_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(two_layers(), tmp_path / "net.onnx")
    data = samples()
    data["x"][3] = np.nan
    np.savez(tmp_path / "nan.npz", x=data["x"])
    words = ["sweep", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out"), "-p", "prune", "--threads", "0"]
    assert main([*words, "--data", str(tmp_path / "nan.npz")]) == 2
    assert "outputs of the model are NaN or infinite on some of the calibration data" in capsys.readouterr().err
    words[1] = str(tmp_path / "none.onnx")
    words[3] = str(tmp_path / "never")
    assert main([*words, "--data", str(tmp_path / "nan.npz")]) == 2
    assert not (tmp_path / "never").exists()


def test_the_budget_of_a_sweep_by_name() -> None:
    assert passes_for("prune{macs={budget}, round_to=2}", "macs", 0.5) == "prune{macs=0.5, round_to=2}"
    assert passes_for("fold{ params = {budget} }, cluster", "params", 0.5) == "fold{ params=0.5 }, cluster"
    with pytest.raises(OptionError, match="over macs, but the passes give the budget to params; sweep over params"):
        passes_for("prune{params={budget}}", "macs", 0.5)


def test_names_that_a_font_or_a_formula_could_trip_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    onnx.save(two_layers('_层$x^{{{}$%"<&>'), "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["optimize", "net.onnx", "-p", "cluster", "--html", "page.html", "-o", "out.onnx"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '@_层$x^{w0$%"&lt;&amp;&gt;' in page.replace("&quot;", '"') and capsys.readouterr().err == ""


def test_the_package_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["cipm", "--version"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("cipm_ir", run_name="__main__")
    assert done.value.code == 0 and capsys.readouterr().out.startswith("cipm ")


def test_the_report_of_a_prune_holds_what_it_says(tmp_path: Path) -> None:
    """The figures of the JSON report, counted again in the file that was written."""
    onnx.save(two_layers(), tmp_path / "net.onnx")
    out = tmp_path / "out.onnx"
    assert main(["optimize", str(tmp_path / "net.onnx"), "-o", str(out), "-p", "prune{macs=0.6}",
                 "--report", str(tmp_path / "r.json"), "-q"]) == 0  # fmt: skip
    after = json.loads((tmp_path / "r.json").read_text())["after"]
    shapes = {i.name: tuple(i.dims) for i in onnx.load(out).graph.initializer}
    assert after["parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    assert after["macs"] == sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--report", "net.onnx"], "--report would be written over the model, 'net.onnx'"),
        (["-o", "out.onnx", "--html", "./out.onnx"], "--html would be written over -o"),
        (["--report", "r", "--html", "r"], "--html would be written over --report"),
        (["--data", "x.npy", "-o", "x.npy"], "-o would be written over --data"),
        (["--data", "x.npy", "--report", "x.npy"], "--report would be written over --data"),
    ],
)
def test_a_report_does_not_replace_anything(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(two_layers(), "net.onnx")
    np.save("x.npy", samples()["x"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["optimize", "net.onnx", "-p", "cluster", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
