"""`cipm_ir.sweeps`: points, files, the text of passes, and what goes wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.sweep_runs import DATA, count_made, files, run, without_picture, write_model

from cipm_ir import api, sweeps
from cipm_ir.errors import InputError, OptionError, OutputError, VerificationError
from cipm_ir.passes.framework import sweep_report
from cipm_ir.runtime.session import Runner
from cipm_ir.sweeps import passes_for


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "picture" not in request.node.name:
        without_picture(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_made(monkeypatch)


# --- what comes out -------------------------------------------------------------------------------


def test_models_table_and_record(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    folder = tmp_path / "deep" / "out"
    report = run(model, folder)
    assert model.read_bytes() == before
    assert [p.budget for p in report] == [0.8, 0.6, 0.5] and all(p.status == "done" for p in report)
    dense = api.load(model)
    assert (report.dense.macs, report.dense.params) == (dense.macs, dense.parameters)
    for point in report:
        program = api.load(folder / point.file)
        assert (program.macs, program.parameters) == (point.macs, point.params)
        assert point.macs <= point.budget * dense.macs
        assert point.passes == f"prune{{macs={point.budget:g}}}" and point.summary
    assert report.dense.difference == 0.0 and report.dense.agreement == 1.0
    wanted = ["macs-0.5.onnx", "macs-0.6.onnx", "macs-0.8.onnx", "sweep.csv", "sweep.json"]
    assert [name for name in files(folder) if name != "sweep.svg"] == wanted
    record = json.loads((folder / "sweep.json").read_text())
    assert [p["budget"] for p in record["points"]] == [0.8, 0.6, 0.5] and record["settings"]["budget"] == "macs"
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["file"] for row in rows] == ["", "macs-0.8.onnx", "macs-0.6.onnx", "macs-0.5.onnx"]
    text = str(report)
    assert "(dense)" in text and "macs-0.5.onnx" in text and "Pareto" in text and "score" not in text


def test_differences_are_those_of_the_models(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", budgets=(0.5,))
    outputs = []
    for path in (model, tmp_path / "out" / report[0].file):
        with Runner(api.load(path).emit()) as runner:
            outputs.append(next(iter(runner.run(DATA).values())).astype(np.float64))
    a, b = outputs
    assert report[0].difference == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert report[0].agreement == np.mean(a.argmax(1) == b.argmax(1))


def test_held_out_inputs_decide_where_given(model: Path, tmp_path: Path) -> None:
    held = {"x": 3.0 * DATA["x"][::-1]}
    first, second = run(model, tmp_path / "a"), run(model, tmp_path / "b", held_out=held)
    assert first[0].difference != second[0].difference
    assert any("held-out data" in note for note in second.notes) and any("itself" in note for note in first.notes)


@pytest.mark.parametrize("budget", ["macs", "params"])
def test_the_budget_has_a_name(model: Path, tmp_path: Path, budget: str) -> None:
    report = run(model, tmp_path / "out", budget=budget, budgets=(0.6,))
    assert report[0].cost(budget) <= 0.6 * report.dense.cost(budget)
    assert report[0].file == f"{budget}-0.6.onnx"


def test_evaluate_runs_the_models_and_decides(model: Path, tmp_path: Path) -> None:
    seen: list[NDArray[Any]] = []

    def score(run_model: Any) -> float:
        seen.append(next(iter(run_model(DATA).values())))
        return -float(len(seen))

    report = run(model, tmp_path / "out", evaluate=score, data=None)
    assert [p.score for p in report] == [-2.0, -3.0, -4.0] and report.dense.difference is None
    for path, array in zip([model, *(tmp_path / "out" / p.file for p in report)], seen, strict=True):
        with Runner(api.load(path).emit()) as runner:
            assert np.allclose(next(iter(runner.run(DATA).values())), array, atol=1e-5)


def test_a_score_that_is_no_number_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="evaluate must give a finite number; for budget 1 it gave nan"):
        run(model, tmp_path / "out", evaluate=lambda _: float("nan"))


def test_latency_is_measured_on_request(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", budgets=(0.5,), threads=1)
    assert report.dense.relative == 1.0 and report[0].latency is not None and report[0].latency > 0
    assert "ms" in str(report) and any("threads 1, batch 1" in note for note in report.notes)
    assert run(model, tmp_path / "none", budgets=(0.5,))[0].latency is None


def test_the_picture_is_the_same_every_time(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    report = run(model, folder)
    first = (folder / "sweep.svg").read_text()
    assert first.count("<svg") == 1 and sweep_report.svg(report) == first


def test_without_matplotlib_the_picture_is_missing_and_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_report, "svg", lambda report: None)
    monkeypatch.setattr(sweeps, "_has_matplotlib", lambda: False)
    report = run(model, tmp_path / "out")
    assert "sweep.svg" not in files(tmp_path / "out") and "cipm-ir[html]" in str(report)


# --- budgets in the text of passes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("prune", "prune{macs=0.5}"),
        ("prune{}", "prune{macs=0.5}"),
        ("prune{round_to=8}", "prune{round_to=8, macs=0.5}"),
        ("prune{round_to=8,}", "prune{round_to=8,macs=0.5}"),
        ("prune{{budget}}", "prune{macs=0.5}"),
        ("prune{budget}", "prune{macs=0.5}"),
        ("prune{{budget}, round_to=8}, clean-up", "prune{macs=0.5, round_to=8}, clean-up"),
        ("clean-up, prune{round_to=8, {budget}}", "clean-up, prune{round_to=8, macs=0.5}"),
        ("fold-batch-norm, prune", "fold-batch-norm, prune{macs=0.5}"),
        ("prune, clean-up", None),
        ("no-such-pass", None),
    ],
)
def test_where_the_budget_goes(template: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(OptionError):
            passes_for(template, "macs", 0.5)
    else:
        assert passes_for(template, "macs", 0.5) == text


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_budget_out_of_reach_is_a_point_and_the_rest_goes_on(model: Path, tmp_path: Path, made: list[str]) -> None:
    report = run(model, tmp_path / "out", budgets=(0.7, 0.01, 0.5))
    assert [p.status for p in report] == ["done", "done", "impossible"]
    assert "prune cannot come down to 0.01" in report[2].reason and report[2].reason in " ".join(str(report).split())
    assert not report[2].pareto and not report[2].file
    assert run(model, tmp_path / "out", budgets=(0.7, 0.01, 0.5)).reused == 3 and len(made) == 3


def test_a_model_that_is_broken_is_a_point_and_is_tried_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = api.optimize

    def failing(program: Any, passes: Any, **options: Any) -> Any:
        if "0.6" in str(passes):
            raise VerificationError("Pass 'prune' broke it.")
        return optimize(program, passes, **options)

    with monkeypatch.context() as patch:
        patch.setattr(api, "optimize", failing)
        assert [p.status for p in run(model, tmp_path / "out")] == ["done", "failed", "done"]
    report = run(model, tmp_path / "out")
    assert [p.status for p in report] == ["done"] * 3 and report.reused == 2


def once() -> Any:
    yield DATA


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"data": None}, InputError, "give data= .* or evaluate="),
        ({"data": "missing.npz"}, InputError, "no data file 'missing.npz'"),
        ({"data": {"y": DATA["x"], "z": DATA["x"]}}, InputError, "no array for input 'x'"),
        ({"data": {"x": DATA["x"][:0]}}, InputError, "no samples"),
        ({"data": once()}, InputError, "read only once"),
        ({"budgets": ()}, OptionError, "at least one budget"),
        ({"budgets": (0.5, 0.0)}, OptionError, "above 0 and at most 1; 0 is not"),
        ({"budgets": (1.5,)}, OptionError, "above 0 and at most 1; 1.5 is not"),
        ({"budgets": (float("nan"),)}, OptionError, "above 0 and at most 1; nan is not"),
        ({"budget": "flops"}, OptionError, "one of macs, params, bytes, latency, not 'flops'"),
        ({"budget": "latency"}, OptionError, "give a number of threads"),
        ({"passes_template": "prune{norm=l3}"}, OptionError, "'norm' takes"),
        ({"threads": 0}, OptionError, "threads of at least 1"),
    ],
)
def test_bad_calls(
    model: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        run(model, tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("*.onnx")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 99, "dense": {}, "points": []}', "\x00\x01"],
)
def test_a_damaged_record_is_named(model: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sweep.json").write_text(text)
    with pytest.raises(InputError, match=r"sweep\.json.*delete or move it, and the sweep starts again"):
        run(model, folder)
    assert (folder / "sweep.json").read_text() == text


@pytest.mark.parametrize("field", ["macs", "difference", "status", "key", "pareto"])
def test_a_record_with_a_wrong_field_is_named(model: Path, tmp_path: Path, field: str) -> None:
    folder = tmp_path / "out"
    run(model, folder, budgets=(0.8,))
    record = json.loads((folder / "sweep.json").read_text())
    record["points"][0][field] = ["?"]
    (folder / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"sweep\.json' is damaged"):
        run(model, folder)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    model: Path, tmp_path: Path, made: list[str]
) -> None:
    with pytest.raises(OutputError, match=r"cannot be made: .*; choose another"):
        run(model, model / "out")
    with pytest.raises(OutputError, match="cannot be made"):
        run(model, model)
    assert not made


def test_a_folder_without_permission_is_refused(
    model: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", denied)
    with pytest.raises(OutputError, match="was not written: Permission denied; choose another folder"):
        run(model, tmp_path / "out")
    assert not made and files(tmp_path / "out") == []
