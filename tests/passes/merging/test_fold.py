"""The pass `fold`: what computes the same is merged exactly, what does not stays, and budgets are met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.benchmarks.compress_cifar import logits, prepared
from tests.models.dead_units import distance, outputs, program_of
from tests.models.fold_planted import array_of, changed, out_of_gauge, planted

import cipm_ir
from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.passes import Context, Fold, Kind, PassResult, parse_passes, run_passes
from cipm_ir.passes.pruning.importance.criteria import Magnitude
from cipm_ir.runtime.inputs.generate import Feeds, random_inputs
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program

TOLERANCE = 2e-6


def folded(program: Program, name: str, one: Fold | None = None) -> PassResult:
    """Run the pass; outputs must be as before."""
    result = (one or Fold()).run(program, Context(original=program))
    assert distance(outputs(program, name), outputs(result.program, name)) <= TOLERANCE
    return result


def widths(result: PassResult) -> dict[str, list[int]]:
    return dict(result.metrics["widths"])


# ---------------------------------------------------------------- exact
def test_exact_duplicates_of_a_relu_layer() -> None:
    program = planted(program_of("mlp_relu"), program_of("mlp_relu").space("w_1"), {5: 2, 6: 2, 7: 0})
    result = folded(program, "mlp_relu")
    assert widths(result) == {"w_1": [8, 5]}
    assert result.witness["kept"]["w_1"].tolist() == [0, 1, 2, 3, 4]
    assert result.kind is Kind.EXACT and "3 duplicates" in result.summary
    readers = array_of(program, "w_5").astype(np.float64)
    mixed = result.witness["mixing"]["w_1"].T @ readers
    assert np.allclose(array_of(result.program, "w_5"), mixed, rtol=1e-6, atol=1e-7)


def test_scaled_duplicates_under_relu() -> None:
    program = planted(program_of("mlp_relu"), program_of("mlp_relu").space("w_1"), {7: 3})
    for name in ("w_1", "b_2"):
        program = changed(program, name, 7, 0.37 * array_of(program, name)[3])
    result = folded(program, "mlp_relu")
    assert widths(result) == {"w_1": [8, 7]}
    assert result.witness["mixing"]["w_1"][7, 3] == pytest.approx(0.37, rel=1e-5)


def test_flipped_duplicates_under_tanh() -> None:
    program = planted(program_of("mlp_tanh"), program_of("mlp_tanh").space("w_1"), {7: 3})
    for name in ("w_1", "b_2"):
        program = changed(program, name, 7, -array_of(program, name)[3])
    result = folded(program, "mlp_tanh")
    assert widths(result) == {"w_1": [8, 7]}
    assert result.witness["mixing"]["w_1"][7, 3] == -1.0


@pytest.mark.parametrize(
    ("name", "factor"),
    [("mlp_relu", -1.0), ("mlp_gelu", 0.5), ("mlp_gelu", -1.0), ("mlp_tanh", 0.5), ("mlp_silu", 2.0), ("mlp_abs", 0.0)],
)
def test_outside_of_the_group_nothing_is_merged(name: str, factor: float) -> None:
    program = program_of(name)
    weights = [m.partition("[")[0] for m in program.space("w_1").members if m.endswith("[0]")][:2]
    for one in weights:
        program = changed(program, one, 7, factor * array_of(program, one)[3])
    result = folded(program, name)
    assert not result.changed and result.program is program


@pytest.mark.parametrize("noise", [1e-5, 1e-3])
def test_near_duplicates_stay(noise: float) -> None:
    start = program_of("mlp_relu")
    program = planted(start, start.space("w_1"), {7: 3}, noise=noise)
    assert not folded(program, "mlp_relu").changed
    loose = Fold(tolerance=10 * noise).run(program, Context())
    assert widths(loose) == {"w_1": [8, 7]}


def test_equal_weights_with_another_bias_stay() -> None:
    start = program_of("mlp_relu")
    program = planted(start, start.space("w_1"), {7: 3})
    program = changed(program, "b_2", 7, array_of(program, "b_2")[7] + 0.01)
    assert not folded(program, "mlp_relu").changed


GENERAL = [
    "mlp_relu", "mlp_leakyrelu", "mlp_tanh", "mlp_gelu", "mlp_square", "mlp_abs", "mlp_prelu", "mlp_identity",
    "mlp_float64", "mlp_transposed_weight", "batch_norm_relu", "batch_norm_linear", "batch_norm_1d", "gated_mlp",
    "conv_flatten_gemm", "conv_pool", "depthwise", "residual_blocks", "unet_concat_skip", "two_heads", "tied_embedding",
    "shared_zero_bias", "layer_norm", "squeeze_excitation", "attention_separate", "attention_gqa",
]  # fmt: skip


@pytest.mark.parametrize("name", GENERAL)
def test_planted_under_the_group(name: str, rng: np.random.Generator) -> None:
    """Two copies in every space that can be merged, moved by a random element of its group, are found."""
    program = start = program_of(name)
    refused = Fold().run(start, Context()).metrics["refused"]
    spaces = [s for s in start.spaces if s.kind == "units" and s.name not in refused and s.size >= 4]
    assert spaces
    for space in spaces:
        pairs = {space.size - 1: 0, space.size - 2: 1}
        program = planted(program, program.space(space.name), pairs)
        program = out_of_gauge(program, program.space(space.name), list(pairs), rng)
    result = folded(program, name)
    for space in spaces:
        before, after = widths(result)[space.name]
        assert (before, after) == (space.size, space.size - 2)
    assert not Fold().run(result.program, Context()).changed


def test_bit_exact_kept_units() -> None:
    """What makes the units that stay is not touched, and power-of-two multiples are absorbed without rounding."""
    start = program_of("mlp_relu")
    program = planted(start, start.space("w_1"), {7: 3})
    for name in ("w_1", "b_2"):
        program = changed(program, name, 7, 4 * array_of(program, name)[3])
    result = folded(program, "mlp_relu")
    assert np.array_equal(array_of(result.program, "w_1"), array_of(program, "w_1")[:7])
    old = array_of(program, "w_5")
    assert np.array_equal(array_of(result.program, "w_5")[3], old[3] + 4 * old[7])


def test_heads_lose_equally_many() -> None:
    start = program_of("attention_separate")
    program = planted(start, start.space("w_22"), {3: 0})
    assert not folded(program, "attention_separate").changed
    program = planted(program, program.space("w_22#2"), {2: 1, 3: 1})
    program = planted(program, program.space("w_22#3"), {1: 0})
    result = folded(program, "attention_separate")
    assert widths(result) == {name: [4, 3] for name in ("w_22", "w_22#2", "w_22#3")}


def test_duplicates_that_appear_later() -> None:
    """Rows of the second layer differ only in how they share their sum among two equal units of the first."""
    start = program_of("mlp_relu")
    program = planted(start, start.space("w_1"), {7: 3})
    second = array_of(program, "w_5")
    second[:, 5] = second[:, 0]
    second[3, 5], second[7, 5] = second[3, 0] + 0.5, second[7, 0] - 0.5
    program = program.refit({"w_5": second})
    program = changed(program, "b_7", 5, array_of(program, "b_7")[0])
    assert widths(folded(program, "mlp_relu")) == {"w_1": [8, 7], "w_5": [6, 5]}
    assert widths(folded(program, "mlp_relu", Fold(rounds=1))) == {"w_1": [8, 7]}


def test_refused_spaces_are_named() -> None:
    result = Fold().run(program_of("layer_norm"), Context())
    assert "left as they are: @w_1 (A normalization" in result.summary
    assert "softmax" in result.metrics["refused"]["w_1"]


def test_nan_is_equal_to_nothing() -> None:
    program = changed(program_of("mlp_relu"), "w_1", slice(None), np.nan)
    assert not Fold().run(program, Context()).changed


def test_include_and_exclude() -> None:
    start = program_of("mlp_relu")
    program = planted(planted(start, start.space("w_1"), {7: 3}), start.space("w_5"), {5: 0})
    assert widths(folded(program, "mlp_relu", Fold(include=("w_5",)))) == {"w_5": [6, 5]}
    assert widths(folded(program, "mlp_relu", Fold(exclude=("@w_5",)))) == {"w_1": [8, 7]}
    with pytest.raises(OptionError, match="include pattern 'nothing' matches no space"):
        Fold(include=("nothing",)).run(program, Context())


def test_in_a_pipeline() -> None:
    start = program_of("batch_norm_relu")
    program = planted(start, start.space("w_1"), {7: 3})
    outcome = run_passes(program, "fold")
    assert outcome.report.steps[0].checked == "verified"
    outcome = run_passes(program, "fold{ratio=0.4, method=k-means}")
    assert outcome.report.steps[0].kind == "approximate" and outcome.report.steps[0].checked == "measured"


# ---------------------------------------------------------------- down to a budget
@pytest.mark.parametrize("method", ["least-squares", "k-means", "correlation"])
@pytest.mark.parametrize("name", ["mlp_relu", "residual_blocks", "batch_norm_relu", "attention_separate", "depthwise"])
def test_budgets_are_met(name: str, method: str) -> None:
    program = program_of(name)
    data = None
    if method == "correlation":
        shapes = {v.name: [d if isinstance(d, int) else 4 for d in v.shape or ()] for v in program.model.graph.inputs}
        rng = np.random.default_rng(0)
        data = {k: rng.standard_normal([64, *s[1:]]).astype(np.float32) for k, s in shapes.items()}
    one = Fold(params=0.85, method=method)  # type: ignore[arg-type]
    result = one.run(program, Context(data=data, original=program))
    assert 0.6 * program.parameters < result.program.parameters <= 0.85 * program.parameters
    assert result.kind is Kind.APPROXIMATE and result.metrics["merged"] > 0
    assert all(np.isfinite(x).all() for x in outputs(result.program, name))
    again = one.run(program, Context(data=data, original=program))
    assert distance(outputs(result.program, name), outputs(again.program, name)) == 0.0


def test_ratio_and_macs() -> None:
    program = program_of("mlp_relu")
    assert sum(s.size for s in Fold(ratio=0.5).run(program, Context()).program.spaces) == 7
    assert Fold(macs=0.6).run(program, Context()).program.macs <= 0.6 * program.macs
    assert not Fold(macs=1.0).run(program, Context()).changed


def test_streams_only_on_demand() -> None:
    program = program_of("residual_blocks")
    plain = Fold(ratio=0.3, method="k-means").run(program, Context())
    assert "streams=true" in plain.metrics["refused"]["w_1"] and "w_1" not in widths(plain)
    streams = Fold(ratio=0.3, method="k-means", streams=True).run(program, Context())
    assert "w_1" in widths(streams)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"macs": 0.5, "params": 0.5}, "at most one of macs, params and ratio; got macs and params"),
        ({"ratio": -0.1}, "'ratio' takes"),
        ({"tolerance": -1.0}, "'tolerance' takes"),
        ({"ratio": 0.5, "method": "guess"}, "'method' takes"),
    ],
)
def test_bad_options(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        Fold(**options)  # type: ignore[arg-type]


def test_correlation_needs_data() -> None:
    with pytest.raises(OptionError, match="method 'correlation' looks at data"):
        Fold(ratio=0.5, method="correlation").run(program_of("mlp_relu"), Context())


def test_too_few_data_are_said_to_be() -> None:
    program = program_of("mlp_relu")
    few, many = (np.random.default_rng(0).standard_normal((n, 5)).astype(np.float32) for n in (3, 50))
    result = Fold(ratio=0.5).run(program, Context(data={"x": few}))
    assert "3 values for the 8 units of @w_1" in result.summary and result.metrics["warnings"]
    assert all(np.isfinite(x).all() for x in outputs(result.program, "mlp_relu"))
    assert not Fold(ratio=0.5).run(program, Context(data={"x": many})).metrics["warnings"]
    constant = Fold(ratio=0.5).run(program, Context(data={"x": np.zeros((50, 5), np.float32)}))
    assert all(np.isfinite(x).all() for x in outputs(constant.program, "mlp_relu"))


def test_streams_by_least_squares_need_data() -> None:
    program = program_of("residual_blocks")
    feeds = random_inputs(program.model, np.random.default_rng(0), 64)
    without = Fold(ratio=0.3, streams=True).run(program, Context())
    assert "several places" in without.metrics["refused"]["w_1"]
    assert "w_1" in widths(Fold(ratio=0.3, streams=True).run(program, Context(data=feeds)))


def test_out_of_reach() -> None:
    with pytest.raises(SymmetryError, match=r"fold cannot come down to 0\.01 of the parameters: .*0\.\d+ remain"):
        Fold(params=0.01).run(program_of("mlp_relu"), Context())


def test_text_form() -> None:
    made = Fold(params=0.75, method="k-means", exclude=("head*",))
    assert list(parse_passes(str(made))) == [made]
    assert str(Fold()) == "fold"


@pytest.mark.parametrize("correct", [True, False])
def test_where_the_variance_is_corrected(correct: bool) -> None:
    """On the scale of a batch normalization; else on the readers, where the group has scales; else nowhere."""
    one = Fold(ratio=0.5, method="k-means", correct=correct)
    program = program_of("batch_norm_relu")
    result = one.run(program, Context())
    mixing = result.witness["mixing"]["w_1"]
    assert set(np.unique(mixing)) == {0.0, 1.0}
    mean = mixing.T @ array_of(program, "s_5").astype(np.float64) / mixing.sum(axis=0)
    gain = array_of(result.program, "s_5") / mean
    alone = mixing.sum(axis=0) == 1
    assert np.allclose(gain[alone], 1.0) and (gain[~alone] > 1.01).all() == correct
    for name, scaled in (("mlp_relu", True), ("mlp_gelu", False), ("mlp_tanh", False)):
        factors = np.unique(one.run(program_of(name), Context()).witness["mixing"]["w_1"])
        assert (factors > 1.01).any() == (scaled and correct)


# ---------------------------------------------------------------- quality
def deleted(program: Program, result: PassResult) -> Program:
    """The units of the largest magnitude stay, as many as in a result."""
    keep = {}
    for space in program.spaces:
        if space.name in widths(result):
            scores = Magnitude().score(program, space, Context())
            keep[space] = np.sort(np.argsort(-scores, kind="stable")[: widths(result)[space.name][1]])
    return program.restrict(keep)


def values_on(program: Program, feeds: Feeds) -> NDArray[Any]:
    with Runner(program.model) as runner:
        return np.concatenate([v.ravel() for v in runner.run(feeds).values()])


@pytest.mark.parametrize(
    "name",
    ["mlp_relu", "mlp_tanh", "mlp_sigmoid", "residual_blocks", "batch_norm_relu", "gated_mlp", "attention_separate"],
)
def test_better_than_deletion_without_data(name: str) -> None:
    """Mean square error on 256 inputs; with the moments of these very inputs it is smaller still."""
    program = program_of(name)
    feeds = random_inputs(program.model, np.random.default_rng(0), 256)
    dense = values_on(program, feeds)
    result = Fold(ratio=0.3).run(program, Context())
    measured = Fold(ratio=0.3).run(program, Context(data=feeds))
    made = (deleted(program, result), result.program, measured.program)
    gone, without, with_data = (float(np.mean((values_on(p, feeds) - dense) ** 2)) for p in made)
    assert with_data < without < gone


@pytest.mark.parametrize("network", ["resnet20", "resnet32"])
def test_cifar_without_data(network: str, data_dir: Path) -> None:
    """Agreement with the dense model on 500 images, at 10, 25 and 50% of the parameters removed."""
    program = cipm_ir.load(data_dir / "cifar10" / f"{network}.onnx")
    images = prepared(np.load(data_dir / "cifar10" / "calib.npz")["images"][:500])
    dense = logits(program, images).argmax(axis=1)

    def agreement(made: Program) -> float:
        return float((logits(made, images).argmax(axis=1) == dense).mean())

    least = {0.9: 0.96, 0.75: 0.85, 0.5: 0.25}
    for size in (0.9, 0.75, 0.5):
        result = Fold(params=size).run(program, Context(original=program))
        merged = agreement(result.program)
        assert merged > agreement(deleted(program, result)), size
        assert merged > least[size]
        means = Fold(params=size, method="k-means").run(program, Context(original=program))
        slack = 0.005 if size == 0.9 else 0.0  # at 10% both are near 98%, and 500 images tell no more
        assert agreement(means.program) > agreement(deleted(program, means)) - slack, size
