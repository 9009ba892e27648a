"""A sweep over a torch module: .pt2 files, compared in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cipm_ir.sweeps import sweep  # noqa: E402


def test_a_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    x = torch.randn(20, 6)
    data = {"input_1": x.numpy()}
    calls: list[int] = []

    def score(run: Any) -> float:
        calls.append(1)
        with torch.no_grad():
            return -float(np.linalg.norm(next(iter(run(data).values())) - module(x).numpy()))

    options = {"budgets": (0.7, 0.4), "passes_template": "prune", "data": data, "example_inputs": (x,)}
    report = sweep(module, output_folder=tmp_path / "out", evaluate=score, **options)  # type: ignore[arg-type]
    assert [p.file for p in report] == ["macs-0.7.pt2", "macs-0.4.pt2"] and len(calls) == 3
    assert report.dense.latency is not None and report[1].agreement is not None
    for point in report:
        with torch.no_grad():
            made = torch.export.load(tmp_path / "out" / point.file).module()(x)
            off = float((made - module(x)).norm())
            assert point.score == pytest.approx(-off, rel=1e-4)
            assert point.difference == pytest.approx(off / float(module(x).norm()), rel=1e-4)
            assert point.agreement == np.mean((made.argmax(1) == module(x).argmax(1)).numpy())
    again = sweep(module, output_folder=tmp_path / "out", evaluate=score, **options)  # type: ignore[arg-type]
    assert again.reused == 2 and len(calls) == 3
