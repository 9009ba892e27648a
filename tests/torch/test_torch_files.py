"""Torch programs as .pt2 and .onnx, ONNX models in torch, and the functions that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from onnx import numpy_helper  # noqa: E402
from tests import zoo  # noqa: E402
from tests.torch.torch_saved import IMAGES, ConvNet, Tied, X, close, listing, net  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.frontends.torch.files import build, read_exported  # noqa: E402
from cipm_ir.runtime.session import Runner  # noqa: E402

# --- .pt2 -----------------------------------------------------------------------------------------


def dynamic_batch() -> Any:
    return {"x": {0: torch.export.Dim("batch", min=2, max=64)}}


@pytest.mark.parametrize("kind", ["module", "graph", "exported"])
def test_exported_program(kind: str, tmp_path: Path) -> None:
    source, options = net(), {"example_inputs": (IMAGES,), "dynamic_shapes": dynamic_batch()}
    if kind == "graph":
        source, options = torch.fx.symbolic_trace(source), {"example_inputs": (IMAGES,)}
    elif kind == "exported":
        source, options = torch.export.export(source, (IMAGES,), dynamic_shapes=dynamic_batch()), {}
    result = cipm_ir.optimize(source, "prune{macs=0.6}", **options)
    result.save(tmp_path / "small.pt2")
    assert listing(tmp_path) == ["small.pt2"]
    made, model = read_exported(str(tmp_path / "small.pt2")).module(), result.model
    run = model.module() if kind == "exported" else model
    for batch in (2, 5) if kind != "graph" else (2,):
        x = torch.randn(batch, 3, 8, 8)
        assert close(run(x), made(x))
    assert cipm_ir.verify(model, tmp_path / "small.pt2", example_inputs=(IMAGES,))
    again = cipm_ir.load(tmp_path / "small.pt2")
    assert again.macs < cipm_ir.load(net(), (IMAGES,)).macs


def test_junk_is_no_exported_program(tmp_path: Path) -> None:
    with pytest.raises(cipm_ir.InputError, match="There is no file"):
        cipm_ir.load(tmp_path / "none.pt2")
    for content in (b"", b"junk" * 99, b"PK\x03\x04 no archive"):
        (tmp_path / "junk.pt2").write_bytes(content)
        with pytest.raises(cipm_ir.InputError, match=r"not a program saved by torch\.export\.save") as caught:
            cipm_ir.load(tmp_path / "junk.pt2")
        assert "\n" not in str(caught.value)
    torch.save({"weight": X}, tmp_path / "state.pt2")
    with pytest.raises(cipm_ir.InputError, match=r"not a program saved"):
        cipm_ir.load(tmp_path / "state.pt2")


# --- .onnx ----------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Layers with equal weights, as a transformer has before training."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(6, 10), nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        y: Tensor = self.head(self.norm(x))
        return y


@pytest.mark.parametrize(("kind", "x"), [(ConvNet, IMAGES), (Tied, X), (Deep, X)])
def test_onnx_has_the_names(kind: Any, x: Tensor, tmp_path: Path) -> None:
    module = net(kind)
    if kind is Deep:
        with torch.no_grad():
            module.blocks[2].weight.copy_(module.blocks[1].weight)
    result = cipm_ir.optimize(module, "prune{macs=0.7}", example_inputs=(x,))
    result.save(tmp_path / "small.onnx")
    assert listing(tmp_path) == ["small.onnx"]
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    state = {k: v.numpy() for k, v in result.model.state_dict().items() if v.ndim}
    names = set(state) & set(held)
    assert len(set(state) - names) == (1 if kind is Tied else 0)  # the exporter keeps one name of a tensor
    assert all(np.array_equal(state[name], held[name]) for name in names)
    with Runner(cipm_ir.load(tmp_path / "small.onnx").emit()) as runner:
        got = next(iter(runner.run({onnx.load(tmp_path / "small.onnx").graph.input[0].name: x.numpy()}).values()))
    assert close(result.model(x).detach(), torch.from_numpy(got))
    assert not result.model.training


def test_verify_across(tmp_path: Path) -> None:
    module = net()
    cipm_ir.optimize(module, "canonicalize", example_inputs=(IMAGES,)).save(tmp_path / "a.onnx")
    found = cipm_ir.verify(module, tmp_path / "a.onnx", example_inputs=(IMAGES,))
    assert found and found.cases >= 1
    with torch.no_grad():
        module.head.weight[0, 0] += 0.5
    assert cipm_ir.verify(module, tmp_path / "a.onnx", example_inputs=(IMAGES,)).ok is False
    assert cipm_ir.verify(tmp_path / "a.onnx", module, example_inputs=(IMAGES,)).ok is False


# --- ONNX to torch --------------------------------------------------------------------------------


def test_onnx_as_a_graph_module(tmp_path: Path) -> None:
    onnx.save(zoo.build("mlp_relu"), tmp_path / "a.onnx")
    made = cipm_ir.to_torch(tmp_path / "a.onnx")
    assert isinstance(made, torch.fx.GraphModule) and not made.training
    value = cipm_ir.load(tmp_path / "a.onnx").model.graph.inputs[0]
    sizes = [d if isinstance(d, int) else 3 for d in value.shape or ()]
    assert cipm_ir.verify(made, tmp_path / "a.onnx", example_inputs=(torch.randn(sizes),))
    with torch.no_grad():
        next(made.parameters()).add_(0.5)
    assert cipm_ir.verify(made, tmp_path / "a.onnx", example_inputs=(torch.randn(sizes),)).ok is False


def test_onnx_as_an_exported_program(tmp_path: Path) -> None:
    onnx.save(zoo.build("mlp_relu"), tmp_path / "a.onnx")
    result = cipm_ir.optimize(tmp_path / "a.onnx", "canonicalize", output=tmp_path / "a.pt2")
    assert listing(tmp_path) == ["a.onnx", "a.pt2"] and result.report.to_dict()["max_abs"] < 1e-4
    assert cipm_ir.verify(tmp_path / "a.pt2", tmp_path / "a.onnx")
    with pytest.raises(cipm_ir.OutputError, match=r"\.onnx, or as \.pt2"):
        cipm_ir.optimize(tmp_path / "a.onnx", output=tmp_path / "a.pth")


def test_a_torch_program_as_a_graph_module() -> None:
    made = cipm_ir.to_torch(net(), example_inputs=(IMAGES,))
    assert isinstance(made, torch.fx.GraphModule) and close(net()(IMAGES), made(IMAGES))


# --- functions that build a program ---------------------------------------------------------------

NETS = """
import torch
from torch import nn

X = torch.zeros(3, 6)

def both():
    return nn.Linear(6, 4), (X,)

def bare():
    return nn.Linear(6, 4)

def tensor():
    return nn.Linear(6, 4), X

def named():
    return nn.Linear(6, 4), (), {"input": X}

def exported():
    return torch.export.export(nn.Linear(6, 4), (X,))

def nothing():
    return None

def number():
    return nn.Linear(6, 4), 3

def four():
    return nn.Linear(6, 4), (X,), {}, 1

def no_module():
    return "net", (X,)

def fails():
    raise KeyError("weights")

def needs(x):
    return x

value = 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["both", "tensor", "named", "exported"])
def test_build(name: str, nets: Path) -> None:
    program, args, kwargs = build(f"{nets}:{name}")
    assert isinstance(program, nn.Module if name != "exported" else torch.export.ExportedProgram)
    assert len(args) + len(kwargs) == (0 if name == "exported" else 1)
    assert cipm_ir.load(f"{nets}:{name}").opaque == ()


def test_build_takes_the_examples_that_are_given(nets: Path) -> None:
    assert cipm_ir.load(f"{nets}:bare", (torch.zeros(2, 6),)).spaces == ()
    with pytest.raises(cipm_ir.InputError, match="example_inputs"):
        cipm_ir.load(f"{nets}:bare")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "has no function 'none'"),
        ("value", "has no function 'value'"),
        ("fails", "failed: KeyError: 'weights'"),
        ("needs", "failed: TypeError"),
        ("nothing", "gives a NoneType, not a torch program"),
        ("no_module", "gives a str, not a torch program"),
        ("number", "must give a program"),
        ("four", "must give a program"),
    ],
)
def test_build_says_what_is_wrong(name: str, message: str, nets: Path) -> None:
    with pytest.raises(cipm_ir.InputError, match=message):
        cipm_ir.load(f"{nets}:{name}")


def test_build_from_modules(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "odd.py").write_text("def (:\n")
    (tmp_path / "built_nets_of_the_test.py").write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cipm_ir.load("built_nets_of_the_test:both").opaque == ()
    for spec in ("no_such_module_at_all:f", "broken:f", f"{tmp_path}/broken.py:f", f"{tmp_path}/odd.py:f"):
        with pytest.raises(cipm_ir.InputError, match="cannot be imported"):
            cipm_ir.load(spec)
    with pytest.raises(cipm_ir.InputError, match="There is no file"):
        cipm_ir.load(f"{tmp_path}/none.py:f")
