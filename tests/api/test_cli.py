"""The command line: exit codes, one clear sentence for every bad input, nothing left behind, the input untouched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.paths import ROOT

import cipm_ir
from cipm_ir import cli
from cipm_ir.backends.onnx import save as to_onnx

DIGITS = ROOT / "examples" / "digits" / "digits.onnx"

Capture = pytest.CaptureFixture[str]


def fails(arguments: list[str | Path], capsys: Capture, code: int = 2) -> str:
    """The sentence on stderr of a command that fails."""
    assert cli.main([str(word) for word in arguments]) == code
    out, err = capsys.readouterr()
    assert err.startswith("cipm: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert err.rstrip().endswith((".", "?")) and not out
    return err


def works(arguments: list[str | Path], capsys: Capture) -> str:
    assert cli.main([str(word) for word in arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- commands -------------------------------------------------------------------------------------


def test_inspect_shows_the_graph(capsys: Capture) -> None:
    program = cipm_ir.load(DIGITS)
    costs = f"// {program.parameters:,} parameters, {program.macs:,} multiply-accumulates (MACs)"
    summary = works(["inspect", DIGITS, "--summary"], capsys)
    assert summary.splitlines()[:3] == [
        "// 29 nodes, 7 that multiply by weights (6 Conv, 1 Gemm)",
        costs,
        "// MACs are counted at batch=1",
    ]
    assert summary.splitlines()[3].startswith("// spaces: 4 of units (192 free units)")
    assert works(["inspect", DIGITS, "--full"], capsys) == f"{summary}{program}\n"
    assert works(["inspect", DIGITS], capsys) == f"{summary}{program.text(fold=True)}\n"


def test_inspect_shows_the_spaces(capsys: Capture) -> None:
    program = cipm_ir.load(DIGITS)
    lines = works(["inspect", DIGITS, "--spaces"], capsys).splitlines()
    assert len([line for line in lines if line.startswith("@")]) == len(program.spaces)
    assert any(line.split()[:3] == ["@down.conv", "units", "64"] for line in lines)


def test_inspect_writes_json(capsys: Capture) -> None:
    made = json.loads(works(["inspect", DIGITS, "--json"], capsys))
    program = cipm_ir.load(DIGITS)
    assert made["totals"]["macs"] == program.macs
    assert [space["name"] for space in made["spaces"]] == [space.name for space in program.spaces]


def test_inspect_annotates_a_copy(capsys: Capture, tmp_path: Path) -> None:
    works(["inspect", DIGITS, "--spaces", "--annotate", tmp_path / "a.onnx"], capsys)
    assert "cipm_ir.axes" in str(onnx.load(tmp_path / "a.onnx").graph)
    assert cipm_ir.verify(DIGITS, tmp_path / "a.onnx").max_abs == 0


def test_optimize_writes_model_and_report(capsys: Capture, tmp_path: Path) -> None:
    before = DIGITS.read_bytes()
    out, report = tmp_path / "small.onnx", tmp_path / "report.json"
    text = works(["optimize", DIGITS, "-o", out, "-p", "clean-up", "-p", "fold-batch-norm", "--report", report], capsys)
    assert "fold-batch-norm" in text and "(original)" in text and f"written: {out}" in text
    made = json.loads(report.read_text(encoding="utf-8"))
    assert [step["name"] for step in made["passes"]] == ["clean-up", "fold-batch-norm"]
    assert made["verification"]["ok"] and made["verification"]["max_rel"] < 1e-5 and made["max_abs"] < 1e-2
    assert sorted(contents(tmp_path)) == ["report.json", "small.onnx"]
    assert DIGITS.read_bytes() == before
    assert "equal" in works(["verify", DIGITS, out], capsys)


def test_optimize_without_output_says_so(capsys: Capture) -> None:
    assert "nothing written" in works(["optimize", DIGITS, "-p", "fold-batch-norm"], capsys)
    assert works(["optimize", DIGITS, "-p", "fold-batch-norm", "-q"], capsys) == ""


def test_optimize_default_pipeline(capsys: Capture) -> None:
    text = works(["optimize", DIGITS], capsys)
    assert all(name in text for name in ("clean-up", "fold-affine", "remove-dead"))


def test_optimize_without_verification(capsys: Capture) -> None:
    assert "verification is off" in works(["optimize", DIGITS, "-p", "fold-batch-norm", "--no-verify"], capsys)


def test_a_pass_that_was_left_out_shows_in_the_exit_code(capsys: Capture, tmp_path: Path) -> None:
    """A tolerance of 0 is more than folding can keep."""
    out, words = tmp_path / "a.onnx", ["-p", "fold-batch-norm", "--rtol", "0"]
    assert cli.main(["optimize", str(DIGITS), "-o", str(out), *words]) == 1
    shown = capsys.readouterr()
    assert "left out" in shown.out and "left out: fold-batch-norm" in shown.err and out.exists()
    out.unlink()
    assert cli.main(["optimize", str(DIGITS), "-o", str(out), *words, "--on-failure", "raise"]) == 2
    assert "rolled back" in capsys.readouterr().err and not out.exists()


def test_optimize_with_data(capsys: Capture, tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "data.npz", images=rng.standard_normal((4, 1, 8, 8)).astype(np.float32))
    report = tmp_path / "r.json"
    works(
        ["optimize", DIGITS, "-p", "fold-batch-norm", "--data", tmp_path / "data.npz", "--report", report, "-q"], capsys
    )
    assert json.loads(report.read_text(encoding="utf-8"))["verification"]["cases"] > 4
    assert "no data file" in fails(["optimize", DIGITS, "--data", tmp_path / "none.npz"], capsys)
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    assert "not an .npz" in fails(["verify", DIGITS, DIGITS, "--data", tmp_path / "bad.npz"], capsys)


def test_verify_tells_models_apart_by_its_exit_code(capsys: Capture, tmp_path: Path) -> None:
    proto = onnx.load(DIGITS)
    for tensor in proto.graph.initializer:
        if tensor.name == "classifier.bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.1), tensor.name))
    onnx.save(proto, tmp_path / "b.onnx")
    assert cli.main(["verify", str(DIGITS), str(tmp_path / "b.onnx")]) == 1
    assert "different" in capsys.readouterr().out
    assert "equal" in works(["verify", DIGITS, tmp_path / "b.onnx", "--atol", "0.2", "--cases", "1"], capsys)


def test_passes_are_listed(capsys: Capture) -> None:
    text = works(["passes"], capsys)
    for name in ("canonicalize", "clean-up", "fold-batch-norm", "prune", "remove-dead"):
        assert f"{name}  (" in text
    assert "input_size_limit: " in text and "(default 8192)" in text


def test_version_and_help(capsys: Capture) -> None:
    assert works(["--version"], capsys) == f"cipm {cipm_ir.__version__}\n"
    for command in ([], ["optimize"], ["inspect"], ["verify"], ["passes"]):
        assert "Usage: cipm" in works([*command, "--help"], capsys)
    assert cli.main([]) == 2


# --- bad input ------------------------------------------------------------------------------------


def chain(w: np.ndarray[Any, Any] | None = None, order: bool = True, shape: tuple[int, ...] = (8, 3)) -> Any:
    """y = relu(x w) v with x [N, 4], w [4, 8], v [8, 3]."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a" if order else "y"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    weights = {"w": np.ones((4, 8), np.float32) if w is None else w, "v": np.ones(shape, np.float32)}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def missing(path: Path) -> None:
    path.with_name("other").touch()


def not_protobuf(path: Path) -> None:
    path.write_bytes(b"This is no model.\n" * 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.mkdir()


def truncated(path: Path) -> None:
    path.write_bytes(DIGITS.read_bytes()[:200_000])


def missing_external(path: Path) -> None:
    onnx.save_model(chain(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    path.with_name("w.bin").unlink()


def short_external(path: Path) -> None:
    onnx.save_model(chain(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    path.with_name("w.bin").write_bytes(b"\0" * 5)


def wrong_shapes(path: Path) -> None:
    onnx.save(chain(shape=(7, 3)), path)


def wrong_shapes_behind_a_reshape(path: Path) -> None:
    """Shape inference does not know the size that the Gemm gets."""
    proto = onnx.load(DIGITS)
    for tensor in proto.graph.initializer:
        if tensor.name == "classifier.weight":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((10, 7), np.float32), tensor.name))
    onnx.save(proto, path)


def cyclic(path: Path) -> None:
    onnx.save(chain(order=False), path)


def nan_weights(path: Path) -> None:
    weight = np.ones((4, 8), np.float32)
    weight[2, 5] = np.nan
    onnx.save(chain(weight), path)


BAD: dict[Callable[[Path], None], str] = {
    missing: "There is no file",
    not_protobuf: "not an ONNX model",
    empty: "empty file",
    folder: "is a folder",
    truncated: "truncated",
    missing_external: "w.bin",
    short_external: "w.bin",
    wrong_shapes: "contradict",
    wrong_shapes_behind_a_reshape: "entries meet at node",
    cyclic: "",
    nan_weights: "NaN",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_model(make: Callable[[Path], None], capsys: Capture, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    model = source / "model.onnx"
    make(model)
    before = contents(source)
    err = fails(["optimize", model, "-o", out / "o.onnx", "--report", out / "r.json", "-p", "clean-up"], capsys)
    assert BAD[make] in err and len(err) < 500
    assert contents(source) == before and not contents(out)
    if make is not nan_weights:
        assert BAD[make] in fails(["inspect", model], capsys)
    if make not in (nan_weights, wrong_shapes_behind_a_reshape):
        assert BAD[make] in fails(["verify", DIGITS, model], capsys)


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("prun", ["'prun'", "did you mean prune?"]),
        ("fold-batch-norm{a=1}", ["'fold-batch-norm'", "'a'", "none"]),
        ("clean-up{input_size_limit=0}", ["'clean-up'", "'input_size_limit'", "at least 1"]),
        ("clean-up{input_size_limit=x}", ["'input_size_limit'", "a whole number", "'x'"]),
        ("clean-up{", ["column 10"]),
        ("", ["name of a pass"]),
    ],
)
def test_bad_pass(passes: str, words: list[str], capsys: Capture, tmp_path: Path) -> None:
    err = fails(["optimize", DIGITS, "-o", tmp_path / "o.onnx", "-p", passes], capsys)
    assert all(word in err for word in words), err
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command"),
        (["optimize"], "Missing argument"),
        (["optimize", DIGITS, "--colour"], "No such option"),
        (["optimize", DIGITS, "--seed", "x"], "--seed"),
        (["optimize", DIGITS, "--seed", "-1"], "--seed"),
        (["verify", DIGITS], "Missing argument"),
        (["verify", DIGITS, DIGITS, "--cases", "0"], "--cases"),
        (["verify", DIGITS, DIGITS, "--rtol", "-1"], "--rtol"),
    ],
)
def test_bad_usage(arguments: list[str | Path], words: str, capsys: Capture) -> None:
    assert words in fails(arguments, capsys)


def test_output_that_cannot_be_written(capsys: Capture, tmp_path: Path) -> None:
    for option in ("-o", "--report"):
        assert "does not exist" in fails(["optimize", DIGITS, option, tmp_path / "no" / "o"], capsys)
        assert "is a folder" in fails(["optimize", DIGITS, option, tmp_path], capsys)
    assert "does not exist" in fails(["inspect", DIGITS, "--annotate", tmp_path / "no" / "o.onnx"], capsys)
    assert not contents(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(capsys: Capture, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "ermission" in fails(["optimize", DIGITS, "-o", tmp_path / "o.onnx", "-p", "clean-up"], capsys)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_full_disk(code: int, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    report = tmp_path / "r.json"
    report.write_text("before", encoding="utf-8")
    command: list[str | Path] = ["optimize", DIGITS, "-p", "clean-up", "-o", tmp_path / "o.onnx", "--report", report]
    with monkeypatch.context() as patch:
        patch.setattr(to_onnx, "_write_proto", fail)
        assert os.strerror(code) in fails(command, capsys)
    assert contents(tmp_path) == {"r.json": b"before"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        assert os.strerror(code) in fails(command, capsys)
    assert contents(tmp_path) == {"r.json": b"before"}


# --- the rest of the exit codes -------------------------------------------------------------------


def test_a_defect_is_one_sentence_with_a_hint(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> Iterator[None]:
        raise ZeroDivisionError("by nought\nand more")

    monkeypatch.setattr("cipm_ir.api.load", crash)
    err = fails(["inspect", DIGITS], capsys, code=3)
    assert "ZeroDivisionError: by nought." in err and "--debug" in err
    assert cli.main(["inspect", str(DIGITS), "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_a_bad_input_was_found(capsys: Capture) -> None:
    assert cli.main(["--debug", "inspect", "missing.onnx"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("cipm: There is no file")


def test_stopping_is_no_defect(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cipm_ir.api.load", stop)
    assert "Stopped" in fails(["inspect", DIGITS], capsys, code=130)


def run(arguments: list[str], stdout: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "cipm_ir.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment})


def test_closed_stdout_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(["inspect", str(DIGITS)], writer)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_stdout_is_one_sentence() -> None:
    with open("/dev/full", "wb") as full:
        done = run(["inspect", str(DIGITS)], full)
    assert done.returncode == 2 and b"No space left" in done.stderr and done.stderr.count(b"\n") == 1


def test_terminal_without_unicode() -> None:
    done = run(["optimize", str(DIGITS), "-p", "fold-batch-norm"], subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"max |?|" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "spec",
    [
        "prune{macs=0.5}",
        "compress{macs=0.5}",
        "fold{ratio=0.5}",
        "absorb-bias{observed=true}",
        "remove-dead{never_firing=true}",
    ],
)
def test_an_approximate_pass_needs_somewhere_to_go(spec: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before the work: nothing is loaded."""
    monkeypatch.setattr("cipm_ir.api.optimize", lambda *_, **__: pytest.fail("the work began"))
    err = fails(["optimize", DIGITS, "-p", "clean-up", "-p", spec], capsys)
    assert spec.split("{")[0] in err and "-o OUT.onnx" in err and "--dry-run" in err


def test_a_dry_run_shows_the_report(capsys: Capture, tmp_path: Path) -> None:
    words: list[str | Path] = ["optimize", DIGITS, "-p", "prune{macs=0.5}"]
    assert "units" in works([*words, "--dry-run"], capsys)
    works([*words, "--report", tmp_path / "r.json", "-q"], capsys)
    assert (tmp_path / "r.json").exists()
    assert "--dry-run" in fails([*words, "--dry-run", "-o", tmp_path / "o.onnx"], capsys)
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("name", ["out.txt", "out.json", "out.ort", "out.pth", "out.onnx.gz", "out.npz"])
def test_a_suffix_that_is_no_model_is_refused_before_the_work(
    name: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cipm_ir.api.optimize", lambda *_, **__: pytest.fail("the work began"))
    assert "is written as .onnx" in fails(["optimize", DIGITS, "-p", "clean-up", "-o", tmp_path / name], capsys)


@pytest.mark.parametrize("name", ["out.onnx", "out.ONNX", "out.pb", "out"])
def test_a_name_of_a_model_is_taken(name: str, capsys: Capture, tmp_path: Path) -> None:
    """Control of the suffixes."""
    works(["optimize", DIGITS, "-p", "clean-up", "-o", tmp_path / name, "-q"], capsys)
    assert cipm_ir.load(tmp_path / name).macs == cipm_ir.load(DIGITS).macs


def test_groups_are_written_into_onnx_files_only(capsys: Capture, tmp_path: Path) -> None:
    for name in ("a.txt", "a.pt2"):
        assert "onnx" in fails(["inspect", DIGITS, "--annotate", tmp_path / name], capsys)


def test_brackets_around_options_are_an_error(capsys: Capture, tmp_path: Path) -> None:
    err = fails(["optimize", DIGITS, "-p", "prune(macs=0.5)", "-o", tmp_path / "o.onnx"], capsys)
    assert "write 'prune{macs=0.5}'" in err
