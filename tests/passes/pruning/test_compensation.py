"""Least-squares compensation: against numpy, with drift and Relu, for every kind of bias, and what must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.models.compress_nets import (
    array_of,
    furthest,
    gap,
    images,
    names_in,
    program,
    residual,
    rows,
    two_convs,
    values,
)
from tests.zoo.net import Net

from cipm_ir.passes.pruning.limits import Limits
from cipm_ir.passes.pruning.refit import compensation
from cipm_ir.passes.pruning.refit import layers as refit_layers
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.passes.pruning.refit.layers import Layer, layers_of
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
Keep = dict[int, list[int]]


def compensated(made: Program, keep: Keep, data: dict[str, Array], **options: Any) -> Program:
    """The program, at full shapes, in which these spaces keep only some elements."""
    return Compensation(data, **{"damping": 1e-9, **options}).run(made, stays_of(made, keep)).program


def stays_of(made: Program, keep: Keep) -> NDArray[np.bool_]:
    return made.kept_classes({made.spaces[k]: np.asarray(kept) for k, kept in keep.items()})


def restricted(full: Program, made: Program, keep: Keep) -> Program:
    return full.restrict({full.space(made.spaces[k].name): np.asarray(kept) for k, kept in keep.items()})


def only_emptied(made: Program, keep: Keep) -> Program:
    """The same without refitting: what deletion does."""
    stays = stays_of(made, keep)
    weights: dict[str, Array] = {}
    for layer in layers_of(made):
        weights.update(compensation.zero_input_rows(made, layer, refit_layers.gone_places(made, layer.reader, stays)))
    return made.refit(weights)


def stripped(monkeypatch: pytest.MonkeyPatch, change: Callable[[Layer], Layer]) -> None:
    """All layers changed: to see what one feature is worth."""
    plain = refit_layers.layers_of
    monkeypatch.setattr(compensation, "layers_of", lambda made: [change(layer) for layer in plain(made)])


# ---------------------------------------------------------------- against numpy
def unfolded(u: Array) -> Array:
    """Patches of 3 by 3 with one zero around, written out: (N, H, W, C * 9)."""
    padded = np.pad(u, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.moveaxis(windows, 1, 3).reshape(*windows.shape[:1], *windows.shape[2:4], -1)


def test_least_squares_with_exact_borders() -> None:
    made, data, kept = program(two_convs()), images(60), [1, 2, 5, 8]
    node = list(made.model.graph)[2]
    hidden, y = values(made, data, names_in(node)[0], node.outputs[0].name or "")
    x = unfolded(hidden[:, kept]).reshape(-1, 36)
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    target = np.moveaxis(y, 1, -1).reshape(-1, 4)
    wanted, left, *_ = np.linalg.lstsq(design, target, rcond=None)
    _, weight, bias = names_in(node)
    after = compensated(made, {0: kept}, data)
    found = array_of(after, weight)
    np.testing.assert_allclose(found[:, kept].reshape(4, -1).T, wanted[:-1], atol=2e-4)
    np.testing.assert_allclose(array_of(after, bias), wanted[-1], atol=2e-4)
    assert not np.delete(found, kept, axis=1).any()
    error = np.square(values(after, data)[0] - y).mean() * y.size
    assert error == pytest.approx(left.sum(), rel=1e-4)
    assert error < 0.6 * np.square(values(only_emptied(made, {0: kept}), data)[0] - y).sum()


def test_control_borders_left_out_do_worse() -> None:
    """Weights fitted to the inner positions alone are no least squares of the whole map: the oracle sees borders."""
    made, data, kept = program(two_convs()), images(60), [1, 2, 5, 8]
    node = list(made.model.graph)[2]
    hidden, y = values(made, data, names_in(node)[0], node.outputs[0].name or "")
    x = unfolded(hidden[:, kept])
    design = np.concatenate([x, np.ones((*x.shape[:3], 1))], axis=-1)
    target = np.moveaxis(y, 1, -1)
    inner, *_ = np.linalg.lstsq(design[:, 1:-1, 1:-1].reshape(-1, 37), target[:, 1:-1, 1:-1].reshape(-1, 4), rcond=None)
    ours = np.square(values(compensated(made, {0: kept}, data), data)[0] - y).sum()
    assert np.square(design @ inner - target).sum() > 1.02 * ours


def test_sequence_of_gemms_fits_what_comes_in() -> None:
    """The second product sees the inputs of the pruned network, and is fitted to the dense one's outputs."""
    net = Net("two_gemms")
    first = net.relu(net.gemm(net.input("x", ["N", 6]), 6, 16))
    second = net.op("Tanh", net.gemm(first, 16, 12))
    net.output(net.gemm(second, 12, 3), ["N", 3])
    made, data, keep = program(net), rows(400), {0: list(range(7)), 1: list(range(0, 12, 2))}
    after = compensated(made, keep, data)
    source = list(made.model.graph)[3].outputs[0].name or ""
    x, y = values(after, data, source)[0][:, keep[1]], values(made, data)[0]
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    wanted, *_ = np.linalg.lstsq(design, y, rcond=None)
    np.testing.assert_allclose(values(after, data)[0], design @ wanted, atol=1e-4)
    assert gap(y, values(after, data)[0]) < 0.5 * gap(y, values(only_emptied(made, keep), data)[0])


# ---------------------------------------------------------------- drift and Relu
def stream_errors(made: Program, after: Program, data: dict[str, Array]) -> list[float]:
    """Of the stream behind each block."""
    names = [n.outputs[0].name or "" for n in made.model.graph if n.op_type == "Add"]
    pairs = zip(values(made, data, *names), values(after, data, *names), strict=True)
    return [gap(a, b) for a, b in pairs]


def test_the_next_writer_takes_up_the_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    made, data = program(residual()), images(80)
    keep = {next(k for k, s in enumerate(made.spaces) if s.size == 16): [0, 3, 5, 8, 11]}
    assert [layer.way.shortcut is not None for layer in layers_of(made)].count(True) == 3
    with_drift = stream_errors(made, compensated(made, keep, data), data)
    stripped(monkeypatch, lambda layer: replace(layer, way=replace(layer.way, shortcut=None)))
    without = stream_errors(made, compensated(made, keep, data), data)
    assert with_drift[0] == pytest.approx(without[0], rel=1e-6)  # nothing has drifted there yet
    assert with_drift[1] < 0.95 * without[1] and with_drift[2] < 0.9 * without[2]


def test_what_the_relu_shuts_off_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the Relu the error is lower, before it higher, than without regard to it."""
    net = Net("shut")
    hidden = net.relu(net.conv(net.image(3, 6), 3, 12))
    y = net.op("Conv", hidden, net.weight((6, 12, 3, 3), 108), net.const(np.full(6, 0.3)), pads=[1] * 4)
    after_relu = net.relu(y)
    net.output(net.conv(after_relu, 6, 2), ["N", 2, 6, 6])
    made, data, keep = program(net), images(80), {0: [0, 2, 3, 5, 7]}
    before, behind = values(made, data, y, after_relu)
    assert 0.3 < (behind > 0).mean() < 0.9
    aware = values(compensated(made, keep, data), data, y, after_relu)
    stripped(monkeypatch, lambda layer: replace(layer, way=replace(layer.way, rectified=None)))
    plain = values(compensated(made, keep, data), data, y, after_relu)
    assert gap(behind, aware[1]) < 0.97 * gap(behind, plain[1])
    assert gap(before, aware[0]) > gap(before, plain[0])


def test_branches_of_one_value_are_fitted_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products of one value that are added: the second takes up what the first leaves over, not its old drift."""
    net = Net("branches")
    wide = net.conv(net.relu(net.conv(net.image(3, 6), 3, 16)), 16, 6)
    total = net.op("Add", net.conv(wide, 6, 8, 3), net.conv(wide, 6, 8, 1))
    net.output(net.conv(net.relu(total), 8, 3), ["N", 3, 6, 6])
    made, data, keep = program(net), images(100), {0: [1, 4, 6, 9, 12, 15]}
    layers = layers_of(made)
    assert [len(g) for g in refit_layers.grouped(made, layers)] == [1, 1, 1, 1, 1]
    dense = values(made, data, total)[0]
    good = gap(dense, values(compensated(made, keep, data), data, total)[0])
    alone = [layers[:1], layers[1:2], layers[2:4], layers[4:]]
    monkeypatch.setattr(compensation, "grouped", lambda _program, found: alone[-len(found) + 1 :])
    assert good < gap(dense, values(compensated(made, keep, data), data, total)[0])


def test_a_wider_sum_is_no_target() -> None:
    """A pooled product is broadcast onto a map and rectified: fitted for itself."""
    net = Net("excite")
    hidden = net.relu(net.conv(net.image(3, 6), 3, 10))
    wide = net.conv(hidden, 10, 8)
    gate = net.conv(net.op("GlobalAveragePool", hidden), 10, 8, 1)
    net.output(net.conv(net.relu(net.op("Add", wide, gate)), 8, 3), ["N", 3, 6, 6])
    made, data, keep = program(net), images(80), {0: [0, 1, 4, 6, 8]}
    y = values(made, data)[0]
    after = compensated(made, keep, data)
    assert gap(y, values(after, data)[0]) < 0.7 * gap(y, values(only_emptied(made, keep), data)[0])


# ---------------------------------------------------------------- biases
def head(kind: str) -> tuple[Net, str]:
    """Conv or MatMul of ten hidden units with a bias of some kind; and the name of what it gives."""
    net = Net(f"bias {kind}")
    if kind.startswith("conv"):
        h = net.relu(net.conv(net.image(3, 6), 3, 10))
        y = net.conv(h, 10, 6, bias=kind in ("conv", "conv-norm"))
        if kind == "conv-add":
            y = net.op("Add", y, net.const(net.normal((6, 1, 1), 0.3)))
        elif kind in ("conv-norm", "conv-norm-alone"):
            y = net.batch_norm(y, 6)
        elif kind == "conv-norm-add":  # its mean is shared with its bias; behind it a bias of its own
            zero = net.const(np.zeros(6))
            y = net.op("BatchNormalization", y, net.positive((6,)), zero, zero, net.positive((6,)))
            y = net.op("Add", net.const(net.normal((1, 6, 1, 1), 0.3)), y)
        shape: list[int | str] = ["N", 6, 6, 6]
    else:
        h = net.relu(net.linear(net.input("x", ["N", 5, 6]), 6, 10))
        y = net.op("MatMul", h, net.weight((10, 6), 10))
        y = net.op("Add", *(y, net.bias(6))[:: 1 if kind == "matmul" else -1])
        shape = ["N", 5, 6]
    net.output(y, shape)
    return net, y


def data_of(made: Program, count: int = 80) -> dict[str, Array]:
    shape = made.model.graph.inputs[0].shape
    assert shape is not None
    size = [int(str(d)) for d in list(shape)[1:]]
    return {"x": np.random.default_rng(0).standard_normal((count, *size)).astype(np.float32)}


@pytest.mark.parametrize(
    "kind", ["conv", "conv-add", "conv-norm", "conv-norm-alone", "conv-norm-add", "matmul", "matmul-left"]
)
def test_every_kind_of_bias_takes_up_the_mean(kind: str) -> None:
    net, y = head(kind)
    made = program(net)
    data = data_of(made)
    layer = layers_of(made)[-1]
    assert layer.bias is not None
    keep = {0: [0, 3, 4, 7]}
    dense, after, empty = (
        values(p, data, y)[0] for p in (made, compensated(made, keep, data), only_emptied(made, keep))
    )
    axes = tuple(a for a in range(dense.ndim) if a != (1 if kind.startswith("conv") else dense.ndim - 1))
    drift, before = (np.abs((other - dense).mean(axis=axes)).max() for other in (after, empty))
    assert drift < 1e-4 < 1e-2 < before
    assert gap(dense, after) < 0.7 * gap(dense, empty)


def test_control_without_a_bias_the_mean_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = head("conv")
    made = program(net)
    data = data_of(made)
    stripped(monkeypatch, lambda layer: replace(layer, bias=None))
    dense, after = (values(p, data, y)[0] for p in (made, compensated(made, {0: [0, 3, 4, 7]}, data)))
    assert np.abs((after - dense).mean(axis=(0, 2, 3))).max() > 1e-3
    assert gap(dense, after) < 1.0


def test_a_table_over_places_is_no_bias() -> None:
    """(W,) behind a Conv of W channels runs along the width: it must stay as it is."""
    net = Net("ramp")
    hidden = net.relu(net.conv(net.image(3, 6), 3, 10))
    ramp = net.const(np.arange(6.0))
    net.output(net.op("Add", net.conv(hidden, 10, 6, bias=False), ramp), ["N", 6, 6, 6])
    made, data = program(net), images(60)
    assert layers_of(made)[-1].bias is None
    after = compensated(made, {0: [0, 3, 4, 7]}, data)
    np.testing.assert_array_equal(array_of(after, ramp), np.arange(6.0))


def test_a_shared_bias_stays() -> None:
    model = zoo.build("shared_zero_bias")
    made = Program.of(ir.from_proto(model))
    data = zoo.feeds("shared_zero_bias", model, 0, {"N": 100})
    shared = [n for n, v in made.model.graph.initializers.items() if len(v.uses()) > 1]
    biases = [layer.bias.name for layer in layers_of(made) if layer.bias is not None]
    assert len(shared) == 1 and not set(shared) & set(biases)
    keep = {0: list(range(made.spaces[0].size // 2))}
    after = compensated(made, keep, data)
    np.testing.assert_array_equal(array_of(after, shared[0]), array_of(made, shared[0]))
    assert furthest(values(after, data), values(restricted(after, made, keep), data)) < 1e-5


# ---------------------------------------------------------------- what must not change
def test_zeros_and_absence_are_the_same() -> None:
    made, data = program(residual()), images(60)
    keep = {k: [0, 3, 5] for k in range(len(made.spaces))}
    after = compensated(made, keep, data)
    small = restricted(after, made, keep)
    assert small.parameters < 0.3 * made.parameters
    assert furthest(values(after, data), values(small, data)) < 1e-5
    # the control: the readers of one space still read it
    dead = only_emptied(made, {k: v for k, v in keep.items() if k != 1})
    assert furthest(values(dead, data), values(restricted(dead, made, keep), data)) > 1e-3


def test_tied_weights_are_left_alone() -> None:
    model = zoo.build("siamese")
    made = Program.of(ir.from_proto(model))
    data = zoo.feeds("siamese", model, 0, {"N": 60})
    tied = {n for n, v in made.model.graph.initializers.items() if len(v.uses()) > 1}
    assert tied and not tied & {layer.reader.weight for layer in layers_of(made)}
    after = compensated(made, {0: [0, 2, 3]}, data)
    for name in tied:
        np.testing.assert_array_equal(array_of(after, name), array_of(made, name))


def test_nothing_to_do_gives_the_same_program() -> None:
    made = program(residual())
    result = Compensation(images(8)).run(made, np.ones(made.analysis.classes.count, bool))
    assert result.program is made and not result.sums


def test_products_before_the_change_stay() -> None:
    made, data = program(residual()), images(60)
    last = max(k for k, s in enumerate(made.spaces) if s.size == 16)
    after = compensated(made, {last: [0, 1, 2]}, data)
    changed = {n for n in made.model.graph.initializers if (array_of(after, n) != array_of(made, n)).any()}
    order = [layer.reader.weight for layer in layers_of(made)]
    assert changed & set(order) == set(order[-2:])


def test_too_large_products_only_lose_their_inputs() -> None:
    made, data, keep = program(two_convs()), images(30), {0: [1, 2, 5]}
    result = Compensation(data, limits=Limits(memory=80 * 50**2)).run(made, stays_of(made, keep))
    weight = layers_of(made)[-1].reader.weight
    assert result.notes == [f"{weight} is too large to refit; allow more with memory="]
    np.testing.assert_array_equal(array_of(result.program, weight), array_of(only_emptied(made, keep), weight))
    assert furthest(values(result.program, data), values(restricted(result.program, made, keep), data)) < 1e-5


def test_damping_pulls_towards_the_old_weights() -> None:
    made, keep = program(two_convs()), {0: [1, 2, 5, 8]}
    weight = layers_of(made)[-1].reader.weight
    old = array_of(only_emptied(made, keep), weight)
    distances = [
        np.abs(array_of(compensated(made, keep, images(2), damping=d), weight) - old).max() for d in (1e-6, 1e-1, 1e6)
    ]
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-3


def test_same_seed_same_weights() -> None:
    """Where only some positions are looked at, the seed draws them."""
    made, data, keep = program(two_convs()), images(60), {0: [1, 2, 5, 8]}
    weight = layers_of(made)[-1].reader.weight
    one, same, other = (
        array_of(compensated(made, keep, data, seed=s, rows=100, limits=Limits(places=3)), weight) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-6


def test_where_a_product_goes() -> None:
    net = Net("ways")
    x = net.relu(net.conv(net.image(3, 6), 3, 8))
    first = net.conv(x, 8, 8, bias=False)
    total = net.op("Add", x, net.batch_norm(first, 8))
    shut = net.relu(total)
    open_ = net.conv(shut, 8, 8)
    net.output(net.op("Add", open_, shut), ["N", 8, 6, 6])
    made = program(net)
    one, two, three = layers_of(made)
    assert one.way.shortcut is None and one.way.rectified == next(iter(made.model.graph)).outputs[0].name
    norm = next(n for n in made.model.graph if n.op_type == "BatchNormalization")
    scale, variance = (array_of(made, names_in(norm)[k]) for k in (1, 4))
    np.testing.assert_allclose(two.way.factor, scale / np.sqrt(variance + 1e-5), rtol=1e-6)
    assert (two.way.shortcut, two.way.rectified) == (x, total)
    assert two.bias is not None and two.bias.name == names_in(norm)[3] and (two.bias.gain == -1).all()
    assert (three.way.shortcut, three.way.rectified) == (shut, None)
