"""Short sweeps over a small perceptron, for the tests of `cipm_ir.sweeps`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests import zoo

from cipm_ir import api
from cipm_ir.passes.framework import sweep_report
from cipm_ir.passes.framework.sweep_report import SweepReport
from cipm_ir.sweeps import sweep

DATA = {"x": np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)}
BUDGETS = (0.8, 0.6, 0.5)


def write_model(folder: Path) -> Path:
    onnx.save(zoo.build("mlp_relu"), folder / "net.onnx")
    return folder / "net.onnx"


def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest of these sweeps together."""
    monkeypatch.setattr(sweep_report, "svg", lambda report: None)


def count_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes of every model that is really made from now on, as they are run."""
    calls: list[str] = []
    optimize = api.optimize

    def counted(program: Any, passes: Any, **options: Any) -> Any:
        if passes:
            calls.append(str(passes))
        return optimize(program, passes, **options)

    monkeypatch.setattr(api, "optimize", counted)
    return calls


def run(source: Any, folder: Path, **options: Any) -> SweepReport:
    settings: dict[str, Any] = {"budgets": BUDGETS, "passes_template": "prune", "data": DATA, "threads": None}
    return sweep(source, output_folder=folder, **{**settings, **options})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
