"""Plans: a folder that makes a module of the original class the small one; written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from onnx import numpy_helper  # noqa: E402
from tests.torch.torch_saved import IMAGES, ConvNet, OnlyTwelve, Tied, X, close, listing, net, pruned  # noqa: E402
from torch import nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.backends.torch import files as to_torch_files  # noqa: E402
from cipm_ir.frontends.torch.files import read_exported  # noqa: E402

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
    rename, calls = os.rename, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == (4 if existing else 1):
            full()
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
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
