"""load, optimize, verify: what comes in goes out as the same kind, the source is untouched, errors are clear."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.paths import ROOT

import cipm_ir
from cipm_ir.backends.onnx import save as to_onnx
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult
from cipm_ir.passes.framework.registry import register

DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
FOLD = "fold-batch-norm"


@register("api-break")
@dataclass(frozen=True)
class Break(Pass):
    """Claims to be exact, and doubles a weight."""

    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, program: cipm_ir.Program, ctx: Context) -> PassResult:
        tensor = program.model.graph.initializers["classifier.weight"].const_value
        assert tensor is not None
        return PassResult(program.refit({"classifier.weight": tensor.numpy() * 2}))


def operators(model: ir.Model | onnx.ModelProto) -> list[str]:
    nodes = model.graph.node if isinstance(model, onnx.ModelProto) else model.graph
    return [node.op_type for node in nodes]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- import ---------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    for name in cipm_ir.__all__:
        assert getattr(cipm_ir, name) is not None
    assert set(cipm_ir.__all__) <= set(dir(cipm_ir))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cipm_ir.nothing


def test_import_is_light() -> None:
    code = "import sys, cipm_ir; print(sorted({'onnx', 'onnxruntime', 'onnxscript', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_onnxscript_is_imported_by_the_passes_that_need_it_alone() -> None:
    code = "import sys, cipm_ir.api; print('onnxscript' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_version_is_the_one_of_the_project() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert cipm_ir.__version__ == settings["project"]["version"]


# --- kinds ----------------------------------------------------------------------------------------


def test_path_in_model_out(tmp_path: Path) -> None:
    before = DIGITS.read_bytes()
    target = tmp_path / "small.onnx"
    result = cipm_ir.optimize(DIGITS, FOLD, output=target)
    assert isinstance(result.model, ir.Model) and "BatchNormalization" not in operators(result.model)
    assert cipm_ir.verify(DIGITS, target)
    assert names(tmp_path) == ["small.onnx"] and DIGITS.read_bytes() == before
    assert result.report.after.parameters < result.report.before.parameters


def test_proto_in_proto_out() -> None:
    proto = onnx.load(DIGITS)
    before = proto.SerializeToString(deterministic=True)
    result = cipm_ir.optimize(proto, [FOLD])
    assert isinstance(result.model, onnx.ModelProto) and "BatchNormalization" not in operators(result.model)
    onnx.checker.check_model(result.model, full_check=True)
    assert proto.SerializeToString(deterministic=True) == before


def test_ir_in_ir_out(tmp_path: Path) -> None:
    model = ir.load(DIGITS)
    before = operators(model)
    result = cipm_ir.optimize(model, FOLD)
    assert isinstance(result.model, ir.Model) and operators(model) == before
    result.save(tmp_path / "a.onnx")
    assert cipm_ir.verify(model, tmp_path / "a.onnx")


def test_program_in(tmp_path: Path) -> None:
    program = cipm_ir.load(DIGITS)
    result = cipm_ir.optimize(program, FOLD, output=tmp_path / "a.onnx")
    assert cipm_ir.verify(program, result.program)
    program.save(str(tmp_path / "b.onnx"))
    assert cipm_ir.verify(program, tmp_path / "b.onnx").max_abs == 0


def test_no_pass_changes_nothing(tmp_path: Path) -> None:
    result = cipm_ir.optimize(DIGITS, [], output=tmp_path / "same.onnx")
    assert result.report.error == 0 and not result.report.steps and not result.witness
    assert onnx.load(tmp_path / "same.onnx") == onnx.load(DIGITS)


def test_external_data_stays_external(tmp_path: Path) -> None:
    onnx.save_model(
        onnx.load(DIGITS), tmp_path / "in.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    kept = {name: (tmp_path / name).read_bytes() for name in ("in.onnx", "w.bin")}
    cipm_ir.optimize(tmp_path / "in.onnx", FOLD, output=tmp_path / "out.onnx")
    assert names(tmp_path) == ["in.onnx", "out.onnx", "out.onnx.data", "w.bin"]
    assert cipm_ir.verify(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    cipm_ir.optimize(tmp_path / "out.onnx", [], output=tmp_path / "out.onnx")
    assert cipm_ir.verify(tmp_path / "in.onnx", tmp_path / "out.onnx")


def test_annotated_result(tmp_path: Path) -> None:
    result = cipm_ir.optimize(DIGITS, FOLD, annotate=True, output=tmp_path / "a.onnx")
    assert isinstance(result.model, ir.Model)
    written = onnx.load(tmp_path / "a.onnx")
    notes = {entry.key: entry.value for entry in written.metadata_props}
    assert "@block1.widen.conv : 48" in notes["cipm_ir.spaces"]
    assert "48:@block1.widen.conv" in str(written.graph) and "@block1" not in str(onnx.load(DIGITS).graph)


@pytest.mark.parametrize("source", [3, None, ["a.onnx"], np.zeros(3)])
def test_other_things_are_refused(source: Any) -> None:
    with pytest.raises(cipm_ir.InputError, match="A model is a path"):
        cipm_ir.load(source)


def test_torch_is_told_by_its_class() -> None:
    """Without importing torch; what its objects then need is said by the frontend, or that torch is not installed."""
    fake = type("Linear", (), {"__module__": "torch.nn.modules.linear"})
    with pytest.raises(cipm_ir.UnsupportedError, match=r"torch"):
        cipm_ir.load(fake())
    with pytest.raises(cipm_ir.UnsupportedError, match="torch"):
        cipm_ir.load(type("Net", (fake,), {})())


# --- failures -------------------------------------------------------------------------------------


def test_nothing_is_written_when_a_pass_breaks_the_model(tmp_path: Path) -> None:
    with pytest.raises(cipm_ir.VerificationError, match="'api-break' was rolled back"):
        cipm_ir.optimize(DIGITS, [FOLD, "api-break"], output=tmp_path / "a.onnx", on_failure="raise")
    assert names(tmp_path) == []


def test_a_pass_that_breaks_the_model_is_left_out(tmp_path: Path) -> None:
    result = cipm_ir.optimize(DIGITS, ["api-break", FOLD, "api-break"], output=tmp_path / "a.onnx")
    report = result.report
    broken, folded, again = report.steps
    assert broken.skipped and again.skipped and not folded.skipped and folded.changed and not broken.changed
    assert len(report.skipped) == 2 and report.to_dict()["skipped"] == list(report.skipped)
    assert broken.verification is not None and broken.verification.ok is False
    assert "left out: it promised equal outputs, but" in str(report)
    assert cipm_ir.verify(DIGITS, tmp_path / "a.onnx")
    assert len(result.witness) == 1 and report.verification is not None and report.verification.ok


@pytest.mark.parametrize(("option", "value"), [("on_failure", "ignore"), ("verify", "sometimes")])
def test_other_words_are_refused(option: str, value: str) -> None:
    settings: dict[str, Any] = {option: value}
    with pytest.raises(cipm_ir.OptionError, match=option):
        cipm_ir.optimize(DIGITS, FOLD, **settings)


def test_tolerances_can_be_set() -> None:
    assert not cipm_ir.optimize(DIGITS, "api-break", rtol=10.0).report.skipped
    assert cipm_ir.optimize(DIGITS, FOLD, rtol=0.0, atol=0.0).report.skipped


def test_strict_leaves_out_what_cannot_be_run() -> None:
    """A model with an operator that nothing here can run."""
    model = onnx.load(DIGITS)
    node = onnx.helper.make_node("Fancy", [model.graph.output[0].name], ["fancy"], domain="com.example")
    model.graph.node.append(node)
    model.graph.output[0].name = "fancy"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    (loose,) = cipm_ir.optimize(model, FOLD).report.steps
    assert loose.changed and "not verified" in loose.checked
    (strict,) = cipm_ir.optimize(model, FOLD, verify="strict").report.steps
    assert strict.skipped and "could not be verified" in strict.checked


def test_bad_output_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cipm_ir.api.run_passes", lambda *_, **__: pytest.fail("the work was done first"))
    with pytest.raises(cipm_ir.OutputError, match="does not exist"):
        cipm_ir.optimize(DIGITS, FOLD, output=tmp_path / "no" / "a.onnx")
    with pytest.raises(cipm_ir.OutputError, match="is a folder"):
        cipm_ir.optimize(DIGITS, FOLD, output=tmp_path)


def test_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.onnx"
    target.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_onnx, "_write_proto", full)
    with pytest.raises(cipm_ir.OutputError, match="No space left"):
        cipm_ir.optimize(DIGITS, FOLD, output=target)
    assert names(tmp_path) == ["a.onnx"] and target.read_bytes() == b"before"


# --- verify ---------------------------------------------------------------------------------------


def test_verify_tells_models_apart() -> None:
    program = cipm_ir.load(DIGITS)
    tensor = program.model.graph.initializers["classifier.bias"].const_value
    assert tensor is not None
    other = program.refit({"classifier.bias": tensor.numpy() + np.float32(0.01)})
    found = cipm_ir.verify(program, other)
    assert not found and found.verified and found.max_abs == pytest.approx(0.01, rel=1e-3)
    assert cipm_ir.verify(program, other, atol=0.02)
    assert cipm_ir.verify(program, program, cases=1).cases == 1


def test_verify_takes_data(rng: np.random.Generator) -> None:
    images = rng.standard_normal((5, 1, 8, 8)).astype(np.float32)
    own = cipm_ir.verify(DIGITS, DIGITS).cases
    assert cipm_ir.verify(DIGITS, DIGITS, data={"images": images}).cases == 1 + own
    with pytest.raises(cipm_ir.InputError, match="no array for input"):
        cipm_ir.verify(DIGITS, DIGITS, data={"other": images, "labels": images})


# --- fingerprint ----------------------------------------------------------------------------------


def test_fingerprint_is_of_the_function_not_of_the_gauge(rng: np.random.Generator) -> None:
    program = cipm_ir.load(DIGITS)
    moved = program.act({space: space.random(rng, power_of_two=True) for space in program.spaces})
    assert cipm_ir.fingerprint(DIGITS) == cipm_ir.fingerprint(onnx.load(DIGITS)) == cipm_ir.fingerprint(moved)
    tensor = program.model.graph.initializers["classifier.bias"].const_value
    assert tensor is not None
    bias = tensor.numpy().copy()
    bias[3] = np.nextafter(bias[3], np.float32(9))
    assert cipm_ir.fingerprint(program.refit({"classifier.bias": bias})) != cipm_ir.fingerprint(program)
