"""Exact passes read the weights of a file one at a time: what they allocate stays below a part of the weights."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tests.benchmarks.big_weights import mixture

import cipm_ir
from cipm_ir.ir import parameters
from cipm_ir.passes.exact.canonicalize import members as canonical_members
from cipm_ir.passes.exact.equalize import grid as equalize_grid
from cipm_ir.passes.exact.equalize import solve as equalize_solve
from cipm_ir.passes.exact.equalize.grid import Coded, Dense, Grid, decoded, encoded
from cipm_ir.runtime.content import model_hash

PARTS = 1.0
"""Of the weights, which are fifteen times the largest; two at a time are written, in float64 and in their own type."""
LOOKED_AT = "canonicalize", "equalize", "expose", "fold", "remove-dead", "rotate"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("streaming"), 64, 512)


@pytest.fixture(autouse=True)
def no_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalize_solve, "IN_MEMORY", 0)
    monkeypatch.setattr(canonical_members, "_KEPT_BYTES", 0)


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


@pytest.mark.parametrize("name", LOOKED_AT)
def test_peak_of_a_pass(name: str, path: Path, tmp_path: Path) -> None:
    def run() -> None:
        cipm_ir.optimize(path, [name], output=tmp_path / "out.onnx", verify=False)

    assert peak(run) < PARTS * weights(path)


def test_control_what_keeps_every_weight_is_seen(path: Path) -> None:
    """Negative control: copies in double precision, as several passes kept, are twice the weights."""
    assert peak(lambda: [array.astype(np.float64) for array in arrays(path)]) > PARTS * weights(path)
    assert peak(lambda: [np.abs(array).max() for array in arrays(path)]) < PARTS * weights(path)


@pytest.mark.parametrize("name", ["canonicalize", "expose"])
def test_the_result_does_not_depend_on_where_weights_lie(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped and made when they are written, or in memory and kept."""
    path = mixture(tmp_path, 1, 64)
    held = ir.load(path)
    for value in held.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    made = []
    for source, limit in ((path, 0), (held, 1 << 40)):
        monkeypatch.setattr(parameters, "_LARGE", limit)
        made.append(cipm_ir.optimize(source, [name], verify=False).program.source_model)
    assert model_hash(made[0]) == model_hash(made[1])
    assert model_hash(made[0]) != model_hash(held)


def test_bytes_are_right_to_six_percent() -> None:
    norm = np.exp2(-np.linspace(0, 31, 4001)).astype(np.float32)
    error = decoded(encoded(norm)) / norm - 1
    assert np.abs(error).max() < 0.0626 and np.abs(error.mean()) < 0.005
    assert np.abs(error).max() > 0.05  # three bits hold no more
    assert decoded(encoded(np.asarray([0.0, 1.0], np.float32))).tolist() == [2.0**-31, 1.0]


@pytest.mark.parametrize("shape", [(1, 300, 40), (4, 30, 7)])
def test_norms_in_bytes_are_those_in_memory(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    size = np.exp(rng.standard_normal(shape))
    norms: list[Dense | Coded] = [Dense([size, 2 * size]), Coded([Grid.held(size), Grid.held(2 * size)])]
    r, c = rng.standard_normal((2, *shape[:2])), rng.standard_normal((2, shape[0], shape[2]))
    v, u = rng.random((2, shape[0], shape[2])), rng.random((2, *shape[:2]))
    for up in (r, None):
        tops = [norm.expand(up, c, 6.0) for norm in norms]
        assert np.allclose(tops[0], tops[1], rtol=1e-5)
        found = [norm.products(v, lambda seen, at: u[at] * seen) for norm in norms]
        for exact, coded in zip(*found, strict=True):
            assert np.allclose(exact, coded, rtol=0.15, atol=1e-5)
            assert not np.allclose(exact, 1.3 * coded, rtol=0.15, atol=1e-5)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings of rows, of columns and of groups, some at a time and at once."""
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((12, 5, 3, 3))
    grids = [
        Grid(lambda: kernel, (0, 1, 2, 3), 2, 4),
        Grid(lambda: kernel, (0, 1, 2, 3), 2),
        Grid(lambda: kernel, (1, 0, 2, 3), 2),
        Grid(lambda: kernel, (2, 1, 0, 3), 2),
        Grid(lambda: kernel, (0, 2, 1, 3), 1),
    ]
    told = []
    for chunk in (1 << 20, 50):
        monkeypatch.setattr(equalize_grid, "_CHUNK", chunk)
        made = [Grid(one.array, one.order, one.taps, one.groups) for one in grids]
        told.append([(g.size(), g.row_energy, g.column_energy, g.row_size, g.column_size) for g in made])
        assert [len(list(g.pieces())) for g in made] == ([1] * 5 if chunk > 50 else [4, 12, 12, 1, 12])
    for whole, parts in zip(*told, strict=True):
        for a, b in zip(whole, parts, strict=True):
            assert np.allclose(a, b, rtol=1e-12)
        assert np.allclose(whole[0].max(2), whole[3])
    assert np.allclose(told[0][1][0][0], np.abs(kernel).max((2, 3)))
    assert np.allclose(told[0][0][1].sum(), np.square(kernel).sum())
