"""Powers of two and signs change no bit of any output in onnxruntime: by hand, by `equalize`, by `canonicalize-signs`.

What a random element does, unfused, is tested on the whole zoo in test_soundness.py. Here: the passes on it, fused runs
(onnxruntime folds and fuses before it computes), the largest of the light models, and that `bit_exact_table` notices.
The table itself is a script, which runs all light models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests import zoo
from tests.benchmarks.bit_exact_table import Outputs, changed, largest_delta, main, program_of, random_gauge, row, run

import cipm_ir
from cipm_ir.algebra import Element
from cipm_ir.passes.exact.canonicalize.canonicalize_signs import CanonicalizeSigns
from cipm_ir.passes.exact.equalize.equalize import Equalize
from cipm_ir.passes.framework.base import Pass

EXPORTED = [*zoo.names("graphs"), *zoo.names("cifar"), "minilm"]
COLUMNS = {"minilm": ("equal",)}  # each takes seconds there; the script does them all
SMALL = zoo.names("synthetic", without=("float16",))
PASSES: list[Pass] = [Equalize(), Equalize(per="channel"), CanonicalizeSigns(by="range")]
SCALED = ["mlp_relu", "residual_blocks", "gated_mlp", "attention_separate", "depthwise", "concat_relu", "conv_pool"]


def outputs(model: onnx.ModelProto, name: str) -> Outputs:
    return run(model, zoo.feeds(name, model), reference=zoo.entry(name).reference)


@pytest.mark.parametrize("name", SMALL)
def test_passes_on_small_models(name: str) -> None:
    model = zoo.build(name)
    program, before = program_of(model), outputs(model, name)
    for one in PASSES:
        moved, _ = changed(program, one)
        if moved is not program:
            assert largest_delta(before, outputs(ir.to_proto(moved.emit()), name)) == 0.0, str(one)


@pytest.mark.parametrize("name", SCALED)
def test_equalize_does_something_there(name: str) -> None:
    """The test above would pass if it changed nothing: behind a random element it has to."""
    model = zoo.build(name)
    far = random_gauge(program_of(model))
    moved, witness = changed(far, Equalize())
    assert witness
    assert largest_delta(outputs(model, name), outputs(ir.to_proto(moved.emit()), name)) == 0.0


@pytest.mark.parametrize("name", EXPORTED)
def test_real_graphs(name: str) -> None:
    zoo.build_or_skip(name)
    columns = COLUMNS.get(name, ("gauge", "fused", "signs", "equal"))
    made = row(name, columns)
    assert made.scales or made.signs
    assert made.delta == dict.fromkeys(columns, 0.0), made


@pytest.mark.parametrize("name", ["squeezenet", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_light_models(name: str) -> None:
    made = row(name, ("fused", "equal"))
    assert made.scales > 1000
    assert all(delta == 0.0 for delta in made.delta.values()), made


@pytest.mark.parametrize("name", ["resnet20", "bert"])
def test_through_the_api(name: str) -> None:
    model = zoo.build_or_skip(name)
    result = cipm_ir.optimize(model, passes=["equalize", "canonicalize-signs"])
    after = ir.to_proto(result.model) if isinstance(result.model, ir.Model) else result.model
    assert largest_delta(outputs(model, name), outputs(after, name)) == 0.0
    if result.report.verification is not None:
        assert result.report.verification.max_abs == 0.0


# ---------------------------------------------------------------- controls
def scaled_by(program: Any, factor: float) -> Any:
    """All units of the first space that can be scaled, by this factor."""
    space = next(s for s in program.spaces if s.group.scales)
    scale = np.ones((space.group.scales, space.size))
    scale[0] = factor
    return program.act({space: Element(np.arange(space.size), scale, space.identity().sign)})


def test_three_is_no_power_of_two() -> None:
    """Negative control: a scale that rounds is seen."""
    model = zoo.build("mlp_relu")
    before = outputs(model, "mlp_relu")
    wrong, right = (ir.to_proto(scaled_by(program_of(model), s).emit()) for s in (3.0, 4.0))
    assert 0 < largest_delta(before, outputs(wrong, "mlp_relu")) < 1e-5
    assert largest_delta(before, outputs(right, "mlp_relu")) == 0.0


def test_scaling_before_an_epsilon_rounds() -> None:
    """Negative control: the directions that `exact` marks do round, so `equalize` and `random` leave them alone."""
    model = zoo.build("batch_norm_relu")
    program = program_of(model)
    rng, wrong = np.random.default_rng(0), {}
    for space in program.spaces:
        scale = np.ldexp(1.0, rng.integers(-3, 4, (space.group.scales, space.size)))
        scale[np.asarray(space.exact)] = 1.0
        assert (scale != 1.0).any()
        wrong[space] = Element(np.arange(space.size), scale, space.identity().sign)
    moved = ir.to_proto(program.act(wrong).emit())
    assert largest_delta(outputs(model, "batch_norm_relu"), outputs(moved, "batch_norm_relu")) > 0


def test_largest_delta() -> None:
    a = [np.array([1.0, np.nan, np.inf], np.float32), np.array([3])]
    assert largest_delta(a, [x.copy() for x in a]) == 0.0
    assert largest_delta(a, [a[0], np.array([4])]) == 1.0
    assert largest_delta(a, [np.array([1.0, 0.0, np.inf], np.float32), a[1]]) == np.inf
    assert largest_delta(a, [a[0].astype(np.float64), a[1]]) == np.inf
    tiny = [a[0].copy(), a[1]]
    tiny[0][0] = np.nextafter(np.float32(1.0), np.float32(2.0))
    assert 0 < largest_delta(a, tiny) < 1e-6


def test_the_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["mlp_relu", "mlp_tanh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("mlp_relu")
    monkeypatch.setattr("tests.benchmarks.bit_exact_table.random_gauge", lambda program: scaled_by(program, 3.0))
    assert main(["mlp_relu"]) == 1
