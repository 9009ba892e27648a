"""The pass `prune`: budgets, ranking, links, options, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.models.dead_units import distance, outputs, program_of

from cipm_ir.errors import InputError, OptionError, SymmetryError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.search import Search, allowed_levels, link_spaces, make_choice
from cipm_ir.passes.pruning.importance.criteria import Magnitude, class_sums, register_importance
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space


def widths(program: Program, pruner: Prune) -> dict[str, list[int]]:
    return dict(pruner.run(program, Context()).metrics["widths"])


# ---------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "exactly one of macs, params and ratio; got none"),
        ({"macs": 0.5, "params": 0.5}, "got macs and params"),
        ({"macs": 0.0}, "'macs' takes"),
        ({"macs": 1.5}, "'macs' takes"),
        ({"ratio": -0.1}, "'ratio' takes"),
        ({"ratio": 0.5, "norm": "l3"}, "'norm' takes"),
        ({"ratio": 0.5, "scope": "layer"}, "'scope' takes"),
        ({"ratio": 0.5, "round_to": 0}, "'round_to' takes"),
        ({"ratio": 0.5, "importance": "guess"}, "no criterion named 'guess'"),
    ],
)
def test_bad_options(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        Prune(**options)  # type: ignore[arg-type]


def test_patterns_must_match() -> None:
    program = program_of("conv_flatten_gemm")
    for name in ("include", "exclude"):
        with pytest.raises(OptionError, match=f"{name} pattern 'nothing.' matches no space"):
            Prune(ratio=0.3, **{name: ("nothing*",)}).run(program, Context())  # type: ignore[arg-type]


def test_text_form() -> None:
    made = Prune(macs=0.5, round_to=8, scope="local", exclude=("head*",))
    assert list(parse_passes(str(made))) == [made]
    assert str(Prune(macs=0.5)) == "prune{macs=0.5}"


# ---------------------------------------------------------------- budgets
def test_params_and_ratio_budgets() -> None:
    program = program_of("residual_blocks")
    by_params = Prune(params=0.6).run(program, Context()).program
    assert 0.45 * program.parameters < by_params.parameters <= 0.6 * program.parameters
    units = sum(s.size for s in program.spaces)
    by_ratio = Prune(ratio=0.4).run(program, Context()).program
    assert sum(s.size for s in by_ratio.spaces) == int(0.6 * units)


def test_budget_counts_from_the_original() -> None:
    program = program_of("residual_blocks")
    once = Prune(macs=0.7).run(program, Context(original=program)).program
    again = Prune(macs=0.7).run(once, Context(original=program))
    assert not again.changed and again.program is once
    assert Prune(macs=0.7).run(once, Context()).program.macs <= 0.7 * once.macs


def test_budget_of_one_changes_nothing() -> None:
    program = program_of("residual_blocks")
    result = Prune(macs=1.0).run(program, Context())
    assert not result.changed and result.program is program


def test_out_of_reach_says_what_can_be_reached() -> None:
    program = program_of("residual_blocks")
    with pytest.raises(
        SymmetryError, match=r"come down to 0\.01 of the multiply-accumulates: .* at their minimum, 0\.\d+ remain"
    ):
        Prune(macs=0.01).run(program, Context())
    least = Prune(macs=0.2, min_keep=1).run(program, Context()).program
    assert least.macs <= 0.2 * program.macs


def test_min_keep_guards_every_space() -> None:
    program = program_of("residual_blocks")
    kept = widths(program, Prune(ratio=0.4, min_keep=0.5))
    assert all(after >= 0.5 * before for before, after in kept.values())
    assert any(after < 0.5 * before for before, after in widths(program, Prune(ratio=0.6, min_keep=1)).values())
    assert all(after >= 4 for _, after in widths(program, Prune(ratio=0.3, min_keep=4)).values())


@pytest.mark.parametrize(
    "name", ["unet_concat_skip", "channel_shuffle", "attention_gqa", "lstm", "shared_zero_bias", "siamese"]
)
def test_costs_are_exact(name: str) -> None:
    """At random sizes, the predicted numbers are those of the program that comes out."""
    program = program_of(name)
    costs = CostModel(program)
    whole = np.ones(program.analysis.classes.count, bool)
    assert (costs.macs(whole), costs.params(whole)) == (program.macs, program.parameters)
    rng = np.random.default_rng(0)
    groups = [g for g in link_spaces(program.analysis).groups if program.spaces[g[0]].kind == "units"]
    for _ in range(3):
        keep = {}
        for group in groups:
            number = int(rng.integers(1, min(program.spaces[k].size for k in group) + 1))
            for k in group:
                keep[program.spaces[k]] = np.sort(rng.choice(program.spaces[k].size, number, replace=False))
        stays = program.kept_classes(keep)
        after = program.restrict(keep)
        assert (costs.macs(stays), costs.params(stays)) == (after.macs, after.parameters)


# ---------------------------------------------------------------- ranking
def test_least_important_units_go() -> None:
    program = program_of("conv_flatten_gemm")
    space = next(s for s in program.spaces if s.size == 7)
    score = Magnitude("l2").score(program, space, Context())
    kept = Prune(ratio=0.4, scope="local").run(program, Context()).witness["kept"][space.name]
    gone = np.setdiff1d(np.arange(7), kept)
    assert len(gone) and score[gone].max() < score[kept].min()


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude_counts_every_member(norm: str) -> None:
    """Against a plain sum over the tensors: rows of producer and bias, blocks of columns of the consumer."""
    program = program_of("conv_flatten_gemm")
    weights = {n: np.asarray(v.const_value.numpy(), np.float64) for n, v in program.model.graph.initializers.items()}  # type: ignore[union-attr]
    space = next(s for s in program.spaces if s.size == 6)
    power = 1 if norm == "l1" else 2
    size = {n: np.abs(w) ** power for n, w in weights.items()}
    conv, bias, gemm = (m.rpartition("[")[0] for m in space.members)
    expected = size[conv].sum((1, 2, 3)) + size[bias] + size[gemm].reshape(7, 6, 16).sum((0, 2))
    expected = expected if norm == "l1" else np.sqrt(expected)
    np.testing.assert_allclose(Magnitude(norm).score(program, space, Context()), expected, rtol=1e-6)


def test_magnitude_of_groups_and_statistics() -> None:
    """Rows of a group share its in-axis; running statistics of a batch norm are no weights."""
    program = program_of("grouped_conv")
    weights = {n: np.asarray(v.const_value.numpy(), np.float64) for n, v in program.model.graph.initializers.items()}  # type: ignore[union-attr]
    first, bias, grouped = (m.rpartition("[")[0] for m in program.spaces[0].members)
    square = weights[grouped].reshape(3, 4, 2, 9) ** 2
    expected = (weights[first] ** 2).sum((1, 2, 3)) + weights[bias] ** 2 + square.sum((1, 3)).ravel()
    got = np.concatenate([Magnitude().score(program, s, Context()) for s in program.spaces[:3]])
    np.testing.assert_allclose(got, np.sqrt(expected), rtol=1e-6)
    normed = program_of("batch_norm_relu")
    name = next(n.inputs[4].name for n in normed.model.graph if n.op_type == "BatchNormalization" and n.inputs[4])
    before = class_sums(normed, "l2")
    assert name is not None
    louder = normed.refit({name: 100 * np.asarray(normed.model.graph.initializers[name].const_value.numpy())})  # type: ignore[union-attr]
    np.testing.assert_array_equal(class_sums(louder, "l2"), before)


def test_nan_weights_are_refused() -> None:
    program = program_of("conv_flatten_gemm")
    name = program.spaces[0].members[0].rpartition("[")[0]
    array = np.array(program.model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]
    array.flat[0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        Prune(ratio=0.3).run(program.refit({name: array}), Context())


def test_local_keeps_the_same_share_everywhere() -> None:
    program = program_of("zero_pad_shortcut")
    kept = widths(program, Prune(ratio=0.4, scope="local"))
    shares = [after / before for before, after in kept.values()]
    assert len(shares) == 4 and max(shares) - min(shares) < 0.25  # one unit of the smallest space
    uneven = widths(program, Prune(ratio=0.4, scope="global", min_keep=1))
    assert uneven != kept


def test_round_to() -> None:
    program = program_of("resnet20")
    result = Prune(macs=0.5, round_to=8).run(program, Context())
    kept = result.metrics["widths"]
    assert kept and all(after % 8 == 0 for _, after in kept.values())
    assert 0.4 * program.macs < result.program.macs <= 0.5 * program.macs


def test_include_and_exclude() -> None:
    program = program_of("residual_blocks")
    names = [s.name for s in program.spaces]
    tensor = next(m.rpartition("[")[0] for m in program.spaces[1].members if m.startswith("b_"))
    moved = {s.name for s in program.spaces if any(m.startswith(f"{tensor}[") for m in s.members)}
    assert set(widths(program, Prune(ratio=0.1, include=(names[1],)))) == {names[1]}
    assert set(widths(program, Prune(ratio=0.1, include=(tensor,)))) == moved
    assert names[0] not in widths(program, Prune(ratio=0.3, exclude=(f"@{names[0]}",)))


def test_blocks() -> None:
    program = program_of("attention_separate")
    heads = next(s for s in program.spaces if s.kind == "blocks")
    with_heads = Prune(ratio=0.4, include=(heads.name,), min_keep=1).run(program, Context())
    assert with_heads.metrics["widths"] == {heads.name: [3, 1]}
    assert heads.name not in widths(program, Prune(ratio=0.3, blocks=False))
    inner = next(s for s in program.spaces if s.parent is not None)
    assert heads.name not in widths(program, Prune(ratio=0.2, exclude=(inner.name,)))


# ---------------------------------------------------------------- links
@pytest.mark.parametrize(
    "name", ["attention_separate", "attention_head_major", "attention_gqa", "grouped_conv", "maxout_reshape"]
)
def test_siblings_keep_equal_numbers_of_their_own_best(name: str) -> None:
    program = program_of(name)
    result = Prune(ratio=0.3, blocks=False, min_keep=1).run(program, Context())
    siblings: dict[str, set[int]] = {}
    for space in program.spaces:
        if space.parent is not None and space.kind == "units":
            kept = result.metrics["widths"].get(space.name, [space.size, space.size])[1]
            siblings.setdefault(f"{space.parent[0].name} {space.size} {space.members}", set()).add(kept)
    assert siblings and all(len(numbers) == 1 for numbers in siblings.values())


def test_crossing_grid_is_one_link() -> None:
    """Channel shuffle: the 9 spaces between two grouped convolutions are rows and columns at once."""
    program = program_of("channel_shuffle")
    links = [[program.spaces[k] for k in group] for group in link_spaces(program.analysis).groups]
    assert sorted(len(g) for g in links if g[0].kind == "units") == [3, 3, 9]
    assert not link_spaces(program.analysis).frozen


def test_unlinked_spaces_do_not_fit() -> None:
    """Negative control: unequal numbers in sibling spaces are refused by the primitive."""
    program = program_of("attention_separate")
    inner = next(s for s in program.spaces if s.parent is not None)
    with pytest.raises(SymmetryError, match=r"ragged|equally many"):
        program.restrict({inner: np.arange(inner.size - 1)})


def test_allowed_levels() -> None:
    assert allowed_levels(16, 16, 2, 1).tolist() == list(range(2, 17))
    assert allowed_levels(20, 20, 3, 8).tolist() == [8, 16, 20]
    assert allowed_levels(6, 6, 1, 8).tolist() == [6]
    assert allowed_levels(8, 9, 1, 1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert allowed_levels(8, 9, 1, 4).tolist() == [4, 8, 9]


def test_search_takes_the_largest_model_within_the_budget() -> None:
    """Against all combinations of two small spaces, none is larger at the same threshold order."""
    program = program_of("mlp_relu")
    costs = CostModel(program)
    choices = []
    for k, space in enumerate(program.spaces):
        scores = Magnitude().score(program, space, Context())
        levels = allowed_levels(space.size, space.size, 1, 1)
        choices.append(make_choice(program.analysis, [k], [scores / scores.mean()], levels, local=False))
    search = Search(program.analysis, choices, costs.macs)
    prices = {
        (a, b): costs.macs(search.mask([a, b]))
        for a in range(len(choices[0].levels))
        for b in range(len(choices[1].levels))
    }
    for share in (0.3, 0.5, 0.8):
        budget = share * program.macs
        found = search.run(budget)
        assert found.cost <= budget and found.cost == prices[found.levels[0], found.levels[1]]
        for k in (0, 1):  # no single step up fits
            up = list(found.levels)
            up[k] += 1
            assert tuple(up) not in prices or prices[up[0], up[1]] > budget or budget - found.cost <= 0.002 * budget


# ---------------------------------------------------------------- extension points
@dataclass(frozen=True)
class Reversed:
    """Keeps the last units."""

    def score(self, program: Program, space: Space, ctx: Context) -> NDArray[np.float64]:
        return 1.0 + np.arange(space.size, dtype=np.float64)


def test_own_importance_as_object_and_by_name() -> None:
    program = program_of("mlp_relu")
    register_importance("last", lambda _norm: Reversed())
    for what in (Reversed(), "last"):
        kept = Prune(ratio=0.5, importance=what).run(program, Context()).witness["kept"]
        for name, index in kept.items():
            size = program.space(name).size
            np.testing.assert_array_equal(index, np.arange(size - len(index), size))
    with pytest.raises(OptionError, match="exists already"):
        register_importance("last", lambda _norm: Magnitude())


@dataclass(frozen=True)
class Broken:
    """Gives the wrong number of scores."""

    def score(self, program: Program, space: Space, ctx: Context) -> NDArray[np.float64]:
        return np.zeros(space.size + 1)


def test_wrong_scores_are_refused() -> None:
    with pytest.raises(OptionError, match="must give 8 finite numbers"):
        Prune(ratio=0.5, importance=Broken()).run(program_of("mlp_relu"), Context())


def test_compensation_lowers_the_error_of_the_same_units() -> None:
    program = program_of("mlp_relu")
    (value,) = program.model.graph.inputs
    width = value.shape[-1]  # type: ignore[index]
    x = np.random.default_rng(0).normal(size=(400, width)).astype(np.float32)  # type: ignore[arg-type]
    ctx = Context(data={value.name or "": x})
    plain, made = (Prune(ratio=0.4, compensate=c).run(program, ctx) for c in (False, True))
    assert made.witness["kept"].keys() == plain.witness["kept"].keys()
    assert made.program.parameters == plain.program.parameters
    assert distance(outputs(program, "mlp_relu"), outputs(made.program, "mlp_relu")) < distance(
        outputs(program, "mlp_relu"), outputs(plain.program, "mlp_relu")
    )


def test_compensation_needs_data() -> None:
    with pytest.raises(OptionError, match="give it calibration inputs"):
        Prune(ratio=0.4, compensate=True).run(program_of("mlp_relu"), Context())


def test_result_is_reported() -> None:
    program = program_of("residual_blocks")
    result = Prune(macs=0.5).run(program, Context())
    before, after = result.metrics["units"]
    assert result.summary.startswith(f"{before - after} of {before} units in ")
    assert [len(v) for v in result.witness["kept"].values()] == [w for _, w in result.metrics["widths"].values()]
    assert ir.to_proto(program.emit()) == ir.to_proto(program_of("residual_blocks").emit()), "the input is untouched"
