"""`compress` on torch programs: they come back as what they were, smaller, and near the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cipm_ir  # noqa: E402
from cipm_ir.errors import InputError, OptionError  # noqa: E402

FAST = "steps=3,min_keep=1,rounds=0"


def convnet(norm: bool = True) -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 12, 3, padding=1, bias=not norm), torch.nn.Conv2d(12, 10, 3, padding=1)]
    norms = [torch.nn.BatchNorm2d(12), torch.nn.Identity()] if norm else [torch.nn.Identity()] * 2
    made = torch.nn.Sequential(
        layers[0], norms[0], torch.nn.ReLU(), layers[1], norms[1], torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(10, 4),
    )  # fmt: skip
    if norm:
        made[1].running_mean.normal_()
        made[1].running_var.uniform_(0.5, 1.5)
    return made.eval()


def encoder() -> Any:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def relative(module: Any, other: Any, x: Any) -> float:
    with torch.no_grad():
        a, b = module(x), other(x)
    return float((a - b).square().mean() / a.var())


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("norm", [True, False])
def test_convnet_comes_back_smaller(norm: bool) -> None:
    module, x = convnet(norm), torch.randn(80, 3, 6, 6)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    program = cipm_ir.load(module, (x[:2],))
    name = program.model.graph.inputs[0].name or ""
    passes = [f"compress{{params=0.6,{FAST}}}"]
    result = cipm_ir.optimize(module, passes, data={name: x.numpy()}, example_inputs=(x[:2],))
    small = result.model
    assert type(small) is type(module) and parameters(small) <= 0.6 * parameters(module)
    fresh = torch.randn(60, 3, 6, 6)
    pruned = cipm_ir.optimize(module, ["prune{params=0.6,min_keep=1}"], example_inputs=(x[:2],)).model
    assert relative(module, small, fresh) < 0.5 * relative(module, pruned, fresh)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())  # the source is untouched
    small.train()
    small(fresh).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_transformer_encoder() -> None:
    module, x = encoder(), torch.randn(32, 7, 24)
    name = cipm_ir.load(module, (x[:2],)).model.graph.inputs[0].name or ""
    passes = [f"compress{{params=0.75,{FAST}}}"]
    result = cipm_ir.optimize(module, passes, data={name: x.numpy()}, example_inputs=(x[:2],))
    step = result.report.steps[-1]
    assert step.changed and result.program.parameters <= 0.75 * parameters(module)
    pruned = cipm_ir.optimize(module, ["prune{params=0.75,min_keep=1}"], example_inputs=(x[:2],)).model
    fresh = torch.randn(2, 7, 24)
    assert relative(module, result.model, fresh) < relative(module, pruned, fresh)
    with torch.no_grad():
        assert result.model(fresh).shape == (2, 7, 24)


def test_same_choice_as_its_onnx_export() -> None:
    """The torch program and the ONNX model of the same network keep the same units."""
    module, x = convnet(norm=False), torch.randn(60, 3, 6, 6)
    program = cipm_ir.load(module, (x[:2],))
    name = program.model.graph.inputs[0].name or ""
    passes = [f"compress{{params=0.6,{FAST}}}"]
    one = cipm_ir.optimize(module, passes, data={name: x.numpy()}, example_inputs=(x[:2],))
    two = cipm_ir.optimize(program.emit(), passes, data={name: x.numpy()})
    kept = [[k.tolist() for k in r.witness[-1].data["kept"].values()] for r in (one, two)]
    assert kept[0] == kept[1]


def test_free_batch_size() -> None:
    module, x = convnet(), torch.randn(50, 3, 6, 6)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (x[:2],), dynamic_shapes=({0: batch},))
    name = cipm_ir.load(exported).model.graph.inputs[0].name or ""
    result = cipm_ir.optimize(exported, [f"compress{{macs=0.6,{FAST}}}"], data={name: x.numpy()})
    assert result.program.macs <= 0.6 * cipm_ir.load(exported).macs
    assert result.model.module()(x[:5]).shape == (5, 4)


def test_without_data_or_with_the_wrong_name() -> None:
    module, x = convnet(), torch.randn(8, 3, 6, 6)
    with pytest.raises(OptionError, match="give it calibration inputs"):
        cipm_ir.optimize(module, ["compress{macs=0.6}"], example_inputs=(x[:2],))
    wrong = {"nothing": x.numpy(), "labels": np.zeros(8)}
    with pytest.raises(InputError, match="no array for input"):
        cipm_ir.optimize(module, ["compress{macs=0.6}"], data=wrong, example_inputs=(x[:2],))
    assert np.isfinite(module(x).detach().numpy()).all()
