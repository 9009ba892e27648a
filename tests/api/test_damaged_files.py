"""Damaged and odd files end with an error or a right answer; a sample of `tests.benchmarks.damaged_files`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests import zoo
from tests.benchmarks.damaged_files import DEFECTS, File, contained, judge

import cipm_ir


@pytest.mark.parametrize("first", [0, 500])
def test_a_sample_of_damaged_files(first: int) -> None:
    """The module has its own processes, limits and judge; it exits with 1 where a case ends badly."""
    command = [sys.executable, "-m", "tests.benchmarks.damaged_files", "--first", str(first), "--count", "20", "--all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout
    ends = re.findall(r"^(\w+(?: over)?) ", done.stdout, flags=re.MULTILINE)
    assert ends.count("refused") >= 5 and ends.count("right") >= 3 and not set(ends) & set(DEFECTS)


# --- controls: the judge sees what must not happen ------------------------------------------------


def raises(*_: Any, **__: Any) -> None:
    raise KeyError("inner")


def writes_another_model(source: Any, *_: Any, output: Path, **__: Any) -> None:
    model = onnx.load(source)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(2), tensor.name))
    onnx.save(model, output)


def leaves_a_part(source: Any, *_: Any, output: Path, **__: Any) -> None:
    Path(f".{output}.tmp").write_bytes(b"half")
    raise cipm_ir.OutputError("The disk is full.")


def writes_and_refuses(source: Any, *_: Any, output: Path, **__: Any) -> None:
    output.write_bytes(b"")
    raise cipm_ir.InputError("The model is damaged.")


def says_nothing(*_: Any, **__: Any) -> None:
    raise cipm_ir.InputError("")


class Story(cipm_ir.InputError):
    """An error whose text is not kept on one line."""

    __str__ = Exception.__str__


def tells_a_story(*_: Any, **__: Any) -> None:
    raise Story("First this.\nThen that.")


CONTROLS: list[tuple[Callable[..., None], str]] = [
    (raises, "raw"),
    (writes_another_model, "wrong"),
    (leaves_a_part, "left over"),
    (writes_and_refuses, "left over"),
    (says_nothing, "raw"),
    (tells_a_story, "raw"),
]


def good() -> File:
    return File("good", "control", zoo.build("mlp_relu").SerializeToString())


@pytest.mark.parametrize(("optimize", "end"), CONTROLS)
def test_the_judge_sees_defects(
    optimize: Callable[..., None], end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(cipm_ir, "optimize", optimize)
    assert judge(good(), ())[0] == end


def test_the_judge_lets_a_good_file_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert judge(good(), ("clean-up",)) == ("right", "")


def test_a_case_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr("tests.benchmarks.damaged_files.judge", lambda *_: time.sleep(60))
    assert contained(good(), (), seconds=1) == ("hang", "more than 1 s")
