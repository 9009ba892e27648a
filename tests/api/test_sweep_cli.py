"""`cipm sweep`: the table on stdout, clear sentences, and what is said when it is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from tests import zoo
from typer.testing import CliRunner, Result

from cipm_ir import api, cli_sweep
from cipm_ir.errors import CipmError, InputError, OptionError
from cipm_ir.passes.framework import sweep_report


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(zoo.build("mlp_relu"), tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "calib.npz", x=rng.standard_normal((30, 5)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_report, "svg", lambda report: None)
    return tmp_path


def call(*words: str) -> Result:
    app = typer.Typer()
    app.command("sweep")(cli_sweep.sweep)
    given = ["net.onnx", "-o", "out", "-p", "prune", "--threads", "0"]
    return CliRunner().invoke(app, [*given, *words])


def test_a_sweep_and_the_same_again(folder: Path) -> None:
    first = call("--data", "calib.npz", "--budgets", ".8,.5")
    assert first.exit_code == 0, first.output
    assert "macs-0.5.onnx" in first.stdout and "written: out\n" in first.stdout and not first.stderr
    assert [p["budget"] for p in json.loads((folder / "out" / "sweep.json").read_text())["points"]] == [0.8, 0.5]
    assert "written: out; 2 of 2 points were there already" in call("--data", "calib.npz", "--budgets", ".8,.5").stdout


def test_quiet(folder: Path) -> None:
    done = call("--data", "calib.npz", "--budgets", "0.5", "-q")
    assert done.exit_code == 0 and not done.output and (folder / "out" / "macs-0.5.onnx").exists()


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        (["--data", "calib.npz", "--budgets", "half"], OptionError, "--budgets takes numbers .* not 'half'"),
        (["--data", "calib.npz", "--budgets", ","], OptionError, "at least one budget"),
        (["--data", "none.npz"], InputError, "no data file 'none.npz'"),
        ([], InputError, "give data="),
        (["--data", "calib.npz", "--budgets", ".001"], CipmError, "No budget could be met: prune cannot come down"),
    ],
)
def test_clear_sentences(folder: Path, words: list[str], error: type[CipmError], complaint: str) -> None:
    failed = call(*words)
    assert isinstance(failed.exception, error)
    with pytest.raises(error, match=complaint):
        raise failed.exception


def test_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    optimize = api.optimize

    def stopping(program: Any, passes: Any, **options: Any) -> Any:
        if "0.5" in str(passes):
            raise KeyboardInterrupt
        return optimize(program, passes, **options)

    monkeypatch.setattr(api, "optimize", stopping)
    with pytest.raises(KeyboardInterrupt):
        cli_sweep.sweep("net.onnx", "out", data="calib.npz", budgets=".8,.5", passes="prune", threads=0)
    assert "what is finished is in 'out'; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert "1 of 2 points were there already" in call("--data", "calib.npz", "--budgets", ".8,.5").stdout
