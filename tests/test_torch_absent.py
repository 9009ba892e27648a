"""Everything that needs no torch works where torch and transformers are not installed; what does says how to get it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from tests import zoo

ROOT = Path(__file__).parents[1]
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
CLI = ABSENT + "from cipm_ir.cli import main\nsys.exit(main(sys.argv[1:]))\n"


def python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter with the checkout on its path; it is not in the checkout itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def cipm(*arguments: object, cwd: Path, code: int = 0) -> str:
    """What a command prints (stderr where it should fail)."""
    done = python(CLI, *arguments, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if code else done.stdout


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
    assert "@" in cipm("inspect", "a.onnx", cwd=folder)
    assert "@" in cipm("inspect", "a.onnx", "--spaces", cwd=folder)
    assert "recover-names  (" in cipm("passes", cwd=folder)
    assert "written: d.onnx" in cipm("optimize", "a.onnx", "-o", "d.onnx", "-p", "canonicalize", cwd=folder)
    assert "equal" in cipm("verify", "a.onnx", "d.onnx", cwd=folder)
    assert "There is no file" in cipm("inspect", "none.onnx", cwd=folder, code=2)


@pytest.mark.parametrize("source", ["net.pt2", "nets:build"])
def test_a_command_says_that_torch_is_needed(source: str, folder: Path) -> None:
    message = cipm("optimize", source, "-o", "out.pt2", cwd=folder, code=2)
    assert "torch" in message and PIP in message
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
