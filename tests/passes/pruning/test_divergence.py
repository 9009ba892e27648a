"""How far outputs moved: which measure suits which output, and its numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from scipy.special import rel_entr, softmax
from tests.models.compress_nets import images, mlp, program, rows, two_convs
from tests.zoo.net import INT64, Net

from cipm_ir.errors import InputError
from cipm_ir.passes.pruning.compress.divergence import Divergence
from cipm_ir.runtime.session import run


def of(net: Net, feeds: dict[str, np.ndarray], asked: str = "auto") -> Divergence:
    model = ir.from_proto(net.model())
    return Divergence.of(model, run(model, feeds), asked)


def measures(net: Net, feeds: dict[str, np.ndarray], asked: str = "auto") -> list[str]:
    return list(of(net, feeds, asked).measures.values())


def test_kl_is_that_of_the_softmax(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 7, 5))
    found = Divergence({"y": "kl"})
    total = found.total([found.batch({"y": a[:3]}, {"y": b[:3]}), found.batch({"y": a[3:]}, {"y": b[3:]})])
    assert total == pytest.approx(rel_entr(softmax(a, axis=-1), softmax(b, axis=-1)).sum(axis=-1).mean())
    assert total > 1e-2
    assert found.total([found.batch({"y": a}, {"y": a})]) == 0.0
    assert found.total([found.batch({"y": a}, {"y": a + 3.0})]) == pytest.approx(0.0, abs=1e-12)


def test_error_is_relative(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 6, 4))
    found = Divergence({"y": "error"})
    halves = [found.batch({"y": a[k : k + 3]}, {"y": b[k : k + 3]}) for k in (0, 3)]
    assert found.total(halves) == pytest.approx(np.square(a - b).sum() / np.square(a).sum())
    assert found.total([found.batch({"y": 9 * a}, {"y": 9 * b})]) == pytest.approx(found.total(halves))
    assert found.total([found.batch({"y": a}, {"y": a + 3.0})]) > 1.0


def test_outputs_are_averaged_and_nan_is_infinite() -> None:
    found = Divergence({"p": "error", "q": "error"})
    a, b = {"p": np.ones((2, 2)), "q": np.ones(3)}, {"p": np.zeros((2, 2)), "q": np.ones(3)}
    assert found.total([found.batch(a, b)]) == pytest.approx(0.5)
    assert found.total([found.batch(a, {**b, "q": np.full(3, np.nan)})]) == float("inf")
    assert str(Divergence({"p": "kl", "q": "error"})) == "KL divergence in nats and relative squared error"


def test_logits_are_recognized() -> None:
    assert measures(mlp(), rows(4)) == ["kl"]
    assert measures(mlp(), rows(4), "error") == ["error"]
    net = Net("hidden")  # what a nonlinearity gives out is no distribution
    net.output(net.op("Tanh", net.gemm(net.input("x", ["N", 6]), 6, 4)), ["N", 4])
    assert measures(net, rows(4)) == ["error"] and measures(net, rows(4), "kl") == ["kl"]


def test_large_or_single_values_are_no_logits() -> None:
    assert measures(mlp(), {"x": 1e4 * rows(4)["x"]}) == ["error"]
    net = Net("single")
    net.output(net.gemm(net.input("x", ["N", 6]), 6, 1), ["N", 1])
    assert measures(net, rows(4)) == ["error"] == measures(net, rows(4), "kl")


def test_a_map_of_channels_has_no_classes_on_its_last_axis() -> None:
    """(N, C, H, W): a softmax over the width would compare places."""
    assert measures(two_convs(), images(4)) == ["error"]
    net = Net("pooled")
    net.output(net.op("Flatten", net.op("GlobalAveragePool", net.conv(net.image(), 3, 5))), ["N", 5])
    assert measures(net, images(4)) == ["kl"]


def test_integer_outputs_do_not_count() -> None:
    net = mlp()
    net.output(net.op("ArgMax", net.outputs[0].name, axis=1), ["N", 1], INT64)
    assert measures(net, rows(4)) == ["kl"]
    only = Net("argmax")
    y = only.op("ArgMax", only.gemm(only.input("x", ["N", 6]), 6, 4), axis=1)
    only.output(y, ["N", 1], INT64)
    with pytest.raises(InputError, match="no floating-point value"):
        of(only, rows(4))


def test_tokens_are_distributions_of_their_own() -> None:
    net = Net("tokens")
    net.output(net.linear(net.input("x", ["N", 5, 6]), 6, 4), ["N", 5, 4])
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 5, 6)).astype(np.float32)}
    found = of(net, feeds)
    made = run(program(net).model, feeds)
    name = next(iter(found.measures))
    assert found.measures[name] == "kl"
    assert found.batch(made, made)[0, 1] == 15
