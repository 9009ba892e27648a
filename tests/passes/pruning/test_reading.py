"""How outputs are read further on: the metric against loops, and what it is worth when units are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import array_of, mlp, program, residual, rows, two_convs, values
from tests.zoo.net import Net

from cipm_ir.passes.pruning.compress.candidates import find_candidates, wanted_spaces
from cipm_ir.passes.pruning.compress.sensitivity import choose_units, gather
from cipm_ir.passes.pruning.limits import Limits
from cipm_ir.passes.pruning.refit import downstream_metric as module
from cipm_ir.passes.pruning.refit.downstream_metric import DownstreamMetric
from cipm_ir.passes.pruning.refit.layers import Layer, layers_of
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]


def metric(made: Program, layer: Layer) -> Array:
    """M, floor included."""
    root = DownstreamMetric(made, layers_of(made)).root(layer)
    assert root is not None
    return root @ root


def writer(made: Program, name: str) -> Layer:
    return next(layer for layer in layers_of(made) if layer.reader.weight == name)


def floored(wanted: Array) -> Array:
    return wanted + module._FLOOR * float(np.trace(wanted)) / len(wanted) * np.eye(len(wanted))


# ---------------------------------------------------------------- against loops
def test_one_product_behind() -> None:
    made = program(mlp())
    w = array_of(made, "w_5").astype(np.float64)
    found = metric(made, writer(made, "w_1"))
    np.testing.assert_allclose(found, floored(w.T @ w / np.square(w).sum()), atol=1e-9)


def test_taps_of_a_convolution_are_summed() -> None:
    made = program(two_convs())
    w = array_of(made, "w_5").astype(np.float64)
    wanted = np.zeros((10, 10))
    for i in range(10):
        for j in range(10):
            for o in range(4):
                for a in range(3):
                    for b in range(3):
                        wanted[i, j] += w[o, i, a, b] * w[o, j, a, b]
    np.testing.assert_allclose(metric(made, writer(made, "w_1")), floored(wanted / np.square(w).sum()), atol=1e-9)


def test_every_reader_of_a_stream_that_comes_later() -> None:
    """What the second block writes is read by the third and the classifier, not by what came before."""
    made = program(residual())
    layers = layers_of(made)
    writers = [k for k, x in enumerate(layers) if array_of(made, x.reader.weight).shape[:2] == (8, 16)]
    assert len(writers) == 3
    for number, k in enumerate(writers):
        later = [x for x in layers[k + 1 :] if array_of(made, x.reader.weight).shape[1] == 8]
        assert len(later) == 3 - number
        wanted = np.zeros((8, 8))
        for x in later:
            w = np.moveaxis(array_of(made, x.reader.weight).astype(np.float64), 1, 0).reshape(8, -1)
            wanted += w @ w.T / np.square(w).sum()
        np.testing.assert_allclose(metric(made, layers[k]), floored(wanted), atol=1e-9)
    first, second = (metric(made, layers[k]) for k in writers[:2])
    assert not np.allclose(first, second)


def test_units_in_several_places() -> None:
    """Flattened maps: each unit owns a run of rows, and errors at all of its positions come together as their sum."""
    net = Net("flat")
    h = net.relu(net.conv(net.image(2, 4), 2, 5))
    net.output(net.gemm(net.op("Flatten", h), 5 * 16, 3), ["N", 3])
    made = program(net)
    names = [x.reader.weight for x in layers_of(made)]
    w = array_of(made, names[1]).astype(np.float64).reshape(3, 5, 16).sum(axis=2).T
    whole = np.square(array_of(made, names[1]).astype(np.float64)).sum()
    np.testing.assert_allclose(metric(made, writer(made, names[0])), floored(w @ w.T / whole), atol=1e-9)


def test_same_scale_for_every_reader() -> None:
    """A reader with tiny weights (behind a normalization, say) counts as much as one with large ones."""
    made = program(residual())
    layers = layers_of(made)
    writer_ = layers[0]
    tiny = next(x for x in layers[1:] if array_of(made, x.reader.weight).shape[:2] == (16, 8))
    scaled = made.refit({tiny.reader.weight: 1e-3 * array_of(made, tiny.reader.weight)})
    np.testing.assert_allclose(metric(scaled, writer_), metric(made, writer_), rtol=1e-5, atol=1e-9)


def test_nothing_behind() -> None:
    made = program(mlp())
    assert DownstreamMetric(made, layers_of(made)).root(writer(made, "w_9")) is None  # what it gives are outputs
    silent = made.refit({"w_5": np.zeros((10, 12), np.float32)})
    assert DownstreamMetric(silent, layers_of(silent)).root(writer(silent, "w_1")) is None


def test_directions_that_nothing_reads_still_count() -> None:
    made = program(mlp())
    w = array_of(made, "w_9")
    found = metric(made, writer(made, "w_5"))
    assert np.linalg.matrix_rank(w) == 3
    values_ = np.linalg.eigvalsh(found)
    assert values_[0] == pytest.approx(module._FLOOR * np.trace(found) / (1 + module._FLOOR) / 10, rel=1e-6)
    assert values_[0] < 1e-2 * values_[-1]


# ---------------------------------------------------------------- choosing units
def deaf(listened: float) -> tuple[Program, dict[str, Array]]:
    """16 hidden units; of the 8 outputs behind them 4 are read further on, the others times ``listened``.

    The 8 units that feed what is hardly read are the ones that move most.
    """
    net = Net("deaf")
    rng = np.random.default_rng(0)
    first = net.relu(net.op("Gemm", net.input("x", ["N", 12]), net.const(rng.standard_normal((16, 12))), transB=1))
    middle = 0.05 * rng.standard_normal((8, 16))
    middle[:4, :8] += rng.standard_normal((4, 8))
    middle[4:, 8:] += 3 * rng.standard_normal((4, 8))
    second = net.relu(net.op("Gemm", first, net.const(middle), net.const(np.full(8, 3.0)), transB=1))
    last = rng.standard_normal((5, 8))
    last[:, 4:] *= listened
    net.output(net.op("Gemm", second, net.const(last), transB=1), ["N", 5])
    return program(net), rows(600, 12)


def error_of_chosen(listened: float, monkeypatch: pytest.MonkeyPatch, *, metric_used: bool) -> tuple[float, Array]:
    """Relative error of the next product's outputs when half of the units go and their reader is refitted."""
    made, data = deaf(listened)
    if not metric_used:
        monkeypatch.setattr(DownstreamMetric, "root", lambda self, layer: None)
    wanted = wanted_spaces(made, "test", (), (), True)
    candidates, _ = find_candidates(made, wanted, 8, 1, 1)
    chosen = [c for c in candidates if made.spaces[c.spaces[0]].size == 16]
    grams = gather(made, chosen, data, size=64, limit=None, count=600, seed=0, limits=Limits())
    choose_units(made, chosen, grams, 1e-6)
    monkeypatch.undo()
    keep = chosen[0].kept[0][0]
    nodes = list(made.model.graph)
    hidden, y = values(made, data, nodes[1].outputs[0].name or "", nodes[2].outputs[0].name or "")
    design = np.concatenate([hidden[:, keep], np.ones((600, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design, y, rcond=None)
    names = [v.name or "" for v in nodes[4].inputs if v is not None]
    last = array_of(made, names[1]).astype(np.float64).T
    before, after = (np.maximum(a, 0.0) @ last for a in (y, design @ fit))
    return float(np.square(before - after).sum() / np.square(before - before.mean(axis=0)).sum()), keep


def test_units_are_chosen_for_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, loud = error_of_chosen(0.02, monkeypatch, metric_used=False)
    better, read = error_of_chosen(0.02, monkeypatch, metric_used=True)
    assert (loud >= 8).sum() >= 6 and (read < 8).sum() >= 6
    assert better < 0.5 * plain


def test_control_where_everything_is_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the units that move most are the right ones, with the metric and without."""
    plain, without = error_of_chosen(1.0, monkeypatch, metric_used=False)
    same, with_ = error_of_chosen(1.0, monkeypatch, metric_used=True)
    assert (without >= 8).sum() >= 6 and (with_ >= 8).sum() >= 6
    assert same < 1.2 * plain
