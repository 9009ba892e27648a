"""Exact passes read the weights of a file one at a time: what they allocate stays below a part of the weights."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tests.benchmarks.big_weights import PASSES, mixture

import cipm_ir
from cipm_ir.passes import equalize_solve
from cipm_ir.runtime.content import model_hash

PARTS = 0.75
"""Of the weights, which are ten times the largest of them; computing with one in float64 takes a few copies of it."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("streaming"), 1, 512)


@pytest.fixture(autouse=True)
def no_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalize_solve, "IN_MEMORY", 0)


def weights(path: Path) -> int:
    return Path(f"{path}.data").stat().st_size


def peak(run: Callable[[], object]) -> int:
    """Most bytes that were allocated at a time beyond those at the start; mapped files are no allocations."""
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def arrays(path: Path) -> Iterator[np.ndarray]:
    yield from (v.const_value.numpy() for v in cipm_ir.load(path).model.graph.initializers.values() if v.const_value)


@pytest.mark.parametrize("name", [name for name in PASSES if name != "cluster"])
def test_peak_of_a_pass(name: str, path: Path, tmp_path: Path) -> None:
    def run() -> None:
        if name == "fingerprint":
            cipm_ir.fingerprint(path)
        else:
            cipm_ir.optimize(path, [name], output=tmp_path / "out.onnx", verify=False)

    assert peak(run) < PARTS * weights(path)


def test_control_what_keeps_every_weight_is_seen(path: Path) -> None:
    """Negative control: copies in the type of the file are too much already, and reading without them is nothing."""
    assert peak(lambda: [array.copy() for array in arrays(path)]) > PARTS * weights(path)
    assert peak(lambda: [np.abs(array).max() for array in arrays(path)]) < PARTS * weights(path)


@pytest.mark.parametrize("name", ["equalize", "expose", "fold", "canonicalize"])
def test_the_result_does_not_depend_on_where_weights_lie(name: str, path: Path) -> None:
    held = ir.load(path)
    for value in held.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    made = [cipm_ir.optimize(source, [name], verify=False).program.written for source in (path, held)]
    assert model_hash(made[0]) == model_hash(made[1])
    assert model_hash(made[0]) != model_hash(held)
