"""Torch programs that cannot be read, in whole or in part: a clear sentence or an opaque node, nothing half-changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.torch import torch_zoo  # noqa: E402
from tests.torch.torch_zoo_base import output_tensors, seeded  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cipm_ir  # noqa: E402

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def mlp() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)))


def snapshot(module: nn.Module) -> Any:
    """Everything of a module that could be changed: tensors by value and identity, attributes, modes."""
    tensors = {}
    for name, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        plain = t.detach().to_dense() if t.layout != torch.strided else t.detach()
        plain = plain.int_repr() if plain.is_quantized else plain
        known = None if plain.is_meta else plain.clone().view(-1).tolist()
        tensors[name] = (id(t), str(t.dtype), tuple(t.shape), t.requires_grad, str(known))
    attributes = {
        (path, key): copy.copy(value)
        for path, m in module.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, bool | int | float | str | tuple)
    }
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in module.named_modules()}
    return tensors, attributes, hooks


def refused(
    source: Any, args: Any, kwargs: Any, kind: type[cipm_ir.CipmError], message: str, folder: Path, **options: Any
) -> None:
    before = snapshot(source) if isinstance(source, nn.Module) else None
    with pytest.raises(kind, match=message) as caught:
        cipm_ir.optimize(
            source, "canonicalize", output=folder / "out.pt2", example_inputs=args, example_kwargs=kwargs, **options
        )
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 700, text
    assert before is None or snapshot(source) == before
    assert list(folder.iterdir()) == []


# --- a clear sentence -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (None, None, r"Sequential is a torch module: give example_inputs=\(x,\)"),
        ((), {}, "give example_inputs"),
        ((torch.randn(3, 7),), None, r"does not run with the example inputs.*3x7 and 6x12"),
        ((X, X), None, "does not run with the example inputs.*takes 2 positional arguments"),
        (("text",), None, "does not run with the example inputs.*must be Tensor"),
        ((X,), {"other": 3}, "does not run with the example inputs.*'other'"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "export", "symbolic"])
def test_example_inputs(args: Any, kwargs: Any, message: str, method: str, tmp_path: Path) -> None:
    refused(mlp(), args, kwargs, cipm_ir.InputError, message, tmp_path, method=method)


def test_a_graph_module_without_shapes(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(mlp())
    refused(graph, None, None, cipm_ir.InputError, r"no shapes.*example_inputs", tmp_path)
    refused(graph, (torch.randn(3, 7),), None, cipm_ir.InputError, "does not run with the example inputs", tmp_path)
    refused(graph, (X, X), None, cipm_ir.InputError, "takes 1 inputs, but 2", tmp_path)


@pytest.mark.parametrize("name", ["bad_control_flow", "bad_data_size", "bad_numpy"])
def test_what_depends_on_data(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = torch_zoo.case(name)
    args, kwargs = case.inputs()
    message = r"cannot be made a graph: symbolic_trace: .*torch\.export: .*Rewrite what depends on the values"
    refused(case.build(), args, kwargs, cipm_ir.UnsupportedError, message, tmp_path)
    assert capfd.readouterr().err == ""


def test_sparse_parameters(tmp_path: Path) -> None:
    case = torch_zoo.case("sparse_adjacency")
    args, kwargs = case.inputs()
    refused(case.build(), args, kwargs, cipm_ir.UnsupportedError, r"'adjacency' is a sparse_coo tensor", tmp_path)


def test_dynamically_quantized_layers(tmp_path: Path) -> None:
    try:
        module = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    except RuntimeError as error:
        pytest.skip(f"torch has no quantized engine here: {error}")
    refused(module, (X,), None, cipm_ir.CipmError, "quantized", tmp_path)


def test_meta_tensors(tmp_path: Path) -> None:
    module = mlp().to("meta")
    for x in (X, X.to("meta")):
        refused(module, (x,), None, cipm_ir.InputError, "on the meta device, which holds no numbers", tmp_path)


def test_scripted_modules(tmp_path: Path) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1: Any = torch.jit.script(nn.Linear(6, 12))
            self.fc2 = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc2(torch.relu(self.fc1(x)))

    for module in (torch.jit.script(mlp()), torch.jit.trace(mlp(), (X,))):
        refused(module, (X,), None, cipm_ir.UnsupportedError, "is a scripted module", tmp_path)
    inside: Any = Inside()
    refused(inside, (X,), None, cipm_ir.UnsupportedError, "'fc1' is scripted", tmp_path)


def test_inputs_that_are_not_dense(tmp_path: Path) -> None:
    parts = [torch.randn(2, 6), torch.randn(3, 6)]
    for x in (torch.nested.nested_tensor(parts), torch.nested.nested_tensor(parts, layout=torch.jagged)):
        refused(mlp(), (x,), None, cipm_ir.UnsupportedError, "Example input 0 is a nested tensor", tmp_path)
        refused(mlp(), None, {"input": x}, cipm_ir.UnsupportedError, "Example input 'input' is a nested", tmp_path)
    refused(mlp(), (X.to_sparse(),), None, cipm_ir.UnsupportedError, "is a sparse_coo tensor", tmp_path)


def test_parameters_without_a_shape(tmp_path: Path) -> None:
    module: Any = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(cipm_ir.InputError, match="run the model once"):
        cipm_ir.load(module, (X,))
    assert module[0].has_uninitialized_params()


def test_damaged_weights(tmp_path: Path) -> None:
    module = mlp()
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    refused(module, (X,), None, cipm_ir.InputError, r"'0\.weight' holds", tmp_path)


def test_options(tmp_path: Path) -> None:
    refused(mlp(), (X,), None, cipm_ir.OptionError, "no method 'magic'", tmp_path, method="magic")
    shapes = {"other": {0: torch.export.Dim("n")}}
    refused(mlp(), (X,), None, cipm_ir.CipmError, "other", tmp_path, dynamic_shapes=shapes)


@pytest.mark.parametrize("source", [X, nn.Parameter(X), nn.Linear, mlp().state_dict(), torch.relu])
def test_what_is_no_program(source: Any) -> None:
    with pytest.raises(cipm_ir.CipmError, match=r"not a torch program|A model is a path"):
        cipm_ir.load(source, (X,))


# --- a clean opaque -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "opaque"),
    [
        ("bad_autograd_function", ""),
        ("bad_sort", ""),
        ("bad_training_branch", ""),
        ("bad_unused", ""),
        ("complex_parameters", ""),
        ("complex_linear", "complex numbers"),
        ("quantized_weight", ""),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_computation_stays(name: str, opaque: str, training: bool) -> None:
    if name == "bad_training_branch" and training:
        pytest.skip("it draws random numbers in training mode, so that no two runs agree")
    case = torch_zoo.case(name)
    module, (args, kwargs) = case.build().train(training), case.inputs()
    before = snapshot(module)
    result = cipm_ir.optimize(module, "canonicalize", example_inputs=args, example_kwargs=kwargs)
    assert snapshot(module) == before
    assert result.model.training is training or isinstance(result.model, torch.fx.GraphModule)
    assert opaque in " ".join(map(str, result.program.opaque))
    reference, made = copy.deepcopy(module).eval(), result.model.eval()
    with torch.no_grad():
        pairs = zip(output_tensors(reference(*args, **kwargs)), output_tensors(made(*args, **kwargs)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in pairs)


def failing(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch: patch.setattr(torch.export, "save", failing),
        lambda patch: patch.setattr("cipm_ir.backends.torch.origin.emit_rewritten", failing),
    ],
)
def test_a_failure_on_the_way_changes_nothing(
    spoil: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mlp().train()
    before = snapshot(module)
    spoil(monkeypatch)
    with pytest.raises((cipm_ir.CipmError, OSError)):
        cipm_ir.optimize(module, "canonicalize", output=tmp_path / "out.pt2", example_inputs=(X,))
    assert snapshot(module) == before and list(tmp_path.iterdir()) == []


def test_the_snapshot_notices_a_change() -> None:
    """Control of the checks above."""
    for change in (
        lambda m: m[0].weight.data.mul_(2),
        lambda m: m.train(),
        lambda m: setattr(m[0], "out_features", 3),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach())),
    ):
        module = mlp()
        before = snapshot(module)
        change(module)
        assert snapshot(module) != before
