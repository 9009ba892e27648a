"""The command line on torch programs: saved ones, and functions that build a module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from tests import zoo  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir import cli  # noqa: E402

Capture = pytest.CaptureFixture[str]

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

def build(seed=0):
    torch.manual_seed(seed)
    net = Net().eval()
    with torch.no_grad():
        net.bn.running_mean.normal_(0, 0.3)
        net.bn.weight.uniform_(0.5, 1.5)
    return net, (torch.randn(2, 3, 8, 8),)

def other():
    return build(1)

def bare():
    return Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: nets.py, net.pt2 and net.onnx."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS, encoding="utf-8")
    space: dict[str, Any] = {}
    exec(NETS, space)
    net, args = space["build"]()
    torch.export.save(torch.export.export(net, args), "net.pt2")
    onnx.save(zoo.build("mlp_relu"), "net.onnx")
    return tmp_path


def fails(words: list[str], capsys: Capture) -> str:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("cipm: ") and err.count("\n") == 1 and "Traceback" not in err and not out, err
    return str(err)


def works(words: list[str], capsys: Capture) -> str:
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert code == 0 and not err, err
    return str(out)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != "__pycache__"} - {"nets.py", "net.pt2", "net.onnx"}


SOURCES = ["net.pt2", "nets.py:build"]


@pytest.mark.parametrize("source", SOURCES)
def test_inspect(source: str, folder: Path, capsys: Capture) -> None:
    assert "Conv(" in works(["inspect", source], capsys)
    assert "units  12" in works(["inspect", source, "--spaces"], capsys)
    made = json.loads(works(["inspect", source, "--json"], capsys))
    assert made["opaque"] == [] and made["totals"]["parameters"] > 400
    works(["inspect", source, "--spaces", "--annotate", "a.onnx"], capsys)
    assert "cipm_ir.axes" in str(onnx.load("a.onnx").graph) and names(folder) == {"a.onnx"}


@pytest.mark.parametrize("source", SOURCES)
def test_optimize(source: str, folder: Path, capsys: Capture) -> None:
    before = (folder / "net.pt2").read_bytes()
    text = works(["optimize", source], capsys)
    assert "remove-dead" in text and "fold-batch-norm" not in text and "nothing written" in text
    assert names(folder) == set()
    words = ["optimize", source, "-p", "canonicalize", "-p", "prune{macs=0.6}", "--report", "r.json"]
    for out in ("small.pt2", "small.onnx"):
        text = works([*words, "-o", out], capsys)
        assert f"written: {out}" in text and "comes out as" in text
    assert names(folder) == {"r.json", "small.pt2", "small.onnx"}
    assert [step["name"] for step in json.loads(Path("r.json").read_text())["passes"]] == [
        "canonicalize",
        "prune{macs=0.6}",
    ]
    assert "equal" in works(["verify", "small.pt2", "small.onnx"], capsys)
    assert cli.main(["verify", source, "small.pt2"]) == 1
    assert (folder / "net.pt2").read_bytes() == before


def test_optimize_writes_a_plan(folder: Path, capsys: Capture) -> None:
    for out in ("small", "small/"):
        works(["optimize", "nets.py:build", "-p", "prune{macs=0.6}", "-o", out, "-q"], capsys)
    assert names(folder) == {"small"} and {p.name for p in Path("small").iterdir()} == {
        "plan.json",
        "model.safetensors",
    }
    space: dict[str, Any] = {}
    exec(NETS, space)
    assert cipm_ir.apply_plan(space["Net"](), "small").conv.out_channels < 12
    assert "ExportedProgram" in fails(["optimize", "net.pt2", "-o", "plan"], capsys)
    assert names(folder) == {"small"}


def test_a_module_by_its_name(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nets_of_the_command_test.py").write_text(NETS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    assert "units  12" in works(["inspect", "nets_of_the_command_test:build", "--spaces"], capsys)


def test_verify(folder: Path, capsys: Capture) -> None:
    assert "equal" in works(["verify", "net.pt2", "nets.py:build"], capsys)
    assert "equal" in works(["verify", "nets.py:build", "nets.py:build", "--cases", "1"], capsys)
    assert cli.main(["verify", "net.pt2", "nets.py:other"]) == 1
    assert "different" in capsys.readouterr().out
    assert cli.main(["verify", "net.pt2", "net.onnx"]) != 0


def test_onnx_to_torch(folder: Path, capsys: Capture) -> None:
    assert "written: a.pt2" in works(["optimize", "net.onnx", "-o", "a.pt2"], capsys)
    assert "equal" in works(["verify", "a.pt2", "net.onnx"], capsys)


@pytest.mark.parametrize("source", [*SOURCES, "net.onnx"])
@pytest.mark.parametrize("out", ["a.pth", "a.safetensors", "none/a.onnx", "net.pt2/a.pt2"])
def test_outputs_that_do_not_fit(source: str, out: str, folder: Path, capsys: Capture) -> None:
    assert repr(out) in fails(["optimize", source, "-o", out], capsys)
    assert names(folder) == set()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.pt2", "There is no file 'none.pt2'"),
        ("none.py:build", "There is no file 'none.py'"),
        ("no_such_module_at_all:build", "cannot be imported"),
        ("nets.py:none", "has no function 'none'"),
        ("nets.py:bare", "example_inputs"),
        ("nets.py", "nets.py"),
    ],
)
def test_bad_sources(source: str, message: str, folder: Path, capsys: Capture) -> None:
    assert message in fails(["optimize", source, "-o", "out.pt2"], capsys)
    assert message in fails(["inspect", source], capsys)
    assert message in fails(["verify", "net.onnx", source], capsys)
    assert names(folder) == set()


def test_help_names_the_kinds(capsys: Capture) -> None:
    for command in ("optimize", "inspect", "verify"):
        text = " ".join(works([command, "--help"], capsys).split())
        assert ".pt2" in text and "module:function" in text
