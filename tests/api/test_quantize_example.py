"""The example of quantization runs as it stands, and says what the project promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.paths import ROOT

SCRIPT = ROOT / "examples" / "quantize" / "quantize.py"
ROW = re.compile(r"^(as they are|equalized)\s+(per \w+)\s+([\d.]+)\s+([\d.]+)%\s*([\d.]*)", re.MULTILINE)


def run(folder: Path, *arguments: str | Path) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example takes its images from scikit-learn")
    plain, moved = run(tmp_path).split("rescaled at random")
    first, second = ({(m[1], m[2]): (float(m[3]), float(m[5])) for m in ROW.finditer(t)} for t in (plain, moved))
    assert len(first) == len(second) == 4
    assert all(score > 99 for _, score in first.values())
    # In other units the plain quantizer fails, and equalization gives back what it would lose.
    assert second["as they are", "per tensor"][1] < 50
    for steps in ("per tensor", "per channel"):
        error, score = second["equalized", steps]
        assert score > 99 and error < 3 * first["as they are", steps][0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"digits-equalized.onnx", "digits-equalized-int8-tensor.onnx", "digits-moved.onnx"} <= names


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = ROOT / "examples" / "digits" / "digits.onnx"
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "inputs.npz", images=rng.random((64, 1, 8, 8), dtype=np.float32))
    rows = ROW.findall(run(tmp_path, model, tmp_path / "inputs.npz", tmp_path / "made"))
    assert [row[:2] for row in rows] == [
        (w, f"per {s}") for w in ("as they are", "equalized") for s in ("tensor", "channel")
    ]
    assert len(list((tmp_path / "made").iterdir())) == 6
