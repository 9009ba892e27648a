"""Pareto flags, the table and the record of a sweep, and hashes of models and data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import zoo

from cipm_ir.errors import InputError
from cipm_ir.passes.framework.sweep_report import Point, SweepReport, pareto, read_record, write_files
from cipm_ir.runtime.content import data_hash, model_hash
from cipm_ir.runtime.verification.closeness import closeness


def point(budget: float, macs: int, difference: float | None, **more: Any) -> Point:
    return Point(budget, "done", macs=macs, difference=difference, file=f"{budget}.onnx", **more)


# --- Pareto ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "qualities", "flags"),
    [
        ([3, 2, 1], [3, 2, 1], [True, True, True]),
        ([3, 2, 1], [1, 2, 3], [False, False, True]),
        ([2, 2, 1], [2, 1, 1], [True, False, True]),
        ([1, 1], [1, 1], [True, True]),
        ([1, 2], [1, 1], [True, False]),
        ([1, 2], [math.nan, 1], [False, True]),
        ([], [], []),
    ],
)
def test_pareto(costs: list[float], qualities: list[float], flags: list[bool]) -> None:
    assert pareto(costs, qualities, [True] * len(costs)) == flags


def test_a_point_without_a_model_beats_nothing() -> None:
    assert pareto([0, 1], [9, 1], [False, True]) == [False, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_pareto_points_are_those_that_no_other_beats(pairs: list[tuple[int, int]]) -> None:
    flags = pareto([c for c, _ in pairs], [q for _, q in pairs], [True] * len(pairs))
    for (c, q), flag in zip(pairs, flags, strict=True):
        beaten = any((a, -b) != (c, -q) and a <= c and b >= q for a, b in pairs)
        assert flag is not beaten


def test_the_dense_model_competes() -> None:
    dense = Point(1.0, "dense", macs=100, difference=0.0)
    report = SweepReport("macs", dense, (point(0.5, 50, 0.2), point(0.9, 90, 0.3), point(1.0, 100, 0.1))).flagged()
    assert [p.budget for p in report] == [1.0, 0.9, 0.5] and report.dense.pareto
    assert [p.pareto for p in report] == [False, False, True]
    worse = replace(dense, difference=0.5)  # where the score says so, a pruned model beats the dense one
    assert not SweepReport("macs", worse, (point(0.5, 50, 0.2),)).flagged().dense.pareto


def test_a_score_goes_before_the_difference() -> None:
    dense = Point(1.0, "dense", macs=100, difference=0.0, score=0.9)
    two = (point(0.9, 90, 0.1, score=0.5), point(0.8, 80, 0.2, score=0.6))
    assert [p.pareto for p in SweepReport("macs", dense, two).flagged()] == [False, True]


# --- the record -----------------------------------------------------------------------------------


def test_the_record_comes_back(tmp_path: Path) -> None:
    dense = Point(1.0, "dense", macs=10, params=5, latency=1e-3, relative=1.0, difference=0.0, key="k")
    odd = point(0.5, 5, math.inf, agreement=None, summary='Ümlaut, "quotes"', key="l", digest="d")
    out_of_reach = Point(0.1, "impossible", "prune{macs=0.1}", reason="too small")
    report = SweepReport("macs", dense, (odd, out_of_reach), ("a note",)).flagged()
    write_files(report, tmp_path, {"seed": 0})
    assert read_record(tmp_path / "sweep.json") == (report.dense, list(report.points))
    assert read_record(tmp_path / "none.json") is None
    json.loads((tmp_path / "sweep.json").read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    text = str(report)
    assert "0.1 impossible: too small" in text and "a note" in text


def test_columns_that_say_nothing_are_left_out() -> None:
    dense = Point(1.0, "dense", macs=10, params=5)
    assert "agreement" not in str(SweepReport("macs", dense, (point(0.5, 5, None),)))
    assert "agreement" in str(SweepReport("macs", dense, (point(0.5, 5, None, agreement=0.5),)))


# --- hashes ---------------------------------------------------------------------------------------


def test_a_model_hash_is_of_the_content() -> None:
    proto = zoo.build("conv_flatten_gemm")
    first = model_hash(ir.from_proto(proto))
    assert first == model_hash(ir.from_proto(proto)) == model_hash(ir.from_proto(proto).clone())
    assert first != model_hash(ir.from_proto(zoo.build("mlp_relu")))


@pytest.mark.parametrize("change", ["weight", "attribute", "wiring", "opset", "input"])
def test_a_small_change_shows_in_the_hash(change: str) -> None:
    model = ir.from_proto(zoo.build("conv_flatten_gemm"))
    before = model_hash(model)
    conv = next(node for node in model.graph if node.op_type == "Conv")
    if change == "weight":
        value = next(v for v in model.graph.initializers.values() if v.const_value is not None)
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array.flat[0] = np.nextafter(array.flat[0], np.float32(np.inf))
        value.const_value = ir.tensor(array, name=value.name)
    elif change == "attribute":
        conv.attributes["note"] = ir.AttrInt64("note", 1)
    elif change == "wiring":
        conv.replace_input_with(0, conv.inputs[1])
    elif change == "opset":
        model.graph.opset_imports[""] += 1
    else:
        model.graph.inputs[0].dtype = ir.DataType.FLOAT16
    assert model_hash(model) != before


def test_metadata_is_no_content() -> None:
    model = ir.from_proto(zoo.build("conv_flatten_gemm"))
    before = model_hash(model)
    model.graph.doc_string = "hello"
    model.metadata_props["key"] = "value"
    assert model_hash(model) == before


def test_subgraphs_count() -> None:
    model = ir.from_proto(zoo.build("if_capture"))
    before = model_hash(model)
    branch = next(a.value for node in model.graph for a in node.attributes.values() if isinstance(a.value, ir.Graph))
    next(iter(branch)).attributes["note"] = ir.AttrInt64("note", 1)
    assert model_hash(model) != before


def test_data_hashes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(2, np.int64)}
    assert data_hash(arrays) == data_hash(dict(reversed(arrays.items())))
    others: list[Any] = [
        {"a": arrays["a"].reshape(3, 2), "b": arrays["b"]},
        {"a": arrays["a"].astype(np.float32), "b": arrays["b"]},
        {"c": arrays["a"], "b": arrays["b"]},
        [arrays, arrays],
        None,
    ]
    assert len({data_hash(data) for data in [arrays, *others]}) == 6
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    first = data_hash(tmp_path / "a.npz")
    assert first == data_hash(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", a=arrays["a"] + 1)
    assert data_hash(tmp_path / "a.npz") != first


def test_arrays_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"a": np.arange(60.0).reshape(10, 6), "b": np.arange(40), "c": np.float32(3.0), "d": np.zeros((0, 2))}
    whole = data_hash(arrays)
    monkeypatch.setattr("cipm_ir.runtime.content._CHUNK", 100)
    assert data_hash(arrays) == whole
    assert data_hash({**arrays, "a": arrays["a"] + (np.arange(10) == 9)[:, None]}) != whole


@pytest.mark.parametrize("data", [np.zeros(3), 5, iter([]), [1]])
def test_what_is_no_data(data: Any) -> None:
    with pytest.raises(InputError):
        data_hash(data)


# --- closeness ------------------------------------------------------------------------------------


def test_closeness_adds_up_over_batches() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((7, 4)), 0.3 * rng.standard_normal((7, 4))
    feeds = [{"i": np.arange(0, 4)}, {"i": np.arange(4, 7)}]
    got = closeness(lambda f: {"y": x[f["i"]]}, lambda f: {"z": (x + noise)[f["i"]]}, feeds)
    assert got.difference == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(x)) and got.samples == 7
    assert got.agreement == np.mean(x.argmax(1) == (x + noise).argmax(1))


def test_closeness_of_odd_outputs() -> None:
    feeds = [{"i": np.zeros(2)}]

    def give(*arrays: Any) -> Any:
        return lambda _: {str(k): np.asarray(a) for k, a in enumerate(arrays)}

    ones, zeros = np.ones((2, 3, 4)), np.zeros((2, 3, 4))
    assert closeness(give(ones), give(ones), feeds).agreement is None
    assert closeness(give(zeros), give(zeros), feeds).difference == 0.0
    assert closeness(give(zeros), give(ones), feeds).difference == math.inf
    assert closeness(give(ones), give(ones * np.nan), feeds).difference == math.inf
    assert closeness(give(ones, ones), give(ones, 0 * ones), feeds).difference == 1.0
    complex_ones = np.ones((2, 3)) + 1j
    assert closeness(give(complex_ones), give(complex_ones.real + 0j), feeds).difference == pytest.approx(0.5**0.5)
    assert closeness(give(complex_ones), give(complex_ones), feeds).agreement is None
    with pytest.raises(InputError, match="outputs have shapes"):
        closeness(give(ones), give(ones[:, :2]), feeds)
    with pytest.raises(InputError, match="no samples"):
        closeness(give(ones), give(ones), [])
