"""The dependency order of the package, read off its import statements.

errors < algebra < ir < ops < symmetry < runtime < passes, frontends, backends < sources < api < sweeps < cli
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest
from tests.paths import ROOT

# Equal rank: neither may import the other, unless the pair (importer, imported) is in ALLOWED.
RANKS = {
    "errors": 0,
    "version": 0,
    "moved": 0,
    "progress_bar": 1,
    "algebra": 1,
    "ir": 2,
    "ops": 3,
    "symmetry": 4,
    "runtime": 5,
    "passes": 6,
    "frontends": 6,
    "backends": 6,
    "sources": 7,
    "api": 8,
    "sweeps": 9,
    "ir_passes": 9,
    "cli_shapes": 10,
    "cli_sweep": 10,
    "cli": 11,
    "__main__": 12,
}
ALLOWED: frozenset[tuple[str, str]] = frozenset()
TORCH_MODULES = ("cipm_ir.frontends.torch", "cipm_ir.backends.torch", "cipm_ir.runtime.torch_")
ALGEBRA_MAY_USE = frozenset({"numpy", *sys.stdlib_module_names})


@dataclass(frozen=True)
class Import:
    """One imported module, as written in `importer`, wherever the statement is."""

    importer: str
    target: str


def package_files(root: Path) -> dict[str, Path]:
    """Every module of cipm_ir below `root`, by dotted name, through the links."""
    files: dict[str, Path] = {}
    for folder, _, names in os.walk(root / "cipm_ir", followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(root).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_names(node: ast.Import | ast.ImportFrom, importer: str, is_package: bool, known: set[str]) -> list[str]:
    """The modules that a statement names: `from a import b` is a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = importer.split(".")
        kept = parts[: len(parts) - node.level + int(is_package)]
        base = ".".join([*kept, base] if base else kept)
    return [name if (name := f"{base}.{alias.name}") in known else base for alias in node.names]


def read_imports(files: dict[str, Path]) -> list[Import]:
    found = []
    for importer, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = imported_names(node, importer, path.name == "__init__.py", set(files))
            found += [Import(importer, target) for target in names]
    return found


def layer(module: str) -> str:
    """The part of a dotted name that has a rank; empty for cipm_ir itself."""
    return module.split(".")[1] if "." in module else ""


def order_faults(imports: Iterable[Import]) -> Iterator[str]:
    for one in imports:
        # The package's own __init__ gathers the public names from everywhere.
        if one.importer == "cipm_ir" or one.target.split(".")[0] != "cipm_ir":
            continue
        source, target = layer(one.importer), layer(one.target)
        if not target:
            yield f"{one.importer} imports from cipm_ir itself; import the module that defines the name"
        elif source not in RANKS or target not in RANKS:
            yield f"{one.importer} imports {one.target}: {source if source not in RANKS else target} has no rank"
        elif source != target and RANKS[target] >= RANKS[source] and (one.importer, one.target) not in ALLOWED:
            yield f"{one.importer} imports {one.target}: {target} is not below {source}"


def outside_faults(imports: Iterable[Import]) -> Iterator[str]:
    """Algebra needs numpy alone; torch is optional, so only the torch frontend and backend name it."""
    for one in imports:
        top = one.target.split(".")[0]
        if layer(one.importer) == "algebra" and top != "cipm_ir" and top not in ALGEBRA_MAY_USE:
            yield f"{one.importer} imports {top}: algebra may use numpy only"
        if top == "torch" and not one.importer.startswith(TORCH_MODULES):
            yield f"{one.importer} imports torch, which is optional"


def cycle_faults(imports: Iterable[Import]) -> Iterator[str]:
    """Files that import each other, be it for types alone or inside a function."""
    graph = nx.DiGraph([(one.importer, one.target) for one in imports])
    for group in nx.strongly_connected_components(graph):
        if len(group) > 1 or any(graph.has_edge(name, name) for name in group):
            yield "import cycle: " + ", ".join(sorted(group))


def faults(root: Path) -> list[str]:
    imports = read_imports(package_files(root))
    return sorted({*order_faults(imports), *outside_faults(imports), *cycle_faults(imports)})


def test_package_keeps_the_order() -> None:
    assert faults(ROOT) == []


def test_walk_goes_through_the_links() -> None:
    files = package_files(ROOT)
    assert {"cipm_ir", "cipm_ir.passes", "cipm_ir.frontends", "cipm_ir.backends", "cipm_ir.errors"} <= set(files)
    assert any(one.target == "cipm_ir.errors" for one in read_imports(files))


def write_tree(root: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        path = root / "cipm_ir" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")


def test_a_good_tree_has_no_faults(tmp_path: Path) -> None:
    sources = {
        "__init__.py": "from cipm_ir.api import load\n",
        "errors.py": "class E(Exception): ...\n",
        "algebra/group.py": "import math\nimport numpy as np\nfrom ..errors import E\n",
        "api.py": "def load():\n    from cipm_ir.algebra import group\n",
    }
    write_tree(tmp_path, sources)
    (tmp_path / "cipm_ir/__init__.py").write_text(sources["__init__.py"], encoding="utf-8")
    assert faults(tmp_path) == []


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"algebra/a.py": "from cipm_ir.ir import b\n", "ir/b.py": ""}, "ir is not below algebra"),
        ({"algebra/a.py": "from ..ir import b\n", "ir/b.py": ""}, "ir is not below algebra"),
        ({"ir/b.py": "def f():\n    import cipm_ir.api\n", "api.py": ""}, "api is not below ir"),
        ({"frontends/f.py": "from cipm_ir.passes import p\n", "passes/p.py": ""}, "passes is not below frontends"),
        ({"passes/p.py": "from cipm_ir import Program\n"}, "imports from cipm_ir itself"),
        ({"extras.py": "from cipm_ir import errors\n", "errors.py": ""}, "extras has no rank"),
        ({"algebra/a.py": "import scipy.sparse\n"}, "algebra may use numpy only"),
        ({"runtime/r.py": "try:\n    import torch\nexcept ImportError: ...\n"}, "torch, which is optional"),
        ({"ir/b.py": "from cipm_ir.ir import c\n", "ir/c.py": "from . import b\n"}, "import cycle"),
    ],
)
def test_a_fault_is_reported(tmp_path: Path, sources: dict[str, str], message: str) -> None:
    write_tree(tmp_path, sources)
    found = faults(tmp_path)
    assert len(found) == 1, found
    assert message in found[0]


def test_imports_for_types_alone_make_a_cycle_too(tmp_path: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cipm_ir.ir import b\n"
    write_tree(tmp_path, {"ir/b.py": "from cipm_ir.ir import c\n", "ir/c.py": guarded})
    assert faults(tmp_path) == ["import cycle: cipm_ir.ir.b, cipm_ir.ir.c"]
