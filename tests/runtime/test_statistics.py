"""`collect` on whole models: the numbers against plain numpy, their symmetry, what is refused, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import zoo
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.algebra import Element
from cipm_ir.errors import CipmError, InputError, OptionError, OutputError, SymmetryError
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry
from cipm_ir.runtime.session import run
from cipm_ir.runtime.statistics.collect import Statistics, collect
from cipm_ir.runtime.statistics.sites import find_sites
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers

Array = np.ndarray[Any, Any]


def mlp(width: int = 12, name: str = "statistics-mlp") -> Program:
    net = Net(name)
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, width))
    net.output(net.gemm(h, width, 3), ["N", 3])
    return cipm_ir.load(net.model())


def wide_mlp(width: int) -> Program:
    """Units 2k and 2k + 1 are nearly the same."""
    net = Net("statistics-wide")
    weight = np.repeat(net.normal((width // 2, 16), 0.25), 2, axis=0) + net.normal((width, 16), 0.02)
    h = net.op("Tanh", net.op("Gemm", net.input("x", ["N", 16]), net.const(weight), net.bias(width), transB=1))
    net.output(net.gemm(h, width, 2), ["N", 2])
    return cipm_ir.load(net.model())


def recurrence() -> Program:
    """Tokens (N, T, 4) -> 6 units -> (N, T, 2)."""
    net = Net("statistics-tokens")
    h = net.op("Tanh", net.linear(net.input("x", ["N", "T", 4]), 4, 6))
    net.output(net.linear(h, 6, 2), ["N", "T", 2])
    return cipm_ir.load(net.model())


def drawn(rng: np.random.Generator, count: int, *shape: int) -> dict[str, Array]:
    return {"x": rng.standard_normal((count, *shape)).astype(np.float32)}


def hidden(program: Program, data: dict[str, Array]) -> Array:
    site = find_sites(program, program.spaces[0])[0]
    return run(program.model, data, [site.value])[site.value]


# ------------------------------------------------------------ the numbers
def test_numbers_of_a_perceptron(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 700, 5)
    h = hidden(program, data).astype(np.float64)
    found = collect(program, data, gram=True, lags=(1, 3), measures=("cofiring", "spearman"))
    one = found[program.spaces[0].name]
    assert (found.samples, one.samples, one.count, one.size) == (700, 700, 700, 12)
    np.testing.assert_allclose(one.mean, h.mean(0), rtol=1e-5)
    np.testing.assert_allclose(one.variance, h.var(0), rtol=1e-4)
    np.testing.assert_allclose(one.covariance, np.cov(h.T, bias=True), atol=1e-5)
    np.testing.assert_allclose(one.correlation, np.corrcoef(h.T), atol=1e-5)
    np.testing.assert_allclose(one.second, h.T @ h / 700, atol=1e-5)
    np.testing.assert_allclose(one.firing, (h > 0).mean(0))
    np.testing.assert_allclose(one.similarity("cofiring"), np.corrcoef((h > 0).T), atol=1e-9)
    for lag in (1, 3):  # no axis but the samples: their order
        np.testing.assert_allclose(one.lagged(lag), np.corrcoef(h[:-lag].T, h[lag:].T)[:12, 12:], atol=1e-5)
    lengths = np.sqrt((h * h).sum(0))
    np.testing.assert_allclose(one.similarity("cosine"), h.T @ h / np.outer(lengths, lengths), atol=1e-5)
    output = readers(program, program.spaces[0])[0].output
    u = np.c_[h, np.ones(700)]
    np.testing.assert_allclose(one.gram[output], u.T @ u / 700, atol=1e-5)
    assert one.exact
    assert one.standard_error == 0
    assert one.rank == 12
    assert not found.warnings
    pairs, value, error = one.strongest(3)
    best = np.sort(np.abs(np.asarray(np.corrcoef(h.T))[np.triu_indices(12, 1)]))[::-1]
    np.testing.assert_allclose(np.abs(value), best[:3], atol=1e-5)
    assert pairs.shape == (3, 2)
    assert not error.any()


def test_batches_do_not_matter(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 333, 5)
    options: dict[str, Any] = {"gram": True, "lags": (2,), "measures": ("spearman",), "rows": 50}
    coarse = collect(program, data, size=333, **options)
    fine = collect(program, ({"x": x[None]} for x in data["x"]), **options)
    for name, one in coarse.items():
        for key, part in one.parts.items():
            for field, array in part.state().items():
                np.testing.assert_allclose(fine[name].parts[key].state()[field], array, rtol=1e-5, atol=1e-4)


def test_convolutions_and_several_sites(rng: np.random.Generator) -> None:
    program = cipm_ir.load(zoo.build("residual_blocks"))
    data = {"x": rng.standard_normal((9, 3, 6, 6)).astype(np.float32)}
    found = collect(program, data, gram=True, size=4)
    for space in program.spaces:
        one, sites = found[space.name], find_sites(program, space)
        seen = run(program.model, data, [site.value for site in sites])
        rows = np.concatenate([np.moveaxis(seen[s.value], 1, -1).reshape(-1, space.size) for s in sites])
        np.testing.assert_allclose(one.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.covariance, np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-4)
        assert len(one.sites) == (len(sites) if len(sites) > 1 else 0)
        for value, moments in one.sites.items():
            np.testing.assert_allclose(
                moments.variance, seen[value].var(axis=(0, 2, 3)[: seen[value].ndim - 1]), rtol=1e-3
            )
        for reader in readers(program, space):
            u = LinearOpGeometry.of(program, reader).inputs(run(program.model, data, [reader.source])[reader.source])
            u = np.c_[u, np.ones(len(u))].astype(np.float64)
            np.testing.assert_allclose(one.gram[reader.output], u.T @ u / len(u), rtol=1e-3, atol=1e-4)


def test_lags_go_along_the_tokens(rng: np.random.Generator) -> None:
    program, data = recurrence(), drawn(rng, 40, 9, 4)
    h = hidden(program, data).astype(np.float64)
    one = collect(program, data, lags=(2,), size=7)[program.spaces[0].name]
    early, late = h[:, :-2].reshape(-1, 6), h[:, 2:].reshape(-1, 6)
    truth = np.corrcoef(early.T, late.T)[:6, 6:]
    np.testing.assert_allclose(one.lagged(2), truth, atol=1e-5)
    larger = np.where(np.abs(truth.T) > np.abs(truth), truth.T, truth)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(np.abs(one.similarity("lagged"))[off], np.abs(larger)[off], atol=1e-5)


# ------------------------------------------------------------ symmetry
# Left out: random inputs whose first axes differ, which are no samples.
SEEN = [
    name
    for name in zoo.names("synthetic", without=("reference", "opaque"))
    if not name.startswith(("gather_dynamic", "gather_nd"))
]


@pytest.mark.parametrize("name", SEEN)
def test_statistics_move_with_the_units(name: str, rng: np.random.Generator) -> None:
    """Relabelling the units relabels their statistics: whatever the topology, numbers are of the unit they say."""
    program = cipm_ir.load(zoo.build_or_skip(name))
    data = cipm_ir_inputs(program, rng)
    before = collect(program, data)
    for space in program.spaces:
        if space.kind == "cells" or space.name not in before:
            continue
        perm = rng.permutation(space.size)
        still = space.identity()
        element = Element(perm, still.scale, still.sign)
        after = collect(program.act({space: element}), data, spaces=None)
        one, other = before[space.name], after[space.name]
        scale = np.abs(one.second).max() + 1e-6
        np.testing.assert_allclose(other.mean, one.mean[perm], atol=2e-4 * scale**0.5)
        np.testing.assert_allclose(other.covariance, one.covariance[np.ix_(perm, perm)], atol=2e-4 * scale)


def test_a_wrong_relabelling_is_noticed(rng: np.random.Generator) -> None:
    """Negative control of the test above."""
    program, data = mlp(), drawn(rng, 50, 5)
    space = program.spaces[0]
    still, perm = space.identity(), np.roll(np.arange(12), 1)
    before = collect(program, data)[space.name]
    after = collect(program.act({space: Element(perm, still.scale, still.sign)}), data)[space.name]
    np.testing.assert_allclose(after.mean, before.mean[perm], rtol=1e-4)
    assert np.abs(after.mean - before.mean[np.argsort(perm)]).max() > 0.01
    assert np.abs(after.mean - before.mean).max() > 0.01


def cipm_ir_inputs(program: Program, rng: np.random.Generator) -> dict[str, Array]:
    from cipm_ir.runtime.inputs.generate import random_inputs

    return random_inputs(program.model, rng, batch=5)


# ------------------------------------------------------------ wide spaces
def test_a_wide_space_is_sketched_and_its_strongest_pairs_are_exact(rng: np.random.Generator) -> None:
    program, data = wide_mlp(300), drawn(rng, 2000, 16)
    name = program.spaces[0].name
    truth = np.asarray(np.corrcoef(hidden(program, data).astype(np.float64).T))
    words = []
    one = collect(program, data, pairs="sketch", progress=lambda what, _: words.append(what))[name]
    assert not one.exact
    assert one.moments.spread.ndim == 1
    assert set(words) == {"collect statistics", "follow strongest pairs"}
    pairs, value, error = one.strongest(150)
    assert {(2 * k, 2 * k + 1) for k in range(150)} <= set(map(tuple, pairs.tolist()))
    np.testing.assert_allclose(value, truth[pairs[:, 0], pairs[:, 1]], atol=1e-4)
    assert not error.any()
    off = np.abs(one.correlation - np.asarray(truth))[np.triu_indices(300, 1)]
    assert np.sqrt((off**2).mean()) < one.standard_error < 0.05
    once = collect(program, iter([data]), pairs="sketch")[name]  # cannot be read again
    assert "pairs" not in once.parts
    assert (once.strongest(150)[2] == one.standard_error).all()
    exact = collect(program, data)[name]
    assert np.abs(one.covariance - exact.covariance).max() < 6 * one.standard_error * exact.variance.max()


def test_shards_of_a_sketched_space_add_up(rng: np.random.Generator) -> None:
    program, data = wide_mlp(60), drawn(rng, 400, 16)
    name = program.spaces[0].name
    halves: list[Any] = [{"x": data["x"][:250]}, {"x": data["x"][250:]}]
    total = (collect(program, halves[0], pairs="sketch") + collect(program, halves[1], pairs="sketch"))[name]
    pairs, value, error = total.strongest(30)
    assert {(2 * k, 2 * k + 1) for k in range(30)} == set(map(tuple, pairs.tolist()))
    truth = collect(program, data)[name].correlation
    np.testing.assert_allclose(value, truth[pairs[:, 0], pairs[:, 1]], atol=1e-5)
    assert not error.any()
    once = collect(program, iter(halves[1:]), pairs="sketch")
    assert "pairs" not in (collect(program, halves[0], pairs="sketch") + once)[name].parts


def test_without_pairs(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 50, 5)
    one = collect(program, data, pairs="none")[program.spaces[0].name]
    np.testing.assert_allclose(one.variance, collect(program, data)[program.spaces[0].name].variance, rtol=1e-5)
    with pytest.raises(OptionError, match='hold no sketch; collect them with pairs="auto"'):
        _ = one.correlation


# ------------------------------------------------------------ shards and files
def test_shards_add_up_to_the_whole(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 500, 5)
    options: dict[str, Any] = {"gram": True, "lags": (1,), "measures": ("cofiring",)}
    whole = collect(program, data, **options)
    parts = [collect(program, {"x": piece}, **options) for piece in np.split(data["x"], [100, 350])]
    total = parts[0] + (parts[1] + parts[2])
    one, other = total[program.spaces[0].name], whole[program.spaces[0].name]
    assert (one.count, one.samples, total.samples) == (500, 500, 500)
    for measure in ("correlation", "cosine", "cofiring", "lagged"):
        np.testing.assert_allclose(one.similarity(measure), other.similarity(measure), atol=1e-5)
    for output, gram in one.gram.items():
        np.testing.assert_allclose(gram, other.gram[output], rtol=1e-5, atol=1e-5)


def test_statistics_of_different_models_are_not_added(rng: np.random.Generator) -> None:
    data = drawn(rng, 20, 5)
    with pytest.raises(InputError, match="cannot be added"):
        collect(mlp(12), data) + collect(mlp(10), data)
    with pytest.raises(InputError, match="same options"):
        collect(mlp(), data) + collect(mlp(), data, lags=(1,))
    with pytest.raises(InputError, match="Only one of the two"):
        collect(mlp(), data) + collect(cipm_ir.load(zoo.build("mlp_relu")), data)


def test_files(rng: np.random.Generator, tmp_path: Path) -> None:
    program, data = wide_mlp(40), drawn(rng, 90, 16)
    path = tmp_path / "statistics.npz"
    found = collect(program, data, gram=True, lags=(1,), measures=("spearman", "cofiring"), pairs="sketch", buckets=32)
    found.save(str(path))
    again = Statistics.load(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.npz"]
    assert again.samples == 90
    for name, one in found.items():
        other = again[name]
        assert (one.kind, one.size, one.samples, one.readers) == (other.kind, other.size, other.samples, other.readers)
        for measure in ("correlation", "cosine", "cofiring", "lagged", "spearman", "information"):
            np.testing.assert_array_equal(one.similarity(measure), other.similarity(measure))
        for output, gram in one.gram.items():
            np.testing.assert_array_equal(gram, other.gram[output])
    assert (again + found).samples == 180


def test_bad_files(rng: np.random.Generator, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        Statistics.load(str(tmp_path / "none.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("bad.npz", "other.npz"):
        with pytest.raises(InputError, match="is not a file of statistics"):
            Statistics.load(str(tmp_path / name))
    found = collect(mlp(), drawn(rng, 9, 5))
    found.save(str(tmp_path / "good.npz"))
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged"):
        Statistics.load(str(tmp_path / "cut.npz"))
    with pytest.raises(OutputError, match="could not be written"):
        found.save(str(tmp_path / "no" / "folder.npz"))
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------ what is refused, what is said
def test_too_few_samples_are_said_with_the_rank(rng: np.random.Generator) -> None:
    program = mlp(40)
    found = collect(program, drawn(rng, 10, 5), gram=True)
    (warning,) = found.warnings
    assert "10 rows of 10 samples for 40 units" in warning
    assert "rank 9" in warning
    assert found[program.spaces[0].name].rank == 9
    net = Net("statistics-conv")
    net.classify(net.relu(net.conv(net.relu(net.conv(net.image(), 3, 4)), 4, 6)), 6)
    conv = cipm_ir.load(net.model())
    (warning, *_) = collect(conv, drawn(rng, 1, 3, 6, 6), gram=True).warnings
    assert "36 rows for the 36 inputs" in warning


def test_constant_inputs(rng: np.random.Generator) -> None:
    program = mlp()
    one = collect(program, {"x": np.ones((30, 5), np.float32)})[program.spaces[0].name]
    assert one.constant.all()
    assert one.rank == 0
    assert np.isfinite(one.correlation).all()
    assert np.abs(one.variance).max() < 1e-12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": np.full((4, 5), np.nan, np.float32)}, "is NaN or infinite on samples 0 to 3"),
        ({"y": np.zeros((4, 5), np.float32), "z": np.zeros(4)}, "no array for input 'x'"),
        ({"x": np.zeros((4, 6), np.float32)}, "has shape"),
        ({"x": np.zeros((0, 5), np.float32)}, "no samples"),
        (iter([]), "no samples"),
        ("nowhere.npz", "no data file"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        collect(mlp(), data)


def test_bad_options(rng: np.random.Generator) -> None:
    program, data = mlp(), drawn(rng, 8, 5)
    cases: list[dict[str, Any]] = [
        {"pairs": "all"},
        {"measures": ("color",)},
        {"lags": (0,)},
        {"rows": 0},
        {"buckets": 0},
    ]
    for options in cases:
        with pytest.raises(OptionError, match=next(iter(options)).rstrip("s")):
            collect(program, data, **options)
    with pytest.raises(SymmetryError, match="no space named"):
        collect(program, data, spaces=["nothing"])
    one = collect(program, data)[program.spaces[0].name]
    with pytest.raises(OptionError, match="There is no measure 'color'"):
        one.similarity("color")
    for measure in ("cofiring", "spearman", "information", "lagged"):
        with pytest.raises(OptionError, match="collect them with"):
            one.similarity(measure)


def test_a_space_that_no_weight_reads_is_seen_but_has_no_gram(rng: np.random.Generator, tmp_path: Path) -> None:
    program = cipm_ir.load(zoo.build("attention_separate"))
    data = cipm_ir_inputs(program, rng)
    found = collect(program, data, gram=True)
    without = [s for s in program.spaces if s.name in found and not found[s.name].gram]
    assert without
    for space in program.spaces:
        if space.name in found:
            said = [text for text in found.warnings if f"@{space.name}: no Gram matrices." in text]
            assert len(said) == (space in without)
    one = found[without[0].name]
    assert one.gramless
    with pytest.raises(KeyError, match="no Gram matrices"):
        one.gram["anything"]
    found.save(tmp_path / "statistics.npz")
    assert Statistics.load(tmp_path / "statistics.npz").warnings == found.warnings == (found + found).warnings
    assert not any(text.gramless for text in collect(program, data).values())
    with pytest.raises(CipmError, match=r"reads @|No weight"):
        collect(program, data, gram=True, spaces=[without[0]])
    blocks = [s for s in program.spaces if s.kind == "blocks"]
    assert (found[blocks[0].name].mean > 0).all()  # root mean squares of heads


def test_only_the_chosen_spaces(rng: np.random.Generator) -> None:
    program = cipm_ir.load(zoo.build("mlp_relu"))
    last = program.spaces[-1]
    found = collect(program, drawn(rng, 6, 5), spaces=[last])
    assert list(found) == [last.name]
    assert found[f"@{last.name}"].size == last.size
    with pytest.raises(KeyError, match="no statistics"):
        found["other"]


def test_progress_and_limit(rng: np.random.Generator) -> None:
    shown: list[float | None] = []
    found = collect(mlp(), drawn(rng, 100, 5), size=10, limit=40, progress=lambda _, done: shown.append(done))
    assert found.samples == 40
    assert shown[-1] == 1
    assert shown == sorted(shown, key=float)  # type: ignore[arg-type]
