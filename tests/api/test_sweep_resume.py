"""`cipm_ir.sweeps`: what is made again and what is not, and every way in which it can be stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.models.sweep_runs import DATA, count_made, files, run, without_picture, write_model

from cipm_ir import api, sweeps


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    without_picture(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_made(monkeypatch)


# --- what is made again and what is not -----------------------------------------------------------


def test_finished_points_are_not_made_again(model: Path, tmp_path: Path, made: list[str]) -> None:
    folder = tmp_path / "out"
    first = run(model, folder)
    assert len(made) == 3
    kept = {name: (folder / name).stat().st_mtime_ns for name in files(folder) if name.endswith(".onnx")}
    second = run(model, folder)
    assert len(made) == 3 and second.reused == 3 and second.points == first.points and second.dense == first.dense
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    third = run(model, folder, budgets=(0.7, 0.6))
    assert made[3:] == ["prune{macs=0.7}"] and third.reused == 1
    assert [p.budget for p in third] == [0.8, 0.7, 0.6, 0.5], "earlier points stay on the curve"


CHANGES: dict[str, dict[str, Any]] = {
    "data": {"data": {"x": DATA["x"] + 1}},
    "held_out": {"held_out": DATA},
    "passes": {"passes_template": "prune{norm=l1}"},
    "seed": {"seed": 1},
    "verify": {"verify": False},
    "batch": {"batch": 2},
    "evaluate": {"evaluate": lambda _: 1.0},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_or_data_are_made_again(model: Path, tmp_path: Path, made: list[str], change: str) -> None:
    run(model, tmp_path / "out")
    report = run(model, tmp_path / "out", **CHANGES[change])
    assert len(made) == 6 and report.reused == 0 and any("was replaced" in note for note in report.notes)


def test_another_model_is_made_again(model: Path, tmp_path: Path, made: list[str]) -> None:
    run(model, tmp_path / "out")
    proto = onnx.load(model)
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 2)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] += 1e-6
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, model)
    assert run(model, tmp_path / "out").reused == 0 and len(made) == 6


def test_another_version_makes_again(
    model: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "out")
    monkeypatch.setattr(sweeps, "__version__", "0.0.1")
    assert run(model, tmp_path / "out").reused == 0 and len(made) == 6


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_model_file_that_is_not_as_it_was_is_made_again(
    model: Path, tmp_path: Path, made: list[str], harm: str
) -> None:
    folder = tmp_path / "out"
    whole = run(model, folder)
    path = folder / whole[1].file
    content = path.read_bytes()
    path.unlink() if harm == "gone" else path.write_bytes(content[:-1])
    assert run(model, folder).reused == 2 and made[3:] == ["prune{macs=0.6}"]
    assert path.read_bytes() == content


def test_evaluate_is_known_by_its_code(model: Path, tmp_path: Path, made: list[str]) -> None:
    def same() -> Callable[[Any], float]:
        return lambda _: 0.5

    run(model, tmp_path / "out", evaluate=same())
    assert run(model, tmp_path / "out", evaluate=same()).reused == 3
    assert run(model, tmp_path / "out", evaluate=lambda _: 0.75).reused == 0


# --- stopped in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["optimize", "save", "evaluate", "write"])
def test_stopped_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str], place: str
) -> None:
    folder = tmp_path / "out"
    expected = run(model, tmp_path / "whole", evaluate=judge)
    made.clear()
    with monkeypatch.context() as patch:
        stop_at(place, patch)
        with pytest.raises(KeyboardInterrupt):
            run(model, folder, evaluate=judge)
    known = json.loads((folder / "sweep.json").read_text())["points"]
    assert [p["budget"] for p in known] == [0.8]
    assert not [name for name in files(folder) if name.endswith(".tmp") or name.startswith(".")], files(folder)
    for name in files(folder):
        if name.endswith(".onnx"):
            onnx.checker.check_model(onnx.load(folder / name), full_check=True)
    made.clear()
    report = run(model, folder, evaluate=judge)
    assert report.reused == 1 and made == ["prune{macs=0.6}", "prune{macs=0.5}"]
    assert [(p.macs, p.difference, p.score, p.pareto) for p in report] == [
        (p.macs, p.difference, p.score, p.pareto) for p in expected
    ]


def judge(run_model: Any) -> float:
    return float(np.sum(next(iter(run_model(DATA).values()))))


def stop_at(place: str, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the work on the second model."""
    owner, name = {
        "optimize": (api, "optimize"),
        "save": (api.Result, "save"),
        "evaluate": (sweeps._Work, "_judged"),
        "write": (os, "replace"),
    }[place]
    real, calls = getattr(owner, name), {"count": 0}
    # "evaluate" sees the dense model too; "write" stops where the record gets the second point.
    nth = {"optimize": 2, "save": 2, "evaluate": 3}.get(place)

    def stopping(*args: Any, **options: Any) -> Any:
        calls["count"] += 1
        second = (
            str(args[-1]).endswith("sweep.json") and "macs-0.6" in Path(args[0]).read_text() if nth is None else False
        )
        if second or calls["count"] == nth:
            raise KeyboardInterrupt
        return real(*args, **options)

    patch.setattr(owner, name, stopping)


def test_a_failing_evaluate_keeps_what_is_finished(model: Path, tmp_path: Path, made: list[str]) -> None:
    state = {"calls": 0}

    def score(_: Any) -> float:
        state["calls"] += 1
        if state["calls"] == 3:
            raise RuntimeError("no labels")
        return 1.0

    with pytest.raises(RuntimeError, match="no labels"):
        run(model, tmp_path / "out", evaluate=score)
    assert run(model, tmp_path / "out", evaluate=score).reused == 1 and len(made) == 4


def test_a_copy_of_the_folder_goes_on_elsewhere(model: Path, tmp_path: Path, made: list[str]) -> None:
    run(model, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    assert run(model, tmp_path / "moved").reused == 3 and len(made) == 3
