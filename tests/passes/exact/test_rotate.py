"""The pass `rotate`: outputs stay, outliers shrink, four bits cost less; what it leaves and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests import zoo
from tests.models.dense_models import BERT, LLAMA, Style, ids, planted, transformer
from tests.symmetry.test_dense_groups import stream_of
from tests.symmetry.test_soundness import largest_change, program_of

import cipm_ir
from cipm_ir.algebra import DenseElement
from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.passes import Kind, parse_passes, run_passes
from cipm_ir.passes.exact.expose.expose import Expose
from cipm_ir.passes.exact.rotate.metrics import spread
from cipm_ir.passes.exact.rotate.rotate import Rotate, dense_roles
from cipm_ir.passes.framework.witness import undo

STYLES = {"llama": replace(LLAMA, width=32), "bert": replace(BERT, width=32)}
parametrize = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def with_outliers(style: Style) -> onnx.ModelProto:
    model = transformer(style)
    planted(model, style.width)
    return model


@parametrize
@pytest.mark.parametrize(("method", "share"), [("hadamard", 0.6), ("random", 0.85)])
def test_outliers_shrink_and_outputs_stay(style: Style, method: str, share: float, tmp_path: Path) -> None:
    model = with_outliers(style)
    onnx.save(model, tmp_path / "model.onnx")
    written = tmp_path / "out.onnx"
    result = cipm_ir.optimize(str(tmp_path / "model.onnx"), passes=[Rotate(method=method)], output=str(written))
    step = result.report.steps[0]
    assert step.changed and step.kind == Kind.EXACT.value and step.verification
    assert step.verification.max_rel < 1e-5
    found = step.metrics
    for figure in ("largest_outlier", "outlier", "int4_error"):
        assert found[f"{figure}_after"] < share * found[f"{figure}_before"]
    after = zoo.run(onnx.load(written), ids())
    assert largest_change(zoo.run(model, ids()), after) < 1e-5
    assert "residual stream" in step.summary and "->" in step.summary
    assert len(step.figures) == 1


def test_which_spaces_move() -> None:
    program = program_of(transformer(LLAMA))
    roles = dense_roles(program)
    assert sorted(roles.values()) == ["heads"] * 4 + ["scores"] * 4 + ["stream"]
    for one, count in (
        (Rotate(), 5),
        (Rotate(stream=False), 4),
        (Rotate(heads=False), 1),
        (Rotate(scores=True), 9),
        (Rotate(stream=False, heads=False, scores=True), 4),
    ):
        result = run_passes(program, [one])
        assert result.report.steps[0].metrics["spaces"] == count
        assert len(result.witness[0].data) == count


def test_nothing_asked_for_changes_nothing() -> None:
    step = run_passes(program_of(transformer(LLAMA)), [Rotate(stream=False, heads=False)]).report.steps[0]
    assert not step.changed


def test_the_same_seed_draws_the_same_matrices() -> None:
    program = program_of(transformer(LLAMA))
    one, two, other = (run_passes(program, ["rotate"], seed=seed).witness[0].data for seed in (0, 0, 1))
    name = stream_of(program).name
    assert np.array_equal(one[name]["matrix"], two[name]["matrix"])
    assert not np.array_equal(one[name]["matrix"], other[name]["matrix"])


def test_given_matrices_are_used() -> None:
    program = program_of(transformer(LLAMA))
    stream = stream_of(program)
    matrix = DenseElement.orthogonal(stream.size, np.random.default_rng(5)).matrix
    one = Rotate(heads=False, matrix={stream.name: matrix})
    outcome = run_passes(program, [one])
    assert np.array_equal(outcome.witness[0].data[stream.name]["matrix"], matrix)
    table = next(value for name, value in program.model.graph.initializers.items() if name.startswith("table"))
    turned = outcome.program.model.graph.initializers[table.name or ""]
    assert table.const_value is not None and turned.const_value is not None
    np.testing.assert_allclose(turned.const_value.numpy(), table.const_value.numpy() @ matrix.T, atol=1e-6)
    assert "matrices" in str(one)


def test_given_matrices_that_do_not_fit_are_refused() -> None:
    program = program_of(transformer(LLAMA))
    stream = stream_of(program)
    hidden = next(space for space in program.spaces if space.size == LLAMA.hidden)
    rng = np.random.default_rng(0)
    for name, matrix, said in (
        ("nowhere", np.eye(2), "no space named"),
        (stream.name, np.eye(3), "does not act"),
        (stream.name, DenseElement.invertible(stream.size, rng).matrix, "it admits O"),
        (hidden.name, np.eye(hidden.size), "no dense matrices"),
        (stream.name, np.zeros((stream.size, stream.size)), "condition number"),
    ):
        with pytest.raises(SymmetryError, match=said):
            run_passes(program, [Rotate(matrix={name: matrix})])
    for text in ("rotate{matrix=a}", "rotate{method=fourier}"):
        with pytest.raises(OptionError, match="takes"):
            parse_passes(text)


def test_text_form() -> None:
    assert str(Rotate()) == "rotate"
    text = "rotate{heads=false, method=random}"
    assert [str(one) for one in parse_passes(text)] == [text]


@parametrize
def test_undo(style: Style) -> None:
    model = transformer(replace(style, dtype="float64"))
    program = program_of(model)
    outcome = run_passes(program, [Rotate(scores=True)])
    back = undo(outcome.program, outcome.witness[0].elements)
    for name, value in program.model.graph.initializers.items():
        again = back.model.graph.initializers[name].const_value
        assert value.const_value is not None and again is not None
        np.testing.assert_allclose(again.numpy(), value.const_value.numpy(), atol=1e-12)


# ---------------------------------------------------------------- what stays, and why
def test_gammas_that_differ_are_named() -> None:
    step = run_passes(program_of(transformer(replace(LLAMA, gamma="random"))), ["rotate"]).report.steps[0]
    assert step.metrics["spaces"] == 4
    assert "5 normalizations scale their units unlike (gamma" in step.summary
    assert "run expose right before" in step.summary


def test_layer_normalizations_are_named() -> None:
    step = run_passes(program_of(zoo.build_or_skip("vit")), [Rotate(heads=False)]).report.steps[0]
    assert not step.changed and "LayerNormalizations subtract a mean; run expose right before" in step.summary


@pytest.mark.parametrize("name", ["mlp_relu", "lstm", "batch_norm_relu"])
def test_networks_without_a_linear_space_stay(name: str) -> None:
    step = run_passes(program_of(zoo.build(name)), ["rotate"]).report.steps[0]
    assert not step.changed and "no residual stream admits a rotation" in step.summary


# ---------------------------------------------------------------- after expose
@pytest.mark.parametrize("name", ["llama_gqa", "vit"])
def test_expose_makes_streams_rotate(name: str) -> None:
    """Gammas are folded, and LayerNormalizations become RMS normalizations of centred streams."""
    model = zoo.build_or_skip(name)
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if "norm" in tensor.name and len(tensor.dims) == 1:
            array = onnx.numpy_helper.to_array(tensor)
            drawn = (array + rng.uniform(-0.4, 0.4, array.shape)).astype(array.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    outcome = run_passes(program_of(model), [Expose(), Rotate()])
    step = outcome.report.steps[1]
    assert step.changed and step.summary.startswith("1 residual stream and")
    assert step.verification is not None and step.verification.max_rel < 1e-5
    feeds, after = zoo.feeds(name, model), ir.to_proto(outcome.program.emit())
    assert largest_change(zoo.run(model, feeds), zoo.run(after, feeds)) < 1e-5


# ---------------------------------------------------------------- figures
def test_spread_counts_per_output_channel() -> None:
    array = np.array([[7.0, 3.5, 0.2], [70.0, 0.0, 4.0]])
    rows = spread(array, 0)
    assert rows.outlier == pytest.approx(70 / np.sqrt((array**2).mean()))
    assert rows.square == pytest.approx((array**2).sum())
    assert rows.error == pytest.approx((3.5 - 4) ** 2 + 0.2**2 + 4.0**2)
    columns = spread(array, 1)
    assert columns.error == pytest.approx((7 - 10) ** 2 + (0.2 - 0) ** 2)
    assert spread(np.zeros((2, 2)), 0) == spread(np.zeros((2, 2)), 1)
