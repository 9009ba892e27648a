"""Statistics of batch normalizations follow what they normalize: a depthwise convolution behind a refitted one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import array_of, images, program, values
from tests.zoo.net import Net

from cipm_ir.passes.pruning.refit import compensation
from cipm_ir.passes.pruning.refit.batchnorm_recalibration import norms_of, re_estimated
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.passes.pruning.refit.layers import layers_of
from cipm_ir.runtime.activations.cache import ActivationCache
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
WIDTH, SMALL = 12, 8


def separable(shared: bool = False) -> Net:
    """Conv, BN, relu, conv, BN, relu, depthwise conv, BN, relu, classifier: as torch writes it, nothing folded."""
    net = Net("separable")

    def norm(h: str, channels: int, statistics: list[str] | None = None) -> str:
        scale, bias = net.positive((channels,)), net.bias(channels)
        mean, variance = statistics or [net.bias(channels, "mean"), net.positive((channels,), "var")]
        return net.op("BatchNormalization", h, scale, bias, mean, variance)

    h = net.relu(norm(net.conv(net.image(3, 6), 3, WIDTH, bias=False), WIDTH))
    h = net.relu(norm(net.conv(h, WIDTH, SMALL, 1, bias=False), SMALL))
    statistics = [net.bias(SMALL, "mean"), net.positive((SMALL,), "var")]
    h = net.relu(norm(net.conv(h, SMALL, SMALL, group=SMALL, bias=False), SMALL, statistics))
    if shared:
        h = net.relu(norm(net.conv(h, SMALL, SMALL, group=SMALL, bias=False), SMALL, statistics))
    net.classify(h, SMALL)
    return net


def depthwise_norm(made: Program) -> tuple[str, str, str]:
    """Input, mean and variance of the batch normalization behind the (first) depthwise convolution."""
    node = [n for n in made.model.graph if n.op_type == "BatchNormalization"][2]
    names = [v.name or "" for v in node.inputs if v is not None]
    return names[0], names[3], names[4]


def statistics(made: Program, data: dict[str, Array], name: str) -> tuple[Array, Array]:
    x = values(made, data, name)[0]
    return x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))


def calibrated(data: dict[str, Array]) -> Program:
    """The network with the statistics of the data in every batch normalization, as training leaves them."""
    made = program(separable())
    for node in list(made.model.graph):
        if node.op_type == "BatchNormalization":
            source, _, _, mean, variance = (v.name or "" for v in node.inputs if v is not None)
            found = statistics(made, data, source)
            made = made.refit({mean: found[0], variance: found[1]})
    return made


def pruned(made: Program, data: dict[str, Array], keep: int = 9) -> Program:
    stays = made.kept_classes({made.spaces[0]: np.arange(keep)})
    return Compensation(data, damping=1e-6).run(made, stays).program


# ---------------------------------------------------------------- which ones
def test_only_norms_that_no_refitted_product_feeds() -> None:
    """Behind the other convolutions least squares finds the best mean and variance by itself."""
    made = program(separable())
    found = norms_of(made, layers_of(made))
    assert [(n.source, n.mean, n.variance) for n in found] == [depthwise_norm(made)]
    assert found[0].epsilon == pytest.approx(1e-5)
    assert len(norms_of(made, [])) == 3  # the control: with no product refitted all three would follow


def test_shared_statistics_are_left_alone() -> None:
    made, data = program(separable(shared=True)), images(40)
    assert norms_of(made, layers_of(made)) == []
    after = pruned(made, data)
    for name in depthwise_norm(made)[1:]:
        np.testing.assert_array_equal(array_of(after, name), array_of(made, name))


def test_statistics_of_the_batch_are_no_parameters() -> None:
    made = program(separable())
    node = [n for n in made.model.graph if n.op_type == "BatchNormalization"][2]
    node.attributes.add(ir.AttrInt64("training_mode", 1))
    assert norms_of(made, layers_of(made)) == []


# ---------------------------------------------------------------- how far
def test_they_follow_the_shift() -> None:
    """The mean goes as far as on the data, the variance by the same factor, epsilon included."""
    data = images(80)
    made = calibrated(data)
    after = pruned(made, data)
    source, mean, variance = depthwise_norm(made)
    (m0, v0), (m1, v1) = statistics(made, data, source), statistics(after, data, source)
    assert np.abs(m1 - m0).max() > 1e-3
    np.testing.assert_allclose(array_of(after, mean) - array_of(made, mean), m1 - m0, atol=1e-4)
    ratio = (array_of(after, variance) + 1e-5) / (array_of(made, variance) + 1e-5)
    np.testing.assert_allclose(ratio, np.clip((v1 + 1e-5) / (v0 + 1e-5), 0.25, 4.0), rtol=1e-3)


def test_normalized_values_keep_their_mean_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the norm mean and variance are the dense model's; without the pass (control) they are not."""
    data = images(80)
    made = calibrated(data)
    behind = [n for n in made.model.graph if n.op_type == "BatchNormalization"][2].outputs[0].name or ""
    dense, after = statistics(made, data, behind), statistics(pruned(made, data), data, behind)
    np.testing.assert_allclose(after[0], dense[0], atol=1e-3)
    np.testing.assert_allclose(after[1], dense[1], rtol=5e-3)
    monkeypatch.setattr(compensation, "norms_of", lambda made, layers: [])
    control = statistics(pruned(made, data), data, behind)
    assert np.abs(control[0] - dense[0]).max() > 10 * np.abs(after[0] - dense[0]).max()
    assert np.abs(control[1] / dense[1] - 1).max() > 0.05


def test_a_change_that_is_known() -> None:
    """A depthwise input that is scaled and shifted exactly: the statistics are the exact ones."""
    data = images(40)
    made = calibrated(data)
    source, mean, variance = depthwise_norm(made)
    node = next(n for n in made.model.graph if n.outputs[0].name == source)
    weight = next(v.name or "" for v in list(node.inputs)[1:] if v is not None)
    moved = made.refit({weight: 1.5 * array_of(made, weight)})
    norm = norms_of(made, layers_of(made))[0]
    with ActivationCache(made.model, data) as dense, ActivationCache(moved.model, data) as now:
        dense.advance(made.model, norm.node)
        now.advance(moved.model, norm.node)
        found = re_estimated(made, norm, now, dense)
        again = re_estimated(made, norm, dense, dense)
    m, v = statistics(made, data, source)
    np.testing.assert_allclose(found[mean], array_of(made, mean) + 0.5 * m, atol=1e-4)
    wanted = (array_of(made, variance) + 1e-5) * (2.25 * v + 1e-5) / (v + 1e-5) - 1e-5
    np.testing.assert_allclose(found[variance], wanted, rtol=1e-4)
    np.testing.assert_allclose(again[mean], array_of(made, mean), atol=1e-7)
    np.testing.assert_allclose(again[variance], array_of(made, variance), rtol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 100.0])
def test_variances_change_by_a_bounded_factor(factor: float) -> None:
    """A channel that died, or exploded, on the data: its variance stays positive and finite."""
    data = images(40)
    made = calibrated(data)
    source, _, variance = depthwise_norm(made)
    node = next(n for n in made.model.graph if n.outputs[0].name == source)
    weight = next(v.name or "" for v in list(node.inputs)[1:] if v is not None)
    moved = made.refit({weight: factor * array_of(made, weight)})
    norm = norms_of(made, layers_of(made))[0]
    with ActivationCache(made.model, data) as dense, ActivationCache(moved.model, data) as now:
        dense.advance(made.model, norm.node)
        now.advance(moved.model, norm.node)
        found = re_estimated(made, norm, now, dense)
    bound = 0.25 if factor == 0 else 4.0
    np.testing.assert_allclose(found[variance], bound * array_of(made, variance), rtol=1e-3)


# ---------------------------------------------------------------- where nothing changed
def test_nothing_changes_where_nothing_changed() -> None:
    made, data = program(separable()), images(20)
    after = Compensation(data).run(made, made.kept_classes({})).program
    assert all(
        array_of(after, name).tobytes() == array_of(made, name).tobytes() for name in made.model.graph.initializers
    )


def test_norms_before_the_first_change_stay() -> None:
    """Two depthwise stages, the second of which loses units: the first one's statistics are not touched."""
    net = Net("two_stages")
    h = net.relu(net.conv(net.image(3, 6), 3, 6, bias=False))
    h = net.relu(net.batch_norm(net.conv(h, 6, 6, group=6, bias=False), 6))
    h = net.relu(net.conv(h, 6, WIDTH, 1))
    h = net.relu(net.conv(h, WIDTH, SMALL, 1))
    h = net.relu(net.batch_norm(net.conv(h, SMALL, SMALL, group=SMALL, bias=False), SMALL))
    net.classify(h, SMALL)
    made, data = program(net), images(40)
    norms = norms_of(made, layers_of(made))
    assert len(norms) == 2
    space = next(k for k, s in enumerate(made.spaces) if s.size == WIDTH)
    stays = made.kept_classes({made.spaces[space]: np.arange(4)})
    after = Compensation(data).run(made, stays).program
    for name in (norms[0].mean, norms[0].variance):
        assert array_of(after, name).tobytes() == array_of(made, name).tobytes()
    assert np.abs(array_of(after, norms[1].mean) - array_of(made, norms[1].mean)).max() > 1e-4
