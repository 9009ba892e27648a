"""The torch test models are what the tests take them for: seeded, in eval mode, nothing fresh, reading their input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models of this zoo are torch modules")

from tests.torch.torch_zoo import CASES, TorchCase, case, names, output_tensors  # noqa: E402
from tests.torch.torch_zoo_base import floats, randomize, seeded  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# With an even kernel, "same" pads one side more: that is what the case is for.
# Quantized tensors are on their way out of torch, but files hold them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]
MARKS = {name: [pytest.mark.models] if "hf" in one.tags else [] for name, one in CASES.items()}
ALL = [pytest.param(name, id=name, marks=marks) for name, marks in MARKS.items()]
REFUSALS = (TypeError, ValueError, RuntimeError, SyntaxError)
"""What symbolic_trace raises on a model that it cannot follow, or the graph that it made when it is run."""
RIGHT_AT_LEAST = 0.86
"""Of 200 test images; the trained network is right on 91.7% of all."""


def fetch(name: str) -> TorchCase:
    """The case, or a skip where it needs a library that is missing."""
    if "hf" in case(name).tags:
        pytest.importorskip("transformers", reason="a model of that library")
    return case(name)


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(model(*args, **kwargs))


def changed(value: Any) -> Any:
    """Another input of the same kind: noise on numbers, integers mirrored within their range."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return 0.5 * value + torch.randn(value.shape, generator=generator)
    return value.max() - value + value.min()


def faults(one: TorchCase) -> Iterator[str]:
    """What keeps a case from being a fair test model."""
    model = one.build()
    first, again = outputs(model, *one.inputs()), outputs(one.build(), *one.inputs())
    if not first or not all(tensor.isfinite().all() for tensor in first):
        yield "has no output, or none that is finite"
    if len(first) != len(again) or not all(map(torch.equal, first, again)):
        yield "is not the same when built and run again"
    if any(module.training for module in model.modules()):
        yield "is not in eval mode"
    args, kwargs = one.inputs()
    other = outputs(model, tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()})
    for number, (before, after) in enumerate(zip(first, other, strict=True)):
        if before.shape == after.shape and (before - after).abs().max() < 1e-2 * before.abs().max():
            yield f"output {number} hardly depends on the input"
    yield from stale(model)


def stale(model: nn.Module) -> Iterator[str]:
    """Parameters and statistics that still have the value that torch gives to fresh ones."""
    statistics = [(name, value) for name, value in model.named_buffers() if "running_" in name]
    for name, value in [*model.named_parameters(), *statistics]:
        if bool((value == 0).all()) or bool((value == 1).all()):
            yield f"{name} has only zeros or ones"


@pytest.mark.parametrize("name", ALL)
def test_is_a_fair_model(name: str) -> None:
    state = torch.get_rng_state()
    assert list(faults(fetch(name))) == []
    assert torch.equal(state, torch.get_rng_state()), "building or running drew from the global generator"


@pytest.mark.parametrize("name", ALL)
def test_says_rightly_whether_it_is_traceable(name: str) -> None:
    one = fetch(name)
    if one.symbolic:
        expected = outputs(one.build(), *one.inputs())
        assert all(map(torch.equal, traced_outputs(one), expected))
    else:
        with pytest.raises(REFUSALS):
            traced_outputs(one)


def traced_outputs(one: TorchCase) -> list[Tensor]:
    return outputs(torch.fx.symbolic_trace(one.build()), *one.inputs())


@pytest.mark.parametrize("name", [param for param in ALL if param.id in names("no_export")])
def test_those_tagged_no_export_are_refused(name: str) -> None:
    one = fetch(name)
    with pytest.raises(RuntimeError):
        torch.export.export(one.build(), *one.inputs())


class Fresh(nn.Module):
    """The negative control: a batch norm as it is made, random in every call, deaf to its input, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        return 10 + torch.rand(6) * 0.001 + 0 * self.norm(x)


def test_an_unfair_model_is_found_out() -> None:
    found = list(faults(TorchCase("fresh", Fresh, floats((2, 6)), frozenset(), True)))
    for part in ("built and run again", "eval mode", "hardly depends", "norm.weight has only"):
        assert any(part in fault for fault in found), (part, found)
    assert "norm.running_var has only zeros or ones" in list(stale(Fresh()))
    assert list(stale(seeded(Fresh))) == []


def test_randomize_follows_the_generator() -> None:
    models = [Fresh(), Fresh()]
    for model in models:
        torch.manual_seed(0)
        randomize(model)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_names_filters_by_tags_and_case_says_what_there_is() -> None:
    assert names() == list(CASES)
    assert {"bert", "swin", "hf_convnext"} <= set(names("hf"))
    assert names("hf", "cnn") == ["hf_convnext"]
    with pytest.raises(KeyError, match="there are mlp_relu"):
        case("mlp_rellu")


def test_trained_weights_are_in_their_places() -> None:
    model = case("cifar_resnet20").build()
    data = np.load(Path(os.environ["CIPM_TEST_DATA"]) / "cifar10" / "val.npz")
    images = (data["images"][:200] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    (logits,) = outputs(model, (torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32),), {})
    assert (logits.argmax(1).numpy() == data["labels"][:200]).mean() > RIGHT_AT_LEAST
