"""The package as it is installed, and as it lies in the checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.paths import ROOT

LINKED = ("passes", "frontends", "backends")
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "cipm_ir", *LINKED)
MAX_LINES = 800

# Refuses torch for everything that is imported after it, as if it were not installed.
BLOCK_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, Refuse())
"""


def run_python(code: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that looks for modules in `path` first."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def modules(root: Path) -> set[str]:
    """Every file of the package below `root`, as it must appear in a wheel."""
    return {
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root / "cipm_ir", followlinks=True)
        for name in names
        if name.endswith(".py") or name == "py.typed"
    }


def unlisted_packages(root: Path, listed: set[str]) -> set[str]:
    """Folders with an __init__.py that pyproject.toml does not name."""
    found = {name.removesuffix("/__init__.py").replace("/", ".") for name in modules(root) if "__init__" in name}
    return found - listed


def listed_packages() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(settings["tool"]["setuptools"]["packages"])


def long_files(folders: list[Path], limit: int = MAX_LINES) -> Iterator[str]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > limit:
                yield f"{path.name}: {lines} lines"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout gets no build folders and lends none."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("name", LINKED)
def test_link_leads_to_the_folder_at_the_root(name: str) -> None:
    link = ROOT / "cipm_ir" / name
    assert link.is_symlink(), f"cipm_ir/{name} is no link; on Windows clone with core.symlinks=true"
    assert link.readlink() == Path("..", name)
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


@pytest.mark.parametrize("name", LINKED)
def test_bare_name_is_refused(name: str) -> None:
    done = run_python(f"import {name}", ROOT, ROOT)
    assert done.returncode == 1
    assert f"ImportError: import cipm_ir.{name}" in done.stderr


@pytest.mark.parametrize("name", LINKED)
def test_full_name_is_imported_from_the_checkout(name: str) -> None:
    done = run_python(f"import cipm_ir.{name} as m; print(m.__file__)", ROOT, ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(ROOT / name / "__init__.py")


def test_every_package_is_listed() -> None:
    assert unlisted_packages(ROOT, listed_packages()) == set()


def test_unlisted_package_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "cipm_ir" / "extra").mkdir(parents=True)
    (tmp_path / "cipm_ir" / "extra" / "__init__.py").touch()
    assert unlisted_packages(tmp_path, listed_packages()) == {"cipm_ir.extra"}


def test_wheel_holds_every_module_and_nothing_bare(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules(ROOT)
    assert {f"cipm_ir/{name}/__init__.py" for name in LINKED} <= names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_file,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(entry_file).decode())
    assert entries["console_scripts"]["cipm"] == "cipm_ir.cli:main"
    # That group is for other packages: built-in passes in it would register twice.
    assert "cipm_ir.passes" not in entries
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


@pytest.mark.parametrize("name", LINKED)
def test_wheel_is_imported_from_outside_the_checkout(installed: Path, tmp_path: Path, name: str) -> None:
    done = run_python(f"import cipm_ir.{name} as m; print(m.__file__)", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "cipm_ir" / name / "__init__.py"


def needs_torch(name: str) -> bool:
    return name.startswith(("cipm_ir/frontends/torch/", "cipm_ir/backends/torch/", "cipm_ir/runtime/torch_"))


def test_every_module_is_imported_without_torch() -> None:
    names = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in modules(ROOT)
        if name.endswith(".py") and not name.endswith("__main__.py") and not needs_torch(name)
    )
    assert len(names) >= len(listed_packages())
    loaded = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = run_python(BLOCK_TORCH + loaded, ROOT, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_blocked_torch_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "needs_torch.py").write_text("import torch.nn\n", encoding="utf-8")
    done = run_python(BLOCK_TORCH + "import needs_torch", tmp_path, tmp_path)
    assert done.returncode == 1
    assert "torch is blocked" in done.stderr


def test_files_are_short() -> None:
    folders = [ROOT / "cipm_ir", *(ROOT / name for name in LINKED), ROOT / "tests", ROOT / "examples"]
    assert list(long_files(folders)) == []


def test_long_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("x = 1\n" * MAX_LINES, encoding="utf-8")
    (tmp_path / "long.py").write_text("x = 1\n" * (MAX_LINES + 1), encoding="utf-8")
    assert list(long_files([tmp_path])) == [f"long.py: {MAX_LINES + 1} lines"]
