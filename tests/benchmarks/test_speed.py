"""Speed, as ratios against a floor or a peer in the same run. Prints tables; asserts only that the work was done."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tests.benchmarks import files, models

import cipm_ir
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.program import Program


def best_of(run: Callable[[], object], times: int) -> float:
    """Shortest of several runs, in seconds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize(
    ("name", "goal"),
    [("bert-base, 1 x 128", 0.2), ("bert-base, 1 x 512", 0.2), ("densenet121, 1 x 3 x 224 x 224", 1.0)],
)
def test_analysis_against_a_forward_run(name: str, goal: float) -> None:
    proto = models.densenet121() if name.startswith("dense") else models.bert(length=int(name.rsplit(" ", 1)[1]))
    model = ir.from_proto(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    ids = "int" in source.type
    feed = {source.name: np.zeros(source.shape, np.int64) if ids else np.ones(source.shape, np.float32)}
    analysis = best_of(lambda: Analysis.of(model), 7)
    forward = best_of(lambda: session.run(None, feed), 7)
    units = sum(s.size for s in Program.of(model).spaces if s.kind == "units")
    print(
        f"\n{name}: {len(list(model.graph))} nodes, {units} units; analysis {analysis * 1e3:.0f} ms, "
        f"forward {forward * 1e3:.0f} ms, ratio {analysis / forward:.2f} (goal {goal})"
    )
    assert units > 9000


@pytest.mark.parametrize("activation", ["Gelu", "Relu"])
def test_canonicalize_against_load_and_save(activation: str) -> None:
    with files.scratch() as folder:
        path = files.feed_forward(folder, 500, activation=activation)

        def ours() -> None:
            cipm_ir.optimize(path, ["canonicalize"], output=folder / "ours.onnx", verify=False)

        def floor() -> None:
            ir.save(ir.load(path), folder / "floor.onnx", external_data="floor.onnx.data")

        def classic() -> None:
            onnx.save(
                onnx.load(path), folder / "classic.onnx", save_as_external_data=True, location="classic.onnx.data"
            )
            for file in folder.glob("classic.onnx*"):
                file.unlink()

        seconds = [best_of(run, 3) for run in (ours, floor, classic)]
        ours_s, floor_s, classic_s = seconds
        print(f"\n500 MB, {activation}: canonicalize with load and save {ours_s:.2f} s")
        print(f"  onnx_ir load + save {floor_s:.2f} s: ratio {ours_s / floor_s:.2f} (goal 2)")
        print(f"  onnx load + save {classic_s:.2f} s: ratio {ours_s / classic_s:.2f} (goal below 1)")
        assert moved(path, folder / "ours.onnx")


def moved(before: Path, after: Path) -> bool:
    """Whether the weights were really reordered."""
    first, second = (ir.load(p).graph.initializers["layer1.weight"].const_value for p in (before, after))
    assert first is not None and second is not None
    return not np.array_equal(first.numpy()[:8], second.numpy()[:8])
