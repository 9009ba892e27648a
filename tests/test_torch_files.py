"""Torch programs on disk: plans, .pt2 and .onnx, whole or not at all; and the functions that a command names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from onnx import numpy_helper  # noqa: E402
from tests import zoo  # noqa: E402
from tests.torch_zoo_base import seeded  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.backends import to_torch_files  # noqa: E402
from cipm_ir.frontends.from_torch_files import build, read_exported  # noqa: E402
from cipm_ir.runtime.session import Runner  # noqa: E402

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        return y


class Tied(nn.Module):
    """Two layers that share their weight, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.b(torch.relu(self.a(torch.relu(self.first(x)))))))
        return y


class OnlyTwelve(nn.Module):
    """Its forward runs with twelve units only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        y: Tensor = self.fc2(h.view(-1, 12) + torch.zeros(12))
        return y


def net(kind: Callable[[], nn.Module] = ConvNet) -> Any:
    return seeded(kind)


def pruned(kind: Callable[[], nn.Module] = ConvNet, x: Tensor = IMAGES) -> cipm_ir.Result:
    return cipm_ir.optimize(net(kind), "prune{macs=0.6}", example_inputs=(x,))


def close(a: Tensor, b: Tensor, bound: float = 2e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= bound * float(a.abs().max())


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_makes_the_same_module(tmp_path: Path) -> None:
    result = pruned()
    result.save(tmp_path / "small")
    assert listing(tmp_path) == ["small", "small/model.safetensors", "small/plan.json"]
    fresh = ConvNet()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    made = cipm_ir.apply_plan(fresh, tmp_path / "small")
    assert type(made) is ConvNet and made.conv.out_channels == made.bn.num_features == made.head.in_features < 12
    wanted = result.model.state_dict()
    assert list(made.state_dict()) == list(wanted)
    assert all(torch.equal(made.state_dict()[k], v) for k, v in wanted.items())
    assert torch.equal(made.eval()(IMAGES), result.model.eval()(IMAGES))
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items()) and fresh.conv.out_channels == 12


def test_what_a_plan_makes_is_trained(tmp_path: Path) -> None:
    pruned().save(tmp_path / "small")
    made = cipm_ir.apply_plan(ConvNet(), tmp_path / "small").train()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(IMAGES).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in made.parameters())
    old = made.conv.weight.clone()
    optimizer.step()
    assert not torch.equal(old, made.conv.weight) and int(made.bn.num_batches_tracked) == 1
    again = cipm_ir.apply_plan(ConvNet(), tmp_path / "small")
    assert torch.equal(old, again.conv.weight)  # tensors of its own


def test_training_before_saving_is_saved(tmp_path: Path) -> None:
    result = pruned()
    with torch.no_grad():
        result.model.head.bias.add_(1.0)
    result.save(tmp_path / "small")
    assert torch.equal(cipm_ir.apply_plan(ConvNet(), tmp_path / "small").head.bias, result.model.head.bias)


def test_a_folder_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "README").write_text("mine")
    pruned(Tied, X).save(tmp_path / "small")
    pruned().save(f"{tmp_path}/small/")
    assert listing(tmp_path) == ["small", "small/README", "small/model.safetensors", "small/plan.json"]
    assert isinstance(cipm_ir.apply_plan(ConvNet(), tmp_path / "small"), ConvNet)


def test_ties_stay(tmp_path: Path) -> None:
    result = pruned(Tied, X)
    assert result.model.a.weight is result.model.b.weight
    result.save(tmp_path / "small")
    made = cipm_ir.apply_plan(Tied(), tmp_path / "small")
    assert made.a.weight is made.b.weight
    assert torch.equal(made(X), result.model(X))


def test_slices_of_one_tensor_are_no_tie() -> None:
    module, whole = nn.Module(), torch.randn(8, 3)
    module.register_buffer("q", whole[:4])
    module.register_buffer("k", whole[4:])
    module.register_buffer("q_again", whole[:4])
    tensors, ties = to_torch_files._unique(module)
    assert ties == {"q_again": "q"} and torch.equal(tensors["k"], whole[4:])
    assert tensors["q"].untyped_storage().nbytes() == tensors["q"].nbytes


def test_bfloat16(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()

    result = pruned(build, X.bfloat16())
    result.save(tmp_path / "small")
    made = cipm_ir.apply_plan(build(), tmp_path / "small")
    assert made[0].weight.dtype == torch.bfloat16 and made[0].out_features < 16
    assert torch.equal(made(X.bfloat16()), result.model(X.bfloat16()))
    result.save(tmp_path / "small.pt2")
    assert torch.equal(read_exported(str(tmp_path / "small.pt2")).module()(X.bfloat16()), made(X.bfloat16()))
    result.save(tmp_path / "small.onnx")
    names = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(names)


def test_a_plan_for_another_model(tmp_path: Path) -> None:
    pruned().save(tmp_path / "small")
    with pytest.raises(cipm_ir.InputError, match=r"another model: 'conv\.weight' has shape none here"):
        cipm_ir.apply_plan(Tied(), tmp_path / "small")
    with pytest.raises(cipm_ir.InputError, match=r"'conv\.weight' has shape \[6, 3, 3, 3\] here and \[12, 3, 3, 3\]"):
        other = ConvNet()
        other.conv, other.bn, other.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)
        cipm_ir.apply_plan(other, tmp_path / "small")
    with pytest.raises(cipm_ir.InputError, match="not to int"):
        cipm_ir.apply_plan(3, tmp_path / "small")
    with pytest.raises(cipm_ir.InputError, match="meta device"), torch.device("meta"):
        cipm_ir.apply_plan(ConvNet(), tmp_path / "small")


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_json(folder: Path) -> None:
    (folder / "plan.json").write_text("{")


def a_list(folder: Path) -> None:
    (folder / "plan.json").write_text("[1]")


def other_format(folder: Path) -> None:
    edit(folder, format=99)


def no_attributes(folder: Path) -> None:
    edit(folder, attributes=None)


def strange_attributes(folder: Path) -> None:
    edit(folder, attributes={"no.such.layer": {"out_channels": 3}})


def one_tensor_less(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = str(folder / "model.safetensors")
    save_file({k: v for k, v in load_file(path).items() if k != "head.bias"}, path)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = [
    missing, no_weights, no_json, a_list, other_format, no_attributes, strange_attributes, one_tensor_less, truncated,
    empty,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan(damage: Callable[[Path], None], tmp_path: Path) -> None:
    pruned().save(tmp_path / "small")
    damage(tmp_path / "small")
    with pytest.raises(cipm_ir.InputError) as caught:
        cipm_ir.apply_plan(ConvNet(), tmp_path / "small")
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")


def test_a_graph_has_no_plan(tmp_path: Path) -> None:
    result = pruned(OnlyTwelve, X)
    assert isinstance(result.model, torch.fx.GraphModule) and "comes out as a GraphModule" in str(result.report)
    with pytest.raises(cipm_ir.UnsupportedError, match=r"keeps its class.*GraphModule.*\.pt2 or \.onnx"):
        result.save(tmp_path / "small")
    assert listing(tmp_path) == []
    result.save(tmp_path / "small.pt2")
    assert close(result.model(X), read_exported(str(tmp_path / "small.pt2")).module()(X))


# --- nothing half-written -------------------------------------------------------------------------


def full(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
def test_a_plan_is_whole_or_not_there(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, target = pruned(), tmp_path / "small"
    if existing:
        pruned(Tied, X).save(target)
    before = {p.name: p.read_bytes() for p in target.glob("*")}
    files = listing(tmp_path)
    rename, calls = to_torch_files.os.rename, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == (4 if existing else 1):
            full()
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(to_torch_files.os, "rename", second_fails)
        with pytest.raises(cipm_ir.OutputError, match="No space left on device; nothing was left behind"):
            result.save(target)
    assert listing(tmp_path) == files and {p.name: p.read_bytes() for p in target.glob("*")} == before
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(cipm_ir.OutputError, match="No space left"):
            result.save(target)
    assert listing(tmp_path) == files and {p.name: p.read_bytes() for p in target.glob("*")} == before


def test_an_exported_program_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, target = pruned(), tmp_path / "small.pt2"
    target.write_bytes(b"what was there")

    def half(program: Any, path: str) -> None:
        Path(path).write_bytes(b"PK")
        full()

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises(cipm_ir.OutputError, match="No space left on device"):
        result.save(target)
    assert listing(tmp_path) == ["small.pt2"] and target.read_bytes() == b"what was there"


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors", "a.txt", "none/a.pt2", "none/a.onnx", "none/a"])
def test_names_that_do_not_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = pruned()
    with pytest.raises(cipm_ir.OutputError, match=r"written as \.onnx|does not exist"):
        result.save(tmp_path / name)
    monkeypatch.setattr("cipm_ir.api.run_passes", lambda *_, **__: pytest.fail("the work was done first"))
    with pytest.raises(cipm_ir.OutputError):
        cipm_ir.optimize(net(), output=tmp_path / name, example_inputs=(IMAGES,))
    assert listing(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("a file")
    with pytest.raises(cipm_ir.OutputError, match="is a file"):
        pruned().save(tmp_path / "small")
    (tmp_path / "b.pt2").mkdir()
    with pytest.raises(cipm_ir.OutputError, match="is a folder"):
        pruned().save(tmp_path / "b.pt2")


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
