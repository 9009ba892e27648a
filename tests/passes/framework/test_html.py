"""The HTML report: one file that loads nothing, shows every picture, and is written whole or not at all."""

from __future__ import annotations

import builtins
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.planted import planted

import cipm_ir
from cipm_ir.cli import main
from cipm_ir.errors import OutputError, UnsupportedError
from cipm_ir.passes import Bars, Curves, HeatMap, Rows
from cipm_ir.passes.framework.figures import pooled
from cipm_ir.passes.framework.html import draw, render

VOID = {"meta", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Counts tags, keeps text and every address, and fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report() -> Any:
    pytest.importorskip("matplotlib")
    net = planted(noise=0.05)
    return cipm_ir.optimize(net.model, passes=["cluster{by=weights, scale=aligned}"], data=net.data).report


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_page_is_self_contained(report: Any) -> None:
    page = Page(render(report, "a <model> & more"))
    assert page.tags["figure"] == len(report.steps[0].figures) == 3 + 3 + 2
    assert page.tags["img"] == 2 * 5
    assert all(one.startswith(("data:image/png;base64,", "#")) for one in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags
    assert "a <model> & more" in page.text and report.steps[0].summary in page.text
    assert "cluster{by=weights, scale=aligned}" in page.text


def test_the_parser_sees_what_does_not_close() -> None:
    with pytest.raises(AssertionError):
        Page("<div><p></div>")
    assert Page('<img src="http://elsewhere">').addresses == ["http://elsewhere"]


def test_the_same_report_gives_the_same_page(report: Any) -> None:
    assert render(report) == render(report)


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    signed = draw(HeatMap("t", np.linspace(-1, 1, 12).reshape(3, 4), note="a < b"))
    assert signed.count("<img") == 1 and "a &lt; b" in signed
    both = draw(HeatMap("t", np.eye(4), np.ones((4, 4)), (0.25, 0.5)))
    assert both.count("<img") == 2 and both.count("<svg") == 1 and "M0 0.25" in both
    bars = draw(Bars("mass <x>", ["a", "b"], {"before": [1, 2], "after": [2, 3]}, "share"))
    assert "<svg" in bars and "after" in bars and "share" in bars and "mass &lt;x&gt;" in bars
    assert "accuracy" in draw(Curves("c", "MACs", "accuracy", {"ours": ([0.5, 1.0], [90, 92])}))
    for empty in (HeatMap("t", np.zeros((2, 2))), Bars("t", [], {}), Curves("t", "x", "y", {})):
        Page(draw(empty))


def test_a_table_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = draw(Rows("t", ["space", "bits"], [["@a<b", "1.5"]], note="n"))
    assert "<td class=text>@a&lt;b</td><td>1.5</td>" in made and "<small>n</small>" in made
    with pytest.raises(UnsupportedError):
        draw(Bars("t", ["a"], {"x": [1]}))


def test_pooled_keeps_means() -> None:
    matrix = np.arange(600.0 * 20).reshape(600, 20)
    small = pooled(matrix, 100)
    assert small.shape == (100, 20)
    assert np.allclose(small[0], matrix[:6].mean(axis=0))
    assert np.allclose(pooled(np.ones((1000, 1001)), 64), 1.0)
    assert np.array_equal(pooled(np.eye(5)), np.eye(5))


def test_written_whole_or_not_at_all(report: Any, tmp_path: Path) -> None:
    report.to_html(tmp_path / "out.html", "model")
    assert Page((tmp_path / "out.html").read_text()).tags["h1"] == 1
    with pytest.raises(OutputError, match="was not written"):
        report.to_html(tmp_path / "no folder" / "out.html")
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]


def test_without_matplotlib(report: Any, tmp_path: Path, without_matplotlib: None) -> None:
    with pytest.raises(UnsupportedError, match=r"pip install 'cipm-ir\[html\]'"):
        report.to_html(tmp_path / "out.html")
    assert not list(tmp_path.iterdir())
    plain = cipm_ir.optimize(planted().model, passes=["canonicalize"]).report
    plain.to_html(tmp_path / "out.html")  # no pictures, so nothing is missing
    assert "canonicalize" in (tmp_path / "out.html").read_text()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "in.onnx").write_bytes(planted().model.SerializeToString())
    html = tmp_path / "report.html"
    given = ["optimize", str(tmp_path / "in.onnx"), "-p", "cluster{by=weights}", "--html", str(html)]
    assert main(given) == 0
    page = Page(html.read_text())
    assert "in.onnx" in page.text and re.search(r"12 modules", page.text)
    assert main([*given[:-1], str(tmp_path / "no folder" / "x.html")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_command_line_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_matplotlib: None
) -> None:
    (tmp_path / "in.onnx").write_bytes(planted().model.SerializeToString())
    out = tmp_path / "out.onnx"
    given = ["optimize", str(tmp_path / "in.onnx"), "-p", "cluster", "-o", str(out), "--html", str(tmp_path / "r.html")]
    assert main(given) == 2
    assert "cipm-ir[html]" in capsys.readouterr().err
    assert not out.exists()
