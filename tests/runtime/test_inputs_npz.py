"""Data files: rows come one batch at a time and equal the arrays; bad files are refused; headers suffice to count."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from tests.runtime.test_verify import build

from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs import npz
from cipm_ir.runtime.inputs.generate import batches, sample_count
from cipm_ir.runtime.inputs.npz import Archive

Array = np.ndarray[Any, Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def two_inputs(first: int | str = "N") -> Any:
    nodes = [helper.make_node("Gather", ["t", "k"], ["g"]), helper.make_node("Add", ["x", "g"], ["y"])]
    inputs = {"x": (FLOAT, [first, 3]), "k": (INT64, [first])}
    return build(nodes, inputs, {"y": (FLOAT, [first, 3])}, {"t": np.zeros((9, 3), np.float32)})


def one_input(shape: list[int | str]) -> Any:
    return build([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)})


def arrays(rng: np.random.Generator, count: int = 23) -> dict[str, Array]:
    x = rng.standard_normal((count, 3)).astype(np.float32)
    return {"x": x, "k": rng.integers(0, 9, count), "names": np.array(["?"] * 4)}


SAVERS: dict[str, Callable[[Path, dict[str, Array]], None]] = {
    "stored": lambda path, data: np.savez(path, **data),  # type: ignore[arg-type]
    "compressed": lambda path, data: np.savez_compressed(path, **data),  # type: ignore[arg-type]
    "fortran": lambda path, data: np.savez(path, **{k: np.asfortranarray(v) for k, v in data.items()}),  # type: ignore[arg-type]
    "big-endian float64": lambda path, data: np.savez(path, **{**data, "x": data["x"].astype(">f8")}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("first", ["N", 4])
def test_batches_of_a_file_are_those_of_the_arrays(
    saver: str, first: int | str, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "_READ", 7)
    data, model = arrays(rng), two_inputs(first)
    SAVERS[saver](tmp_path / "d.npz", data)
    for limit in (None, 23, 10, 3, 0):
        found = list(batches(tmp_path / "d.npz", model, 5, limit=limit))
        wanted = list(batches(data, model, 5, limit=limit))
        assert [len(feeds["x"]) for feeds in found] == [len(feeds["x"]) for feeds in wanted]
        for feeds, other in zip(found, wanted, strict=True):
            assert list(feeds) == ["x", "k"]
            for name, array in feeds.items():
                assert array.dtype == other[name].dtype
                np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize(
    ("first", "limit", "sizes"),
    [
        ("N", None, [5, 5, 5, 5, 3]),
        ("N", 12, [5, 5, 2]),
        ("N", 3, [3]),
        ("N", 0, []),
        ("N", 99, [5, 5, 5, 5, 3]),
        (4, None, [4, 4, 4, 4, 4]),
        (4, 9, [4, 4, 4]),
        (4, 8, [4, 4]),
    ],
)
def test_a_limit_cuts_the_last_batch(
    first: int | str, limit: int | None, sizes: list[int], rng: np.random.Generator, tmp_path: Path
) -> None:
    data, model = arrays(rng), two_inputs(first)
    np.savez(tmp_path / "d.npz", **data)  # type: ignore[arg-type]
    whole = {name: data[name] for name in ("x", "k")}
    halves = [{name: array[:12] for name, array in whole.items()}, {name: array[12:] for name, array in whole.items()}]
    for given in (data, tmp_path / "d.npz"):
        assert [len(feeds["x"]) for feeds in batches(given, model, 5, limit=limit)] == sizes
        assert sample_count(given, model, limit=limit) == sum(sizes)
    total = sum(len(feeds["x"]) for feeds in batches(halves, model, 5, limit=limit))
    assert sample_count(halves, model, limit=limit) == total
    assert sample_count(iter(halves), model, limit=limit) is None


def test_a_limit_takes_no_more_of_an_iterable_than_it_needs(rng: np.random.Generator) -> None:
    source = ({"x": np.full((5, 3), k, np.float32)} for k in range(9))
    assert [len(feeds["x"]) for feeds in batches(source, one_input(["N", 3]), 4, limit=10)] == [4, 1, 4, 1]
    assert next(source)["x"][0, 0] == 2


def test_an_array_without_axes_goes_with_every_batch(tmp_path: Path, rng: np.random.Generator) -> None:
    model = build(
        [helper.make_node("Mul", ["x", "s"], ["y"])],
        {"x": (FLOAT, ["N", 3]), "s": (FLOAT, [])},
        {"y": (FLOAT, ["N", 3])},
    )
    np.savez(tmp_path / "d.npz", x=arrays(rng)["x"], s=np.float32(2))
    assert [float(feeds["s"]) for feeds in batches(tmp_path / "d.npz", model, 10)] == [2, 2, 2]


def most_memory(path: Path, model: Any) -> int:
    tracemalloc.start()
    try:
        for _ in batches(path, model, 16):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    model = one_input(["N", 1000])
    peaks = []
    for count in (500, 5000):
        np.savez(tmp_path / "d.npz", x=np.zeros((count, 1000), np.uint8))
        peaks.append(most_memory(tmp_path / "d.npz", model))
    assert peaks[1] < 1.5 * peaks[0] < 1_500_000
    # The check notices what is read whole.
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(np.zeros((5000, 1000), np.uint8)))
    assert most_memory(tmp_path / "d.npz", model) > 4_000_000


def test_counting_reads_no_rows(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "d.npz", **arrays(rng))  # type: ignore[arg-type]

    def refuse(*_: object) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(npz.Rows, "take", refuse)
    assert sample_count(tmp_path / "d.npz", two_inputs()) == 23
    assert sample_count(str(tmp_path / "d.npz"), two_inputs(4)) == 20
    with pytest.raises(AssertionError, match="rows were read"):
        next(batches(tmp_path / "d.npz", two_inputs()))


def test_what_no_input_takes_may_be_anything(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((4, 3), np.float32), notes=np.array([{"a": 1}], object))
    assert sample_count(tmp_path / "d.npz", one_input(["N", 3])) == 4


def damaged(path: Path, kind: str) -> None:
    good = np.arange(30000, dtype=np.float32).reshape(10000, 3)
    if kind == "no zip":
        path.write_bytes(b"not a zip")
    elif kind == "one array":
        np.save(path.with_suffix(".npy"), good)
        path.with_suffix(".npy").rename(path)
    elif kind == "objects":
        np.savez(path, x=np.array([{"a": 1}], object))
    elif kind == "no array":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", b"words only")
    elif kind == "cut off inside":
        np.save(path.with_suffix(".npy"), good)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", path.with_suffix(".npy").read_bytes()[:-1000])
    else:
        np.savez(path, x=good)
        content = bytearray(path.read_bytes())
        if kind == "a flipped bit":
            content[60000] ^= 1
            path.write_bytes(content)
        else:
            path.write_bytes(content[:60000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no zip", "not a zip file"),
        ("one array", "not a zip file"),
        ("objects", "'x' holds Python objects"),
        ("no array", "magic string"),
        ("cut off inside", "'x' is cut off"),
        ("a flipped bit", "Bad CRC-32"),
        ("cut off", "not a zip file"),
    ],
)
def test_bad_files_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    damaged(path, kind)
    with pytest.raises(InputError, match=rf"bad\.npz' is not an \.npz file of plain arrays: .*{message}"):
        list(batches(path, one_input(["N", 3])))


def test_bad_contents_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "d.npz"
    cases: list[tuple[dict[str, Array], str]] = [
        ({"z": np.zeros((4, 3)), "u": np.zeros(4)}, "no array for input 'x'; it holds 'z', 'u'"),
        ({"x": np.zeros((4, 5), np.float32)}, r"'x' has shape .*, but the data has shape \[4, 5\]"),
        ({"x": np.zeros((4, 3), np.complex64)}, "takes float32, but the data is complex64"),
        ({"x": np.zeros((4, 3), np.float32), "k": np.zeros(5, np.int64)}, "different numbers of samples"),
    ]
    for data, message in cases:
        np.savez(path, **data)  # type: ignore[arg-type]
        model = two_inputs() if "k" in data else one_input(["N", 3])
        for read in (lambda m: list(batches(path, m)), lambda m: sample_count(path, m)):
            with pytest.raises(InputError, match=message):
                read(model)
    np.savez(path, x=np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match="exactly 3"):
        sample_count(path, one_input([3, 3]))
    with pytest.raises(InputError, match="no data file"):
        Archive(tmp_path / "none.npz")


def test_a_file_is_closed_with_its_archive(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "d.npz", **arrays(rng))  # type: ignore[arg-type]
    with Archive(tmp_path / "d.npz") as archive:
        assert (list(archive), len(archive)) == (["x", "k", "names"], 3)
        rows = archive["x"]
        assert rows.take(2).shape == (2, 3)
    with pytest.raises(InputError, match="closed"):
        rows.take(1)
