"""The last product by the divergence of classes: against scipy, on rows it has not seen, and where it must not move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from tests.models.compress_nets import array_of, mlp, program, rows, values

from cipm_ir.passes.pruning.refit import refit_logits as logits
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.passes.pruning.refit.refit_logits import refit_logits

Array = NDArray[Any]


def planted(seed: int = 0, count: int = 800, sharp: float = 4.0) -> tuple[Array, Array, Array, Array]:
    """Inputs of which the last four are missing, logits of all of them, and what least squares makes of the rest."""
    rng = np.random.default_rng(seed)
    full = np.maximum(rng.standard_normal((count, 12)) @ rng.standard_normal((12, 12)), 0.0)
    target = sharp / 4 * (full @ rng.standard_normal((12, 5)) / 2 + rng.standard_normal(5))
    x = full[:, :8]
    design = np.concatenate([x, np.ones((count, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design, target, rcond=None)
    return x, target, fit[:-1], fit[-1]


def kl(x: Array, target: Array, weight: Array, bias: Array) -> float:
    """Mean divergence of the classes."""
    p = softmax(target, axis=1)
    return float((p * (np.log(p) - log_softmax(x @ weight + bias, axis=1))).sum(axis=1).mean())


# ---------------------------------------------------------------- against scipy
def test_the_optimum_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one tiny pull: the least divergence, as another method finds it without derivatives from here."""
    monkeypatch.setattr(logits, "STRENGTHS", (1e-9,))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2)) * [1.0, 3.0] + [2.0, -1.0]
    target = 2 * np.tanh(x @ rng.standard_normal((2, 3)) / 2) + rng.standard_normal(3)
    start, offset = np.zeros((2, 3)), np.zeros(3)

    def loss(flat: Array) -> float:
        return kl(x, target, flat[:6].reshape(2, 3), flat[6:])

    wanted = minimize(loss, np.zeros(9), method="BFGS", options={"gtol": 1e-9})
    found = kl(x, target, *refit_logits(x, target, start, offset, 0))
    assert found == pytest.approx(wanted.fun, rel=1e-4)
    assert found < 0.9 * kl(x, target, start, offset)
    inexact = np.concatenate([wanted.x[:6] * 0.9, wanted.x[6:]])  # the control: the oracle tells points apart
    assert loss(inexact) > 1.001 * wanted.fun


def test_the_pull_is_towards_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target, weight, bias = planted()
    moved = []
    for strength in (1e-4, 1e-2, 1.0):
        monkeypatch.setattr(logits, "STRENGTHS", (strength,))
        moved.append(float(np.abs(refit_logits(x, target, weight, bias, 0)[0] - weight).max()))
    assert moved[0] > moved[1] > moved[2] > 0


# ---------------------------------------------------------------- rows that were not seen
@pytest.mark.parametrize("seed", range(4))
def test_held_out_divergence_falls(seed: int) -> None:
    x, target, _, _ = planted(seed, 3000)
    inside, outside = slice(0, 800), slice(800, None)
    design = np.concatenate([x[inside], np.ones((800, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design, target[inside], rcond=None)
    before = kl(x[outside], target[outside], fit[:-1], fit[-1])
    after = kl(x[outside], target[outside], *refit_logits(x[inside], target[inside], fit[:-1], fit[-1], 0))
    assert after < 0.97 * before


def test_the_start_comes_back_where_nothing_is_better() -> None:
    """Logits that the start gives exactly cannot be improved: the very arrays come back."""
    x, _, weight, bias = planted()
    found, offset = refit_logits(x, x @ weight + bias, weight, bias, 0)
    assert found is weight and offset is bias


def test_noise_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, many inputs, targets of noise: held out nothing gains. Judged on its own rows (control) it would."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((60, 40)), np.zeros((40, 4))
    target = 3 * rng.standard_normal((60, 4))
    target -= target.mean(axis=0)
    bias = np.log(softmax(target, axis=1).mean(axis=0))  # the best constant
    monkeypatch.setattr(logits, "STRENGTHS", (1e-4, 1e-3))
    assert refit_logits(x, target, weight, bias, 0)[0] is weight
    fitted = logits._fit(x, softmax(target, axis=1), np.vstack([weight, bias]), 1e-4)
    assert kl(x, target, fitted[:-1], fitted[-1]) < 0.5 * kl(x, target, weight, bias)


@pytest.mark.parametrize("what", ["few rows", "too large"])
def test_limits(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, target, weight, bias = planted()
    assert refit_logits(x, target, weight, bias, 0)[0] is not weight  # the control
    if what == "too large":
        monkeypatch.setattr(logits, "LARGEST", x.size * 5 - 1)
    else:
        x, target = x[:19], target[:19]
    found, offset = refit_logits(x, target, weight, bias, 0)
    assert found is weight and offset is bias


# ---------------------------------------------------------------- inputs that do not vary, units of measurement
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_features_keep_their_weights(value: float) -> None:
    """Their rows stay as they are, and what they add is taken up by the bias: the rest is as without them."""
    x, target, weight, bias = planted()
    plain, shift = refit_logits(x, target, weight, bias, 0)
    wide = np.insert(x, [2, 8], value, axis=1)
    extra = np.array([[0.3, -0.2, 0.5, 0.1, 0.0], [1.0, 0.0, -1.0, 0.4, 0.2]])
    around = np.insert(weight, [2, 8], extra, axis=0)
    with np.errstate(all="raise"):
        found, offset = refit_logits(wide, target, around, bias - value * extra.sum(axis=0), 0)
    np.testing.assert_array_equal(found[[2, 9]], extra)
    np.testing.assert_allclose(np.delete(found, [2, 9], axis=0), plain, atol=1e-4)
    np.testing.assert_allclose(wide @ found + offset, x @ plain + shift, atol=1e-3)


def test_nothing_varies() -> None:
    """Only the bias can move, and gives the mean of the classes."""
    _, target, weight, bias = planted()
    still = np.full((len(target), 8), 2.0)
    found, offset = refit_logits(still, target, weight, bias, 0)
    np.testing.assert_array_equal(found, weight)
    assert kl(still, target, found, offset) <= kl(still, target, weight, bias)
    mean = softmax(target, axis=1).mean(axis=0)
    np.testing.assert_allclose(softmax(still[0] @ found + offset), mean, atol=5e-3)


def test_units_of_measurement_make_no_difference() -> None:
    x, target, weight, bias = planted()
    scale = np.geomspace(1e-3, 1e3, 8)
    plain, shift = refit_logits(x, target, weight, bias, 0)
    scaled, other = refit_logits(x * scale, target, weight / scale[:, None], bias, 0)
    np.testing.assert_allclose(scaled * scale[:, None], plain, atol=1e-4)
    np.testing.assert_allclose(other, shift, atol=1e-4)


def test_single_precision_rows() -> None:
    x, target, weight, bias = planted()
    plain = refit_logits(x, target, weight, bias, 0)
    single = refit_logits(x.astype(np.float32), target.astype(np.float32), weight, bias, 0)
    np.testing.assert_allclose(single[0], plain[0], atol=1e-3)


# ---------------------------------------------------------------- in a network
def test_compensation_sharpens_what_gives_logits() -> None:
    """The divergence on other rows falls against least squares alone, and what goes is not read."""
    made, data, fresh = program(mlp(widths=(12, 10))), rows(1500), rows(3000, seed=5)
    for name in ("w_9", "b_10"):
        made = made.refit({name: 3 * array_of(made, name)})
    keep = np.array([0, 3, 5, 8])
    stays = made.kept_classes({made.spaces[1]: keep})
    output = made.model.graph.outputs[0].name or ""
    plain = Compensation(data, damping=1e-6).run(made, stays).program
    sharp = Compensation(data, damping=1e-6, logits=frozenset([output])).run(made, stays).program
    dense = values(made, fresh)[0]

    def away(other: Any) -> float:
        p = softmax(dense, axis=1)
        return float((p * (np.log(p) - log_softmax(values(other, fresh)[0], axis=1))).sum(axis=1).mean())

    assert away(sharp) < 0.98 * away(plain)
    assert not np.delete(array_of(sharp, "w_9"), keep, axis=1).any()
    assert np.abs(array_of(sharp, "w_9")[:, keep] - array_of(plain, "w_9")[:, keep]).max() > 1e-3
