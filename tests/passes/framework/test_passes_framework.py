"""The pipeline: it verifies, measures, undoes what breaks its promise, and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from tests import zoo
from tests.paths import DIGITS

import cipm_ir
from cipm_ir.api import load, optimize
from cipm_ir.errors import InputError, OptionError, VerificationError
from cipm_ir.passes.framework import base, registry
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.pipeline import RolledBack, run_passes
from cipm_ir.passes.framework.report import as_plain
from cipm_ir.symmetry.program import Program


@registry.register("toy-idle")
@dataclass(frozen=True)
class Idle(Pass):
    """Does nothing."""

    names: tuple[str, ...] = ()

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult(program, False)


@registry.register("toy-scale")
@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies one weight: a broken exact pass, or an honest approximate one."""

    kind: ClassVar[Kind] = Kind.EXACT
    factor: float = 1.5
    weight: str = "stem.conv.weight"
    honest: bool = False

    def run(self, program: Program, ctx: Context) -> PassResult:
        array = weight_of(program, self.weight) * np.float32(self.factor)
        promise = Kind.APPROXIMATE if self.honest else None
        return PassResult(program.refit({self.weight: array}), True, "scaled", {"factor": self.factor}, kind=promise)


@registry.register("toy-move")
@dataclass(frozen=True)
class Move(Pass):
    """A random element on every space: exact."""

    ensures: ClassVar[frozenset[str]] = frozenset({"moved"})

    def run(self, program: Program, ctx: Context) -> PassResult:
        ctx.progress("drawing", 0.5)
        elements = {space: space.random(ctx.rng, power_of_two=True) for space in program.spaces}
        return PassResult(program.act(elements), witness={space.name: g for space, g in elements.items()})


@registry.register("toy-needs-moved")
@dataclass(frozen=True)
class NeedsMoved(Idle):
    """Runs only after toy-move."""

    requires: ClassVar[frozenset[str]] = frozenset({"moved"})


@registry.register("toy-bad")
@dataclass(frozen=True)
class Bad(Pass):
    """Breaks in the way that is asked for."""

    how: str = option("nothing", "", choices=("crash", "none", "shape", "error", "nothing"))

    def run(self, program: Program, ctx: Context) -> PassResult:
        if self.how == "crash":
            raise KeyError("oops")
        if self.how == "error":
            raise InputError("the weights are strange.")
        if self.how == "shape":
            model = program.emit()
            value = model.graph.initializers["block1.widen.conv.weight"]
            value.const_value = ir.tensor(np.zeros((48, 7, 3, 3), np.float32), name=value.name)
            value.shape = ir.Shape([48, 7, 3, 3])
            return PassResult(Program.of(model, origin=program.origin))
        return None if self.how == "none" else PassResult(program)  # type: ignore[return-value]


@registry.register("toy-look")
@dataclass(frozen=True)
class Look(Scale):
    """An analysis that writes, which it must not."""

    kind: ClassVar[Kind] = Kind.ANALYSIS


def weight_of(program: Program, name: str) -> np.ndarray[Any, Any]:
    tensor = program.model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.fixture(scope="module")
def program() -> Program:
    return load(DIGITS)


# --- pipeline -------------------------------------------------------------------------------------


def test_an_exact_pass_is_verified(program: Program) -> None:
    outcome = run_passes(program, "toy-move, toy-idle")
    move, idle = outcome.report.steps
    assert move.changed and move.checked == "verified" and move.verification is not None
    assert move.verification.max_rel < 1e-5 and move.verification.share <= 1
    assert not idle.changed and idle.error == 0.0
    assert outcome.witness[0].name == "toy-move" and set(outcome.witness[0].data) == {s.name for s in program.spaces}
    assert outcome.report.error == move.error
    assert outcome.program is not program


def test_a_broken_exact_pass_is_undone_and_named(program: Program) -> None:
    with pytest.raises(RolledBack, match=r"'toy-scale\{factor=1.001.*\}' was rolled back: it promised") as caught:
        run_passes(program, "toy-move, toy-scale{factor=1.001, weight=classifier.weight}")
    error = caught.value
    assert isinstance(error, VerificationError)
    assert [step.name for step in error.outcome.report.steps] == ["toy-move"]
    assert error.verification is not None and error.verification.max_abs > 0
    held = error.outcome.program
    assert np.array_equal(weight_of(held, "classifier.bias"), weight_of(program, "classifier.bias"))


def test_an_approximate_pass_is_measured(program: Program) -> None:
    (step,) = run_passes(program, [Scale(0.9, honest=True)]).report.steps
    assert step.kind == "approximate" and step.checked == "measured"
    assert step.error is not None and step.error > 1e-3


def test_nothing_is_run_without_verification(program: Program) -> None:
    report = run_passes(program, [Scale(0.9)], verify=False).report
    assert report.error is None and "verification is off" in report.checked
    assert "Not verified" in str(report)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("crash", KeyError, "oops"),
        ("none", OptionError, "not a PassResult"),
        ("shape", RolledBack, "made an invalid model"),
        ("error", InputError, "Pass 'toy-bad': the weights are strange"),
    ],
)
def test_faults_of_a_pass_are_named(program: Program, how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run_passes(program, [Bad(how)], verify=False)
    notes = " ".join(getattr(caught.value, "__notes__", ()))
    assert "toy-bad" in str(caught.value) + notes


def test_an_analysis_may_not_change_the_program(program: Program) -> None:
    with pytest.raises(RolledBack, match="analysis"):
        run_passes(program, [Look()])


def test_required_properties_are_checked_before_anything_runs(program: Program) -> None:
    with pytest.raises(OptionError, match=r"'toy-needs-moved' requires 'moved'"):
        run_passes(program, "toy-needs-moved")
    with pytest.raises(OptionError, match="requires"):
        run_passes(program, "toy-move, toy-scale, toy-needs-moved")
    assert len(run_passes(program, "toy-move, toy-needs-moved").report.steps) == 2


def test_same_seed_same_result(program: Program) -> None:
    def first(seed: int) -> np.ndarray[Any, Any]:
        return weight_of(run_passes(program, "toy-move", seed=seed, verify=False).program, "stem.conv.weight")

    assert np.array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))
    assert base.Context(seed=1, step=0).rng.random() != base.Context(seed=1, step=1).rng.random()


def test_progress_goes_from_nothing_to_done(program: Program) -> None:
    seen: list[tuple[str, float | None]] = []
    run_passes(program, "toy-move, toy-idle", verify=False, progress=lambda what, part: seen.append((what, part)))
    parts = [part for _, part in seen if part is not None]
    assert parts == sorted(parts) and parts[0] == 0.0 and parts[-1] == 1.0
    assert ("toy-move: drawing", 0.25) in seen


def test_data_is_used_and_checked_first(program: Program, rng: np.random.Generator) -> None:
    images = rng.standard_normal((4, 1, 8, 8)).astype(np.float32)

    def generator() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        yield {"images": images}

    # A generator can be read once, yet each pass and each comparison gets the data.
    report = run_passes(program, "toy-move, toy-move", data=generator()).report
    cases = [step.verification.cases for step in report.steps if step.verification is not None]
    (step,) = run_passes(program, "toy-move").report.steps
    assert step.verification is not None and report.verification is not None
    assert cases == [step.verification.cases + 1] * 2 and report.verification.cases == cases[0]
    with pytest.raises(InputError, match="no array for input 'images'"):
        run_passes(program, "toy-idle", data={"x": images, "y": images})
    with pytest.raises(InputError, match="no samples"):
        run_passes(program, "toy-idle", data=[])


def test_nan_and_contradicting_shapes_are_refused_at_the_start(program: Program) -> None:
    array = weight_of(program, "classifier.bias").copy()
    array[3] = np.nan
    with pytest.raises(InputError, match=r"'classifier\.bias' holds NaN"):
        run_passes(program.refit({"classifier.bias": array}), "toy-idle")


def test_a_model_without_kernel_is_reported_as_not_verified() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20, "my.domain" : 1]> g (float[N,4] x) => (float[N,4] y) '
    text += "<float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> { h = MatMul(x, w) y = my.domain.Odd(h) }"
    report = run_passes(load(ir.from_onnx_text(text)), [Scale(2.0, weight="w")]).report
    assert report.error is None
    assert report.steps[0].checked.startswith("not verified: ") and "Odd" in report.steps[0].checked
    assert "Not verified: " in str(report) and "opaque" in str(report)


# --- report ---------------------------------------------------------------------------------------


def test_report_is_plain_text_and_json(program: Program) -> None:
    report = run_passes(program, "toy-move, toy-idle{names=(a[0],)}").report
    text = str(report)
    assert "\x1b" not in text and "toy-idle{names=(a[0],)}" in text and "in all" in text
    assert max(map(len, text.splitlines())) <= 120
    made = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert made["before"]["parameters"] == program.parameters
    assert [step["name"] for step in made["passes"]] == ["toy-move", "toy-idle{names=(a[0],)}"]
    assert len(made["spaces"]) == len(program.spaces)


def test_the_table_says_how_much_of_the_rounding_a_pass_takes() -> None:
    report = optimize(zoo.build("batch_norm_relu"), ["fold-batch-norm"]).report
    found = report.steps[0].verification
    assert found is not None and 0 < found.share <= 1
    assert f"{found.max_abs:.2g} ({found.share:.0%})" in str(report)


def test_what_json_does_not_know_is_unwrapped() -> None:
    mixed = {1: np.float32(0.5), "a": np.arange(2), "b": math.inf, "c": (None, True), "d": Path("x")}
    assert as_plain(mixed) == {"1": 0.5, "a": [0, 1], "b": "inf", "c": [None, True], "d": "x"}


def test_a_defect_of_the_analysis_is_not_called_a_damaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Program) -> tuple[Any, ...]:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Program, "spaces", property(broken))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        load(DIGITS)


def test_steps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="cipm_ir"):
        cipm_ir.optimize(DIGITS, ["canonicalize", "clean-up"])
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "cipm_ir"]
    assert [level for level, text in said if text.startswith("canonicalize")] == ["INFO", "DEBUG"]
    assert any(level == "INFO" and text.startswith("clean-up") for level, text in said)


def test_nothing_is_printed_where_nobody_listens(capfd: pytest.CaptureFixture[str]) -> None:
    cipm_ir.optimize(DIGITS, ["canonicalize"])
    assert capfd.readouterr() == ("", "")
