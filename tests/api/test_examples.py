"""The examples run as they stand, without arguments, on the committed model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an example as a user does, with the checkout on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the demo takes its test images from scikit-learn")
    out = run("digits/demo.py", cwd=tmp_path).stdout
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    names = ("canonical", "compressed-25", "compressed-50", "pruned-50", "pruned-80", "smaller")
    assert written == [*(f"digits-{name}.onnx" for name in names), "report.html"]
    rows = {
        found.group(1): (int(found.group(2).replace(",", "")), float(found.group(3)))
        for found in re.finditer(r"^(digits\S*\.onnx)\s+\S+\s+\S+\s+(\S+)\s+([\d.]+)%", out, re.MULTILINE)
    }
    macs, score = rows["digits.onnx"]
    assert score > 98
    # Exact passes keep every prediction; pruning keeps its budget and, where mild, most of them.
    assert rows["digits-canonical.onnx"] == (macs, score)
    assert rows["digits-smaller.onnx"][1] == score
    assert rows["digits-pruned-80.onnx"][0] <= 0.8 * macs and rows["digits-pruned-50.onnx"][0] <= 0.5 * macs
    assert rows["digits-pruned-80.onnx"][1] > 80
    # At the same size, compensation keeps what deletion loses.
    assert rows["digits-compressed-50.onnx"][0] <= 0.5 * macs and rows["digits-compressed-50.onnx"][1] > 98
    assert rows["digits-pruned-50.onnx"][1] < 90
    first, second = re.findall(r"fingerprints: (\w{16}) and (\w{16})", out)[0]
    assert first == second


def test_custom_pass(tmp_path: Path) -> None:
    out = run("custom_pass.py", cwd=tmp_path).stdout
    assert "shuffle{least=8}" in out and "undone: equal" in out


def test_toolchain_step(tmp_path: Path) -> None:
    assert "latency of a batch" in run("toolchain_step.py", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_toolchain_step_fails_by_its_exit_code(tmp_path: Path) -> None:
    done = run("toolchain_step.py", "missing.onnx", cwd=tmp_path, code=2)
    assert done.stderr.startswith("bad input: There is no file") and done.stderr.count("\n") == 1
