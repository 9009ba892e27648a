"""Layers, pooling, padding, normalizations and reductions: the IR computes what torch computes, and keeps symmetry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from tests.torch.torch_cases_layers import BLOCK, CASES, IMAGE, POOLS, REFUSED, Case  # noqa: E402
from tests.torch.torch_running import largest_difference, lowering_error, run_both  # noqa: E402
from torch import nn  # noqa: E402

from cipm_ir.frontends.torch.load import load_torch  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402


class Call(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class CallPair(nn.Module):
    """A function, or a module, of two tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any, y: Any) -> Any:
        return self.function(x, y)


def prepared(thing: Any, inputs: int) -> Any:
    """A module to trace, in evaluation, with parameters and statistics that are not ones and zeros."""
    torch.manual_seed(0)
    if inputs == 2:
        module: Any = CallPair(thing)
    else:
        module = nn.Sequential(thing) if isinstance(thing, nn.Module) else Call(thing)
    with torch.no_grad():
        for p in (*module.parameters(), *module.buffers()):
            if p.is_floating_point():
                p.copy_(torch.rand_like(p) + 0.5)
    return module.eval()


def opaque(capture: Any) -> list[tuple[str, str | None]]:
    """Nodes without a rule, with the reason."""
    return [(n.op_type, n.metadata_props.get("reason")) for n in capture.model.graph if n.domain == "pkg.torch"]


def check(thing: Any, *shapes: tuple[int, ...], method: str) -> None:
    torch.manual_seed(1)
    capture, error = lowering_error(prepared(thing, len(shapes)), *(torch.randn(s) for s in shapes), method=method)
    assert opaque(capture) == []
    assert error < 1e-5


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_computes_what_torch_computes(case: Case, method: str) -> None:
    check(*case, method=method)


def test_a_wrong_lowering_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cipm_ir.frontends.torch.ops.pooling import Window

    monkeypatch.setattr(Window, "is_ceiled", lambda *args: False)
    with pytest.raises(AssertionError):
        check(*POOLS["max, ceil"], method="symbolic")


@pytest.mark.parametrize("field", ["values", "indices"])
def test_fields_of_results_by_name(field: str) -> None:
    check(lambda x: getattr(x.max(1), field), BLOCK, method="auto")
    check(lambda x: getattr(torch.topk(x, 2), field), BLOCK, method="auto")


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_expressed_is_opaque(case: Case) -> None:
    thing, *shapes = case
    inputs = tuple(torch.randn(s) for s in shapes)
    capture = load_torch(prepared(thing, 1), inputs, method="symbolic")
    assert len(opaque(capture)) == 1
    Program.of(capture.model)


class Between(nn.Module):
    """Something between two layers: what moves in between is what it lets through."""

    def __init__(self, first: nn.Module, middle: Any, last: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = first, middle, last

    def forward(self, x: Any) -> Any:
        return self.last(self.middle(self.first(x)))


IMAGES: dict[str, tuple[Any, ...]] = {
    "depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), 16, 16, [16]),
    "circular": (nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), 16, 16, [16, 16]),
    "transposed": (nn.ConvTranspose2d(16, 16, 2, 2), 16, 16, [16, 16]),
    "batch norm": (nn.BatchNorm2d(16), 16, 16, [16]),
    "batch norm, not affine": (nn.BatchNorm2d(16, affine=False), 16, 16, [16]),
    "batch norm, no statistics": (nn.BatchNorm2d(16, track_running_stats=False), 16, 16, [16]),
    "group norm": (nn.GroupNorm(4, 16), 16, 16, [4, 4, 4, 4, 4]),
    "group norm, not affine": (nn.GroupNorm(4, 16, affine=False), 16, 16, [4, 4, 4, 4, 4]),
    "instance norm": (nn.InstanceNorm2d(16), 16, 16, [16]),
    "max pool": (nn.MaxPool2d(2), 16, 16, [16]),
    "max pool, indices unread": (lambda h: F.max_pool2d(h, 2, return_indices=True)[0], 16, 16, [16]),
    "average of all": (nn.AdaptiveAvgPool2d(1), 16, 16, [16]),
    "maximum of all": (nn.AdaptiveMaxPool2d(1), 16, 16, [16]),
    "norm pool": (nn.LPPool2d(2, 2), 16, 16, [16]),
    "reflect": (nn.ReflectionPad2d(1), 16, 16, [16]),
    "channel pad": (lambda h: F.pad(h, (0, 0, 0, 0, 2, 2)), 12, 16, [4, 12]),
    "negative channel pad": (lambda h: F.pad(h, (0, 0, 0, 0, -4, -4)), 24, 16, [8, 16]),
    "upsample": (nn.Upsample(size=11, mode="bilinear"), 16, 16, [16]),
    "pixel shuffle": (nn.PixelShuffle(2), 64, 16, [16]),
    "pixel unshuffle": (nn.PixelUnshuffle(2), 4, 16, [4]),
    "channel shuffle": (nn.ChannelShuffle(4), 16, 16, [16]),
    "local response": (nn.LocalResponseNorm(3), 16, 16, []),
}

ROWS_BETWEEN: dict[str, Any] = {
    "layer norm": nn.LayerNorm(16),
    "layer norm, not affine": nn.LayerNorm(16, elementwise_affine=False),
    "layer norm of its shape": lambda h: F.layer_norm(h, h.shape[-1:]),
    "native layer norm": lambda h: torch.native_layer_norm(h, [16], None, None, 1e-5)[0],
    "rms norm": nn.RMSNorm(16),
    "softmax": nn.Softmax(-1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "std": lambda h: h / h.std(-1, keepdim=True),
    "var": lambda h: h / (h.var(-1, keepdim=True) + 1),
    "mean": lambda h: h - h.mean(-1, keepdim=True),
    "maximum": lambda h: h - h.max(-1, keepdim=True)[0],
    "logsumexp": lambda h: h - h.logsumexp(-1, keepdim=True),
    "cumsum of another axis": lambda h: h.cumsum(1),
}


def spaces(module: nn.Module, x: Any, method: str) -> list[int]:
    capture = load_torch(module.eval(), (x,), method=method)
    return sorted(s.size for s in Program.of(capture.model).spaces)


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_symmetry_of_channels_survives(case: tuple[Any, ...], method: str) -> None:
    middle, width, after, expected = case
    module = Between(nn.Conv2d(3, width, 3, padding=1), middle, nn.Conv2d(after, 3, 1))
    assert spaces(module, torch.randn(2, 3, 8, 8), method) == expected


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("middle", ROWS_BETWEEN.values(), ids=ROWS_BETWEEN)
def test_symmetry_of_features_survives(middle: Any, method: str) -> None:
    module = Between(nn.Linear(5, 16), middle, nn.Linear(16, 3))
    assert spaces(module, torch.randn(2, 4, 5), method) == [16]


DYNAMIC: dict[str, Any] = {
    "convolution": nn.Conv2d(4, 6, 3, 2, 1),
    "transposed": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1),
    "max pool, ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "maximum of all": nn.AdaptiveMaxPool2d(1),
    "average of all": nn.AdaptiveAvgPool2d(1),
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear to a size": nn.Upsample(size=(7, 9), mode="bilinear"),
    "channel shuffle": nn.ChannelShuffle(2),
    "batch norm, no statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "group norm": nn.GroupNorm(2, 4),
    "variance": lambda x: x.var((2, 3)),
    "sort": lambda x: x.sort(-1)[0],
    "pad by a size": lambda x: F.pad(x, (0, x.shape[3] % 3, -1, 0)),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
}


@pytest.mark.parametrize("thing", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_sizes_follow_the_input(thing: Any) -> None:
    module, auto = prepared(thing, 1), torch.export.Dim.AUTO
    capture = load_torch(module, (torch.randn(IMAGE),), dynamic_shapes=[{0: auto, 2: auto, 3: auto}], method="export")
    assert opaque(capture) == []
    for shape in (IMAGE, (3, 4, 16, 12)):
        assert largest_difference(run_both(capture, module, (torch.randn(shape),), {})) < 1e-5


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False),
                                   nn.InstanceNorm2d(4, track_running_stats=True)], ids=str)  # fmt: skip
def test_training_is_lowered_as_evaluation(layer: nn.Module) -> None:
    module, x = prepared(layer, 1), torch.randn(IMAGE)
    capture = load_torch(module.train(), (x,), method="symbolic")
    assert largest_difference(run_both(capture, module.eval(), (x,), {})) < 1e-5


@pytest.mark.parametrize("size", [None, (16, 17)])
def test_the_size_of_a_transposed_convolution(size: tuple[int, int] | None) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, 2, 1)
    module = Sized(layer, size)
    capture, error = lowering_error(module, torch.randn(2, 4, 8, 9), method="symbolic")
    assert opaque(capture) == [] and error < 1e-5


class Sized(nn.Module):
    """A layer that is called with the size of its output."""

    def __init__(self, layer: nn.Module, size: Any) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Any) -> Any:
        return self.layer(x, output_size=self.size)
