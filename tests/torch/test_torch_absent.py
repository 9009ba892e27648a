"""Everything that needs no torch works where torch and transformers are not installed; what does says how to get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from tests import zoo
from tests.paths import ROOT

PIP = 'pip install "cipm-ir[torch]"'

# As if the packages were not installed: the error that a missing package gives.
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
# Commands one after the other in one process: what each returns, prints and complains of.
CLI = (
    ABSENT
    + """
import contextlib, io, json
from cipm_ir.cli import main

said = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    said.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""
)


def python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter with the checkout on its path; it is not in the checkout itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def cipm(*commands: str, cwd: Path, code: int = 0) -> list[str]:
    """What each command prints (stderr where it should fail)."""
    done = python(CLI, json.dumps([command.split() for command in commands]), cwd=cwd)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for returned, _, errors in said:
        assert returned == code, errors
        assert "Traceback" not in errors, errors
    return [errors if code else out for _, out, errors in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, and what stands for a saved ExportedProgram and a module that builds a net."""
    made = tmp_path_factory.mktemp("absent")
    onnx.save(zoo.build("mlp_relu"), made / "a.onnx")
    (made / "net.pt2").write_bytes(b"PK\x03\x04 what is in it is not looked at")
    (made / "nets.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(2, 2)\n", encoding="utf-8")
    return made


@pytest.mark.parametrize("name", ["torch", "torch.nn", "transformers"])
def test_the_packages_are_absent(name: str, tmp_path: Path) -> None:
    """Control: the hook refuses what the other tests must not need."""
    done = python(ABSENT + f"import {name}", cwd=tmp_path)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


def test_python_interface(folder: Path) -> None:
    code = """
import cipm_ir
from cipm_ir import passes
program = cipm_ir.load("a.onnx")
assert program.spaces and str(program)
result = cipm_ir.optimize("a.onnx", ["clean-up", "canonicalize", passes.RecoverNames(), "prune{macs=0.8}"])
result.save("b.onnx")
assert cipm_ir.optimize("a.onnx", output="c.onnx").report and cipm_ir.verify("a.onnx", "c.onnx").ok
assert not cipm_ir.verify("a.onnx", "b.onnx").ok
assert cipm_ir.fingerprint("a.onnx") and all(hasattr(cipm_ir, name) for name in cipm_ir.__all__)
print([name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers")])
"""
    done = python(ABSENT + code, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_commands(folder: Path) -> None:
    inspected, spaces, passes, written, verified = cipm(
        "inspect a.onnx",
        "inspect a.onnx --spaces",
        "passes",
        "optimize a.onnx -o d.onnx -p canonicalize",
        "verify a.onnx d.onnx",
        cwd=folder,
    )
    assert "@" in inspected and "@" in spaces
    assert "recover-names  (" in passes
    assert "written: d.onnx" in written and "equal" in verified


def test_commands_say_that_torch_is_needed(folder: Path) -> None:
    missing, *messages = cipm(
        "inspect none.onnx", "optimize net.pt2 -o out.pt2", "optimize nets:build -o out.pt2", cwd=folder, code=2
    )
    assert "There is no file" in missing and PIP not in missing
    assert [message for message in messages if not ("torch" in message and PIP in message)] == []
    assert not (folder / "out.pt2").exists()


SOURCES = ("'net.pt2'", "pathlib.Path('net.pt2')", "'nets:build'", "Linear()", "type('Net', (Linear,), {})()")
CALLS = ("load(source)", "optimize(source, output='out.pt2')", "verify(source, 'a.onnx')", "fingerprint(source)")


def test_a_function_says_that_torch_is_needed(folder: Path) -> None:
    code = f"""
import pathlib
import cipm_ir
Linear = type("Linear", (), {{"__module__": "torch.nn.modules.linear"}})
for source in ({", ".join(SOURCES)}):
    for call in {CALLS}:
        try:
            eval("cipm_ir." + call)
        except cipm_ir.CipmError as error:
            print(type(error).__name__, error)
"""
    done = python(ABSENT + code, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(SOURCES) * len(CALLS)
    assert [line for line in lines if not (line.startswith("UnsupportedError") and PIP in line)] == []
    assert not (folder / "out.pt2").exists()
