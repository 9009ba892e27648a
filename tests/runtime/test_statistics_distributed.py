"""The same statistics from many workers: everything is sent, little is in flight, errors arrive, the numbers agree."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import zoo
from tests.paths import ROOT
from tests.runtime.test_observe import noted
from tests.runtime.test_statistics import drawn, mlp, wide_mlp

import cipm_ir
from cipm_ir.errors import InputError, OptionError, UnsupportedError
from cipm_ir.runtime.session import run
from cipm_ir.runtime.statistics import distributed
from cipm_ir.runtime.statistics.collect import Statistics
from cipm_ir.runtime.statistics.collect import collect as collect_here
from cipm_ir.runtime.statistics.distributed import Engine, Processes, collect, pack, unpack

FULL: dict[str, Any] = {"gram": True, "lags": (1, 2), "measures": ("cofiring", "spearman"), "rows": 64}


class Wire:
    """Nothing but bytes passes between this engine's caller and its one worker, and work waits until asked for."""

    workers = 1

    def __init__(self) -> None:
        self.flying = self.most = self.calls = 0

    def share(self, thing: Any) -> Any:
        return pickle.dumps(thing)

    def submit(self, function: Any, *arguments: Any) -> Any:
        self.flying += 1
        self.calls += 1
        self.most = max(self.most, self.flying)
        return pickle.dumps((function, [a if isinstance(a, bytes) else pickle.dumps(a) for a in arguments]))

    def result(self, handle: Any) -> Any:
        self.flying -= 1
        function, arguments = pickle.loads(handle)
        return pickle.loads(pickle.dumps(function(*map(pickle.loads, arguments))))

    def close(self) -> None:
        raise AssertionError("an engine that was given is not closed")


def assert_same(found: Statistics, other: Statistics, *, bits: bool = False) -> None:
    assert (list(found), found.samples) == (list(other), other.samples)
    for name, one in found.items():
        assert one.parts.keys() == other[name].parts.keys()
        for key, part in one.parts.items():
            state = other[name].parts[key].state()
            for field, array in part.state().items():
                if bits:
                    np.testing.assert_array_equal(array, state[field])
                else:
                    np.testing.assert_allclose(array, state[field], rtol=1e-5, atol=1e-4)


def test_shards_give_the_numbers_of_one_process(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 430, 5)
    wire = Wire()
    assert isinstance(wire, Engine)
    found = collect(program, data, engine=wire, shard=100, **FULL)
    assert (wire.calls, wire.most) == (5, 2)
    assert_same(found, collect_here(program, data, **FULL))
    assert_same(found, collect(program, data, engine="local", shard=100, **FULL), bits=True)
    part = collect(program, data, engine="local", shard=40, size=20, limit=100)
    assert_same(part, collect_here(program, {"x": data["x"][:100]}))
    part = collect(program, data, engine=Wire(), shard=40, size=15, limit=97)
    assert_same(part, collect_here(program, data, size=31, limit=97))
    assert part.samples == 97


def test_data_in_any_form(rng: np.random.Generator, tmp_path: Path) -> None:
    program, data = mlp(), drawn(rng, 60, 5)
    np.savez(tmp_path / "data.npz", x=data["x"])
    whole = collect_here(program, data)
    assert_same(collect(program, tmp_path / "data.npz", engine="local", shard=25), whole)
    wire = Wire()
    assert_same(collect(program, iter([{"x": x} for x in np.split(data["x"], 12)]), engine=wire, shard=10), whole)
    assert wire.calls == 6
    for given in (data, tmp_path / "data.npz"):
        shown: list[float | None] = []
        collect(program, given, engine="local", shard=25, progress=noted(shown))
        assert shown == [25 / 60, 50 / 60, 1]


def test_sketches_and_the_second_run(rng: np.random.Generator) -> None:
    program, data = wide_mlp(64), drawn(rng, 300, 16)
    options: dict[str, Any] = {"pairs": "sketch", "buckets": 128, "partners": 2}
    found = collect(program, data, engine=Wire(), shard=77, **options)
    name = program.spaces[0].name
    here = collect_here(program, data, **options)[name]
    np.testing.assert_allclose(found[name].correlation, here.correlation, atol=1e-4)
    np.testing.assert_array_equal(found[name].strongest(20)[0], here.strongest(20)[0])


def test_a_convolutional_model_with_blocks(rng: np.random.Generator) -> None:
    program = cipm_ir.load(zoo.build("grouped_conv"))
    data = {"x": rng.standard_normal((20, 3, 6, 6)).astype(np.float32)}
    here = collect_here(program, data, gram=True)
    assert_same(collect(program, data, engine=Wire(), shard=7, gram=True), here)


def test_errors_of_workers_arrive(rng: np.random.Generator) -> None:
    data = drawn(rng, 50, 5)
    data["x"][33, 2] = np.nan
    with pytest.raises(InputError, match="NaN or infinite on samples 30 to 39 of the data"):
        collect(mlp(), data, engine=Wire(), shard=10)
    with pytest.raises(InputError, match="no samples"):
        collect(mlp(), iter([]), engine=Wire())


def test_options_are_checked(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    program, data = mlp(), drawn(rng, 5, 5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"engine": "cloud"}, "no engine 'cloud'; there are ray, processes, local"),
        ({"engine": "local", "shard": 0}, "shard is 0"),
        ({"engine": "local", "colour": 1}, "colour"),
    ]
    for options, message in cases:
        with pytest.raises(OptionError, match=message):
            collect(program, data, **options)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(distributed, "importlib", type("Nothing", (), {"import_module": staticmethod(missing)}))
    with pytest.raises(UnsupportedError, match=r'pip install "cipm-ir\[ray\]"'):
        collect(program, data)


def test_large_weights_travel_apart(rng: np.random.Generator) -> None:
    program = wide_mlp(2048)
    packed = pack(program.model)
    assert sum(a.nbytes for a in packed.arrays.values()) == 2048 * 16 * 4
    assert len(packed.structure) < 100_000
    data = drawn(rng, 3, 16)
    before, after = run(program.model, data), run(unpack(packed), data)
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


@pytest.mark.slow
def test_worker_processes(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 90, 5)
    engine = Processes(1)
    try:
        found = collect(program, data, engine=engine, shard=40, **FULL)
    finally:
        engine.close()
    assert_same(found, collect(program, data, engine="local", shard=40, **FULL))


@pytest.mark.slow
def test_ray(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    ray: Any = pytest.importorskip("ray", reason="Ray is not installed (the extra [ray])")
    assert importlib.import_module("ray") is ray
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    program, data = mlp(), drawn(rng, 90, 5)
    found = collect(program, data, workers=1, shard=40, **FULL)
    assert not ray.is_initialized()
    assert_same(found, collect(program, data, engine="local", shard=40, **FULL))
    data["x"][70] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        collect(program, data, workers=1, shard=40)
    assert not ray.is_initialized()
