"""Two products fitted together: what they read, the gradient, and whether it helps on inputs never seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import gap, images, mlp, program, residual, rows, two_convs, values
from tests.zoo.net import Net

from cipm_ir.passes.pruning.refit import linear_pairs as joint
from cipm_ir.passes.pruning.refit.compensation import Compensation
from cipm_ir.passes.pruning.refit.layers import layers_of
from cipm_ir.passes.pruning.refit.linear_pairs import Window, box, find_pairs, fit_together, reads, unfolded, whitening
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]


def duos_of(net: Net) -> dict[int, int]:
    made = program(net)
    return {key // 2: first.reader.node for key, first in find_pairs(made, layers_of(made)).items()}


# ---------------------------------------------------------------- which
def test_pairs_with_a_relu_between() -> None:
    assert duos_of(two_convs()) == {2: 0}
    assert len(duos_of(residual(3))) == 3
    assert len(duos_of(mlp())) == 2


@pytest.mark.parametrize("how", ["read twice", "given out", "another function"])
def test_control_other_readers_and_functions(how: str) -> None:
    net = Net("others")
    x = net.input("x", ["N", 6])
    before = net.gemm(x, 6, 8)
    h = net.op("Tanh", before) if how == "another function" else net.relu(before)
    y = net.gemm(h, 8, 8)
    if how == "given out":
        net.output(h, ["N", 8])
    net.output(net.op("Add", y, h) if how == "read twice" else y, ["N", 8])
    assert not duos_of(net)


# ---------------------------------------------------------------- what is read
@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "dilations"),
    [
        ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 1, 2, 0), (1, 2)),
        ((1, 1), (1, 1), (0,) * 4, (1, 1)),
    ],
)
@pytest.mark.parametrize("wanted", [1, 9, 1000])
def test_unfolded_windows_are_patches(kernel: Any, strides: Any, pads: Any, dilations: Any, wanted: int) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 3, 7, 6)).astype(np.float32)
    linear = LinearOpGeometry((4, 3, *kernel), 1, kernel, strides, pads, dilations)
    places = box(linear.grid(hidden), wanted, rng)
    positions, index = reads(linear, linear.grid(hidden), (7, 6), places)
    flat = hidden.reshape(2, 3, -1)[:, :, positions].transpose(0, 2, 1)
    window = Window(flat, index, np.zeros((0, 4)), None)
    taps = index.shape[1]
    found = unfolded(flat.reshape(-1, 3), window).reshape(-1, taps, 3).transpose(0, 2, 1).reshape(-1, 3 * taps)
    np.testing.assert_array_equal(found, linear.inputs(hidden, places))


def windows(rectified: bool, seed: int = 0, count: int = 3) -> list[Window]:
    """Six positions of five inputs, read at two places with three taps, one of them padding."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        target = rng.standard_normal((40, 3)).astype(np.float32)
        total = rng.standard_normal((40, 3)).astype(np.float32) if rectified else None
        x = rng.standard_normal((20, 6, 5)).astype(np.float32)
        made.append(Window(x, np.array([[0, 2, 6], [1, 5, 0]]), target, total))
    return made


@pytest.mark.parametrize("rectified", [False, True])
def test_slope_is_the_derivative(rectified: bool) -> None:
    rng = np.random.default_rng(1)
    turns = tuple((np.eye(n) + 0.1 * rng.standard_normal((n, n))).astype(np.float32) for n in (5, 12))
    factors = rng.uniform(0.5, 2, 4).astype(np.float32), rng.uniform(0.5, 2, 3).astype(np.float32)
    root = rng.standard_normal((3, 3)).astype(np.float32)
    fit = joint._Fit(factors, root, turns, ((5, 4), (12, 3)))  # type: ignore[arg-type]
    at = rng.standard_normal(5 * 4 + 4 + 12 * 3 + 3)
    some = windows(rectified)
    value, slope = fit.slope(at, some)
    assert value == pytest.approx(fit.loss(at, some), rel=1e-6)
    for way in rng.standard_normal((6, len(at))):
        step = 1e-3
        change = (fit.loss(at + step * way, some) - fit.loss(at - step * way, some)) / (2 * step)
        assert change == pytest.approx(float(slope @ way), rel=0.02, abs=0.02 * np.abs(slope).max())


def test_whitening() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6)) @ np.diag([3, 1, 1, 0.5, 0.3, 0.3])
    turn = whitening(root.T @ root)
    assert np.linalg.cond(turn.T @ root.T @ root @ turn) < 3 < 20 < np.linalg.cond(root.T @ root)


# ---------------------------------------------------------------- whether it helps
def planted(seed: int) -> list[Window]:
    """Targets that two units give exactly."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((5, 2)), rng.standard_normal((2, 3))
    x = rng.standard_normal((2000, 1, 5)).astype(np.float32)
    target = (np.maximum(x[:, 0] @ first, 0) @ second).astype(np.float32)
    return [Window(x, np.zeros((1, 1), np.int64), target, None)]


def test_what_can_be_fitted_is() -> None:
    some = planted(0)
    start = np.random.default_rng(9).standard_normal((5, 4))
    found = fit_together(some, start, np.zeros(4), (np.ones(4), np.ones(3)), None)
    assert found is not None and found[2] < 0.1


def test_control_noise_is_not_fitted() -> None:
    """Targets that have nothing to do with the inputs: on samples that were left out hardly anything is gained."""
    rng = np.random.default_rng(0)
    some = [Window(w.x, w.index, rng.standard_normal(w.target.shape).astype(np.float32), None) for w in planted(0)]
    found = fit_together(some, rng.standard_normal((5, 4)), np.zeros(4), (np.ones(4), np.ones(3)), None)
    assert found is None or found[2] > 0.97


def test_the_best_point_is_kept_and_the_search_ends() -> None:
    far = iter([5.0, 4.0, 3.0, 6.0, 6.0, 6.0, 6.0])
    fit: Any = SimpleNamespace(loss=lambda _at, _windows: next(far))
    search = joint._Search(fit, [], np.array([0.0]))
    with pytest.raises(StopIteration):
        for k in range(1, 8):
            search(SimpleNamespace(x=np.array([float(k)])))
    assert search.best == [2.0] and (search.first, search.least) == (5.0, 3.0)


def shrunken(made: Program, data: dict[str, Array], **options: Any) -> Program:
    """Half of the units of every inner space gone."""
    inner = [s for s in made.spaces if s.size == 16]
    stays = made.kept_classes({s: np.arange(0, s.size, 2) for s in inner})
    return Compensation(data, damping=1e-6, **options).run(made, stays).program


@pytest.mark.parametrize("net", ["residual", "mlp"])
def test_better_on_inputs_never_seen(net: str) -> None:
    made = program(residual(2, outputs=6) if net == "residual" else mlp(widths=(16, 16)))
    data, fresh = (images(600), images(200, seed=5)) if net == "residual" else (rows(4000), rows(500, seed=5))
    dense = values(made, fresh)[0]
    alone, both = (gap(values(shrunken(made, data, joint=j), fresh)[0], dense) for j in (False, True))
    assert both < 0.97 * alone


def test_same_seed_same_weights() -> None:
    made, data = program(residual(2)), images(300)
    one, same, plain = (values(shrunken(made, data, joint=j), data)[0] for j in (True, True, False))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - plain).max() > 1e-6


def test_few_samples_leave_it_to_least_squares() -> None:
    made, data = program(residual(2)), images(3)
    a, b = (values(shrunken(made, data, joint=j), data)[0] for j in (False, True))
    np.testing.assert_array_equal(a, b)
