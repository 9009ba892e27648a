"""Every Python example of the documentation runs, page by page, and prints what the page shows."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.paths import DIGITS, ROOT

from cipm_ir.ops import load_rules, registry
from cipm_ir.passes.framework import registry as pass_registry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the Python examples of a page, each with what it is said to print."""
    found = [(m[1], m[2], m.start(), m.end()) for m in _FENCE.finditer(text)]
    for (kind, code, _, end), (after, shown, start, _) in itertools.pairwise([*found, ("", "", 0, 0)]):
        if kind == "python":
            yield code, shown if after == "text" and not text[end:start].strip() else None


def run_page(text: str) -> list[tuple[str, str]]:
    """Run the examples of a page in order, in one namespace; return (printed, shown) for those with output."""
    names: dict[str, Any] = {"__name__": "__main__"}
    pairs = []
    for code, shown in blocks(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "example", "exec", dont_inherit=True), names)
        if shown is not None:
            pairs.append((out.getvalue(), shown))
    return pairs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of; rules and passes of the examples are forgotten afterwards."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    shutil.copy(DIGITS, tmp_path / "model.onnx")
    images = (digits.images[:1500] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(tmp_path / "calib.npz", images=images)
    monkeypatch.chdir(tmp_path)
    load_rules()
    pass_registry.listing()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(pass_registry, "_PASSES", dict(pass_registry._PASSES))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_and_print_what_the_page_shows(page: Path, folder: Path) -> None:
    for printed, shown in run_page(page.read_text(encoding="utf-8")):
        assert printed.strip() == shown.strip()


def test_control_wrong_output_and_wrong_code_are_seen(folder: Path) -> None:
    ((printed, shown),) = run_page("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    assert printed.strip() == "2" and shown.strip() == "3"
    with pytest.raises(NameError):
        run_page("```python\nprint(nothing)\n```\n")
    assert list(blocks("```python\nx = 1\n```\nand then\n```text\n3\n```\n")) == [("x = 1\n", None)]


def test_pages_are_listed_and_links_lead_somewhere() -> None:
    pages = ROOT / "docs" / "pages"
    listed = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    for page in pages.rglob("*.md"):
        assert page.relative_to(pages).as_posix() in listed, page
