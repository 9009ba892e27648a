"""The pass `compress`: planted redundancy, budgets, heads, what it leaves alone, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests import zoo
from tests.models.compress_nets import Feeds, array_of, furthest, gap, images, mlp, program, residual, rows, values
from tests.models.dead_units import program_of
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.errors import InputError, OptionError
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.runtime.inputs.generate import random_inputs
from cipm_ir.symmetry.program import Program

STRUCTURES = [
    "batch_norm_relu", "batch_norm_linear", "attention_rope_table", "unet_concat_skip", "loop_capture",
    "tied_embedding", "shared_zero_bias", "siamese", "depthwise", "mlp_float16",
]  # fmt: skip
FAST: dict[str, Any] = {"steps": 3, "min_keep": 1, "rounds": 0}


def compress(made: Program, data: Any, **options: Any) -> PassResult:
    return Compress(**{**FAST, **options}).run(made, Context(data=data, original=made))


def measured(result: PassResult) -> float:
    return float(result.metrics["divergence"]["measured"])


# ---------------------------------------------------------------- planted redundancy
def combinations(independent: int) -> tuple[Program, str]:
    """Sixteen linear units, all but ``independent`` of them exact combinations of the others, shuffled."""
    net = Net(f"combinations{independent}")
    base = net.relu(net.gemm(net.input("x", ["N", 6]), 6, 24))
    weight = net.normal((24, 16), 0.3)
    weight[:, independent:] = weight[:, :independent] @ net.normal((independent, 16 - independent), 0.7)
    mixing = net.const(weight[:, net.rng.permutation(16)])
    net.output(net.gemm(net.op("MatMul", base, mixing), 16, 12), ["N", 12])
    return program(net), mixing


def test_linear_combinations_go_without_loss() -> None:
    made, mixing = combinations(10)
    space = next(s for s in made.spaces if s.size == 16)
    target = made.restrict({space: np.arange(10)}).parameters / made.parameters
    result = compress(made, rows(600), params=target, include=(space.name,), steps=16, round_to=1)
    assert result.metrics["widths"] == {space.name: [16, 10]}
    assert measured(result) < 1e-6
    fresh = rows(200, seed=5)
    assert furthest(values(made, fresh), values(result.program, fresh)) < 1e-2
    kept = array_of(made, mixing)[:, result.witness["kept"][space.name]].astype(np.float64)
    assert np.linalg.matrix_rank(kept, tol=1e-4) == 10


def test_control_without_redundancy_there_is_loss() -> None:
    made, _ = combinations(16)
    space = next(s for s in made.spaces if s.size == 16)
    target = made.restrict({space: np.arange(10)}).parameters / made.parameters
    result = compress(made, rows(600), params=target, include=(space.name,), steps=16, round_to=1)
    assert result.metrics["widths"] == {space.name: [16, 10]} and measured(result) > 1e-4
    fresh = rows(200, seed=5)
    assert furthest(values(made, fresh), values(result.program, fresh)) > 2e-2


def test_scaled_copies_behind_a_relu_go_first() -> None:
    """Of channels that come in pairs, one positive multiple of the other, one of each pair goes."""
    net = Net("copies")
    weight, bias = net.normal((6, 3, 3, 3), 0.3), net.normal((6,), 0.3)
    factor = net.rng.uniform(0.5, 2.0, 6).astype(np.float32)
    both = np.concatenate([weight, weight * factor[:, None, None, None]])
    biases = np.concatenate([bias, bias * factor])
    hidden = net.op("Conv", net.image(3, 6), net.const(both), net.const(biases), pads=[1] * 4)
    net.output(net.conv(net.relu(hidden), 12, 5), ["N", 5, 6, 6])
    made = program(net)
    result = compress(made, images(60), macs=0.5, steps=12)
    assert measured(result) < 1e-6
    assert sorted(k % 6 for k in result.witness["kept"][made.spaces[0].name].tolist()) == list(range(6))
    further = compress(made, images(60), macs=0.42, steps=12)
    assert measured(further) > 1e-3


def test_the_sensitive_layer_keeps_more() -> None:
    """Two hidden layers of one size; the units of the second are all alike."""
    net = Net("uneven")
    first = net.relu(net.gemm(net.input("x", ["N", 6]), 6, 16))
    same = np.repeat(net.normal((1, 16), 0.4), 16, axis=0) * net.rng.uniform(0.5, 1.5, (16, 1)).astype(np.float32)
    second = net.relu(net.op("Gemm", first, net.const(same), net.const(np.zeros(16)), transB=1))
    net.output(net.gemm(net.op("Concat", first, second, axis=1), 32, 3), ["N", 3])
    made = program(net)
    result = compress(made, rows(400), params=0.5)
    (_, (_, kept_first)), (_, (_, kept_second)) = result.metrics["widths"].items()
    assert kept_second <= 4 < kept_first


# ---------------------------------------------------------------- budgets
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_budgets_hold(kind: str) -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    for fraction in (0.8, 0.5):
        result = compress(made, data, **{kind: fraction})
        before, after = result.metrics[kind]
        assert 0.8 * fraction * before < after <= fraction * before
        assert (result.program.macs, result.program.parameters) == (
            result.metrics["macs"][1],
            result.metrics["params"][1],
        )


def test_budgets_count_from_the_original() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(40)
    half = compress(made, data, macs=0.6).program
    again = Compress(macs=0.6, **FAST).run(half, Context(data=data, original=made))
    assert not again.changed and again.program is half and "within the budget" in again.summary
    assert Compress(macs=0.6, **FAST).run(half, Context(data=data)).program.macs <= 0.6 * half.macs


def test_better_than_deletion_and_worse_the_smaller() -> None:
    made, data, fresh = program(residual(blocks=2, width=6, hidden=10)), images(60), images(60, seed=9)
    dense = values(made, fresh)[0]
    errors = []
    for fraction in (0.8, 0.6, 0.4):
        ours = compress(made, data, macs=fraction, divergence="error").program
        deleted = Prune(macs=fraction, min_keep=1).run(made, Context()).program
        errors.append(gap(dense, values(ours, fresh)[0]))
        assert errors[-1] < 0.5 * gap(dense, values(deleted, fresh)[0])
    assert errors == sorted(errors)


def test_measured_divergence_is_that_of_the_result() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    result = compress(made, data, macs=0.6, divergence="error")
    left_out = {"x": data["x"][7::8]}
    a, b = values(made, left_out)[0], values(result.program, left_out)[0]
    assert measured(result) == pytest.approx(np.square(a - b).sum() / np.square(a).sum(), rel=1e-3)


def test_largest_drop() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    loose, tight = (compress(made, data, max_drop=d, divergence="error") for d in (0.2, 0.01))
    assert measured(loose) <= 0.2 and measured(tight) <= 0.01
    assert loose.program.macs < tight.program.macs < made.macs
    assert "divergence" in tight.summary and "at most 0.01 asked" in tight.summary


def test_evaluate_bounds_the_drop() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    labels = values(made, data)[0].argmax(axis=1)
    calls = []

    def agreement(run: Any) -> float:
        (logits,) = run(data).values()
        calls.append(float((logits.argmax(axis=1) == labels).mean()))
        return calls[-1]

    result = compress(made, data, max_drop=0.1, evaluate=agreement)
    assert calls[0] == 1.0 and result.program.macs < made.macs
    assert (values(result.program, data)[0].argmax(axis=1) == labels).mean() >= 0.9
    assert "drop of the score" in result.summary


# ---------------------------------------------------------------- heads and other links
def graph(data_dir: Path, name: str, batches: int) -> tuple[Program, Feeds]:
    made = cipm_ir.load(str(data_dir / "graphs" / f"{name}.onnx"))
    rng = np.random.default_rng(0)
    parts = [random_inputs(made.model, rng) for _ in range(batches)]
    return made, {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def shapes(made: Program) -> dict[str, tuple[int, ...]]:
    return {n: array_of(made, n).shape for n in made.model.graph.initializers}


def test_heads_go_as_wholes(data_dir: Path) -> None:
    """BERT, its batch fixed: four heads of 24, of which every projection loses the same rows."""
    made, data = graph(data_dir, "bert", 8)
    result = compress(made, data, params=0.85, include=("*.blocks",), steps=3)
    kept = {name: after for name, (_, after) in result.metrics["widths"].items()}
    assert set(kept) == {s.name for s in made.spaces if s.kind == "blocks"} and min(kept.values()) < 4
    before, after = shapes(made), shapes(result.program)
    changed = [(before[n], after[n]) for n in before if before[n] != after[n]]
    widths = {b for old, new in changed for a, b in zip(old, new, strict=True) if a != b}
    assert changed and widths <= {24 * n for n in kept.values()}
    few = {k: v[:2] for k, v in data.items()}
    assert furthest(values(made, few), values(result.program, few)) < 0.2


def test_a_shared_bias_is_not_corrupted(data_dir: Path) -> None:
    """Equal biases as one initializer: what it adds stays, wherever its length does."""
    made, data = graph(data_dir, "bert_shared_bias", 8)
    shared = {n for n, v in made.model.graph.initializers.items() if len(v.uses()) > 1 and v.dtype == ir.DataType.FLOAT}
    assert shared
    result = compress(made, data, params=0.8, steps=2)
    assert result.changed
    for name in shared:
        old, new = array_of(made, name), array_of(result.program, name)
        assert np.unique(new).tolist() == np.unique(old).tolist()
    few = {k: v[:2] for k, v in data.items()}
    assert furthest(values(made, few), values(result.program, few)) < 0.3


def test_key_value_heads_stay_shared(data_dir: Path) -> None:
    """Llama, grouped queries: a group goes with all its queries; rotary planes stay whole."""
    made, data = graph(data_dir, "llama_gqa", 8)
    groups = [s for s in made.spaces if s.kind == "blocks"]
    result = compress(made, data, params=0.9, include=tuple(s.name for s in groups), steps=1)
    kept = result.witness["kept"]
    assert kept and set(kept) <= {s.name for s in groups}
    before, after = shapes(made), shapes(result.program)
    both = [(before[n], after[n]) for n in before.keys() & after.keys()]
    ratios = {b / a for old, new in both for a, b in zip(old, new, strict=True) if a != b}
    assert ratios == {0.5}


def test_siblings_keep_equal_numbers() -> None:
    made = program_of("attention_separate")
    data = zoo.feeds("attention_separate", zoo.build("attention_separate"), 0, {"N": 40})
    result = compress(made, data, params=0.7, blocks=False)
    before, after = shapes(made), shapes(result.program)
    assert any(before[n] != after[n] for n in before)
    assert all("blocks" not in name for name in result.witness["kept"])
    assert len({len(k) for name, k in result.witness["kept"].items()}) <= 2


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_of_the_zoo(name: str) -> None:
    """Unfolded batch norm, rotary heads, skips, loops, ties: smaller, within the budget, and near."""
    model = zoo.build(name)
    made = Program.of(ir.from_proto(model))
    data = zoo.feeds(name, model, 0, {"N": 48})
    result = compress(made, data, params=0.75, steps=3)
    assert result.program.parameters <= 0.75 * made.parameters
    dense, ours = values(made, data)[0], values(result.program, data)[0]
    assert np.isfinite(ours).all() and gap(dense, ours) < 1.0


# ---------------------------------------------------------------- batches, seeds, options
def test_fixed_and_free_batches_choose_alike() -> None:
    data = rows(24)  # none is left out: of a fixed batch, whole ones would be
    free, fixed = (compress(program(mlp(batch=n)), data, params=0.6, plain=False) for n in ("N", 8))
    assert free.metrics["widths"] == fixed.metrics["widths"]
    for name, kept in free.witness["kept"].items():
        assert kept.tolist() == fixed.witness["kept"][name].tolist()
    assert len(values(fixed.program, rows(8))[0]) == 8
    with pytest.raises(InputError):
        values(fixed.program, rows(7))


def test_same_seed_same_model() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(40)
    one, two = (compress(made, data, macs=0.6).program for _ in range(2))
    for name in one.model.graph.initializers:
        np.testing.assert_array_equal(array_of(one, name), array_of(two, name))


def test_data_in_every_form(tmp_path: Path) -> None:
    made, data = program(mlp()), rows(64)
    np.savez(tmp_path / "data.npz", x=data["x"])
    forms: list[Any] = [data, str(tmp_path / "data.npz"), [{"x": data["x"][k : k + 16]} for k in range(0, 64, 16)]]
    widths = [compress(made, form, params=0.6).metrics["widths"] for form in forms]
    assert widths[0] == widths[1] == widths[2]


def test_a_generator_is_read_once_by_the_pipeline() -> None:
    made, data = program(mlp()), rows(64)
    pieces = ({"x": data["x"][k : k + 8]} for k in range(0, 64, 8))
    result = cipm_ir.optimize(ir.to_proto(made.emit()), ["compress{params=0.6}"], data=pieces)
    assert result.program.parameters <= 0.6 * made.parameters


def test_one_call(tmp_path: Path) -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(40)
    result = cipm_ir.optimize(
        ir.to_proto(made.emit()),
        ["compress{macs=0.6,steps=3,min_keep=1,plain=false}"],
        data=data,
        output=tmp_path / "small.onnx",
    )
    step = result.report.steps[-1]
    assert step.changed and [type(f).__name__ for f in step.figures] == ["Bars", "Curves"]
    small = cipm_ir.load(str(tmp_path / "small.onnx"))
    assert small.macs <= 0.6 * made.macs
    assert furthest(values(result.program, data), values(small, data)) < 1e-5


def test_include_exclude_and_widths() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(40)
    names = [s.name for s in made.spaces if s.size == 10]
    only = compress(made, data, macs=0.85, include=(names[0],))
    assert list(only.witness["kept"]) == [names[0]]
    without = compress(made, data, macs=0.7, exclude=(names[0],))
    assert names[0] not in without.witness["kept"]
    even = compress(made, data, macs=0.6, round_to=4, min_keep=0.5)
    assert all(after % 4 == 0 and after >= before / 2 for before, after in even.metrics["widths"].values())


def test_whole_blocks_can_be_left_alone() -> None:
    made = program_of("attention_qkv_major")
    data = zoo.feeds("attention_qkv_major", zoo.build("attention_qkv_major"), 0, {"N": 40})
    assert any("blocks" in n for n in compress(made, data, params=0.7).witness["kept"])
    narrower = compress(made, data, params=0.8, blocks=False).witness["kept"]
    assert narrower and not any("blocks" in n for n in narrower)


def test_rounds_never_hurt() -> None:
    made, data = program(residual(blocks=2, width=6, hidden=10)), images(60)
    plain, refined = (compress(made, data, macs=0.5, rounds=r) for r in (0, 2))
    assert measured(refined) <= measured(plain)


def test_progress_moves_forward() -> None:
    seen: list[float] = []

    def show(_what: str, fraction: float | None) -> None:
        seen.append(fraction or 0.0)

    made = program(mlp())
    Compress(params=0.6, **FAST).run(made, Context(data=rows(64), progress=show))
    assert seen and seen == sorted(seen) and seen[-1] <= 1.0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "exactly one of macs, params, bytes, latency, max_drop; got none"),
        ({"macs": 0.5, "params": 0.5}, "got macs and params"),
        ({"macs": 0.5, "max_drop": 0.1}, "got macs and max_drop"),
        ({"macs": 0.5, "evaluate": lambda run: 1.0}, "evaluate is asked for a drop; give max_drop"),
        ({"macs": 0.0}, "'macs' takes"),
        ({"latency": 1.5}, "'latency' takes"),
        ({"max_drop": 0.0}, "'max_drop' takes"),
        ({"macs": 0.5, "samples": 0}, "'samples' takes"),
        ({"macs": 0.5, "damping": 0.0}, "'damping' takes"),
        ({"macs": 0.5, "divergence": "l2"}, "'divergence' takes"),
        ({"macs": 0.5, "round_to": 0}, "'round_to' takes"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        Compress(**options)


def test_text_form() -> None:
    made = Compress(macs=0.5, round_to=8, exclude=("head*",), blocks=False)
    assert list(parse_passes(str(made))) == [made]
    assert str(Compress(macs=0.5)) == "compress{macs=0.5}"
