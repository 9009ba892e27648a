"""Torch programs as people write them: what tracing and export find in them, and that what is found is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.backends.torch.emit import emit_graph, emit_torch  # noqa: E402

METHODS = ("symbolic", "export")


def units_of(program: cipm_ir.Program) -> list[int]:
    return sorted(s.size for s in program.spaces if s.kind == "units")


def moved(module: nn.Module, inputs: tuple[Any, ...], method: str) -> tuple[float, nn.Module]:
    """How far a random element of the full group moves the outputs, relative to them, and the moved module."""
    program = cipm_ir.load(module, inputs, method=method)
    rng = np.random.default_rng(0)
    made = program.act({space: space.random(rng) for space in program.spaces})
    other = emit_torch(program.origin.capture, made.emit()).object  # type: ignore[union-attr]
    with torch.no_grad():
        one, two = module(*inputs), other(*inputs)
    return float((one - two).abs().max() / one.abs().max()), other


def flops(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


class Between(nn.Module):
    """Something between two products with parameters ``a`` (12, 20) and ``b`` (20, 5)."""

    def __init__(self, middle: Callable[[Any, Any], Any], **parameters: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"a": (12, 20), "b": (20, 5), **parameters}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.middle = middle

    def forward(self, x: Any) -> Any:
        return self.middle(self, x)


X = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1))
PRODUCTS: dict[str, tuple[Callable[[Any, Any], Any], dict[str, tuple[int, ...]]]] = {
    "tensordot": (lambda m, x: torch.tensordot(torch.tensordot(x, m.a, dims=1).relu(), m.b, dims=([-1], [0])), {}),
    "tensordot over two axes": (
        lambda m, x: torch.tensordot(torch.tensordot(x, m.c, dims=([2, 1], [1, 0])).relu(), m.b, dims=([1], [0])),
        {"c": (6, 12, 20)},
    ),
    "multi_dot": (lambda m, x: torch.linalg.multi_dot([x[0], m.a, m.b]), {}),
    "chain_matmul": (lambda m, x: torch.chain_matmul(x[0], m.a, m.c, m.d), {"c": (20, 3), "d": (3, 7)}),
    "inner": (lambda m, x: torch.inner(torch.inner(x, m.c).relu(), m.d), {"c": (20, 12), "d": (5, 20)}),
    "cdist": (lambda m, x: torch.cdist((x @ m.a).relu(), m.c), {"c": (7, 20)}),
    "cdist, p=1": (lambda m, x: torch.cdist((x @ m.a).relu(), m.c, p=1.0), {"c": (7, 20)}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, method: str) -> None:
    middle, parameters = PRODUCTS[name]
    module = Between(middle, **parameters).double().eval()
    inputs = (X.double(),)
    program = cipm_ir.load(module, inputs, method=method)
    assert not program.opaque
    assert 20 in units_of(program)
    assert program.macs == flops(module, inputs)
    change, other = moved(module, inputs, method)
    assert change < 1e-12
    assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


def test_a_chain_of_four_goes_in_the_order_of_torch() -> None:
    sizes = (9, 40, 3, 30, 5)
    shapes = {f"w{k}": sizes[k : k + 2] for k in range(1, 4)}
    module = Between(lambda m, x: torch.linalg.multi_dot([x, m.w1, m.w2, m.w3]), **shapes).eval()
    inputs = (torch.randn(9, 40),)
    assert cipm_ir.load(module, inputs).macs == flops(module, inputs)


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "fft": lambda z: torch.fft.fft(z, dim=1).real,
    "ifft of fft": lambda z: torch.fft.ifft(torch.fft.fft(z, dim=1), dim=1).real,
    "irfft of rfft": lambda z: torch.fft.irfft(torch.fft.rfft(z, dim=1), n=6, dim=1),
    "over two axes": lambda z: torch.fft.irfftn(torch.fft.rfftn(z, dim=(0, 1)), s=(4, 6), dim=(0, 1)),
    "fft2": lambda z: torch.fft.fft2(z, dim=(0, 1)).imag,
    "parts": lambda z: torch.view_as_real(torch.fft.rfft(z, dim=1)).sum(-1),
    "angle": lambda z: torch.fft.rfft(z, dim=1).angle(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_along_other_axes(name: str, method: str) -> None:
    transform = TRANSFORMS[name]
    module = Between(lambda m, x: transform((x @ m.a).relu()) @ m.b).double().eval()
    assert units_of(cipm_ir.load(module, (X.double(),), method=method)) == [20]
    assert moved(module, (X.double(),), method)[0] < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_transform_of_the_units_themselves_pins_them(method: str) -> None:
    module = Between(lambda m, x: torch.fft.fft(x @ m.a, dim=2).real @ m.b).eval()
    program = cipm_ir.load(module, (X,), method=method)
    assert not program.spaces
    assert any("fft_fft mixes" in pin.reason for pin in program.analysis.walk.rec.pins)


class GlobalFilter(nn.Module):
    """A filter in the frequencies of two axes, one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 16), nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.randn(8, 5, 16, 2))

    def forward(self, x: Any) -> Any:
        z = torch.fft.rfft2(self.before(x), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        return self.after(torch.fft.irfft2(z, s=(8, 8), dim=(1, 2), norm="ortho").relu())


@pytest.mark.parametrize("method", METHODS)
def test_complex_filters_follow(method: str) -> None:
    module, inputs = GlobalFilter().eval(), (torch.randn(2, 8, 8, 3),)
    assert units_of(cipm_ir.load(module, inputs, method=method)) == [16]
    assert moved(module, inputs, method)[0] < 1e-5
    before = cipm_ir.load(module, inputs, method=method).macs
    result = cipm_ir.optimize(module, ["prune{macs=0.6}"], example_inputs=inputs, method=method)
    assert type(result.model) is GlobalFilter
    assert result.program.macs == cipm_ir.load(result.model, inputs, method=method).macs <= 0.6 * before


# ---------------------------------------------------------------- experts
EXPERTS: dict[str, Callable[[Any, Any], Any]] = {
    "bmm": lambda m, x: torch.bmm(torch.bmm(x.expand(3, 6, 12), m.a).relu(), m.b).sum(0),
    "matmul": lambda m, x: torch.matmul(torch.matmul(x[0], m.a).relu(), m.b).mean(0),
    "baddbmm": lambda m, x: torch.baddbmm(m.d, torch.baddbmm(m.c, x.expand(3, 6, 12), m.a).relu(), m.b).sum(0),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_has_an_order_of_its_own(name: str) -> None:
    parameters = {"a": (3, 12, 20), "b": (3, 20, 5), "c": (3, 1, 20), "d": (3, 1, 5)}
    module, inputs = Between(EXPERTS[name], **parameters).double().eval(), (X[:1].double(),)
    program = cipm_ir.load(module, inputs)
    assert units_of(program) == [20, 20, 20] and [s.size for s in program.spaces if s.kind == "blocks"] == [3]
    assert program.macs == flops(module, inputs)
    assert moved(module, inputs, "symbolic")[0] < 1e-12


class Routed(nn.Module):
    """Rows sorted by expert, as transformers multiplies them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in ((4, 16, 32), (4, 32, 8)))

    def forward(self, x: Any, offsets: Any) -> Any:
        hidden = torch._grouped_mm(x, self.up, offsets).relu()
        return torch._grouped_mm(hidden, self.down, offsets)


def test_products_of_routed_rows() -> None:
    """Experts that are chosen by number stay where they are, and share the order of their units."""
    module = Routed().to(torch.bfloat16).eval()
    inputs = (torch.randn(8, 16, dtype=torch.bfloat16), torch.tensor([2, 4, 5, 8], dtype=torch.int32))
    try:
        module(*inputs)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no grouped product here: {error}")
    program = cipm_ir.load(module, inputs)
    assert units_of(program) == [32]
    rows = 8 * (16 * 32 + 32 * 8)
    assert program.macs == rows
    space = program.spaces[0]
    half = program.restrict({space: np.arange(16)})
    assert half.macs == rows // 2


# ---------------------------------------------------------------- directions
class Tagger(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(12, 16, **options)
        self.after = nn.Linear(32, 5)

    def forward(self, x: Any) -> Any:
        return self.after(self.layer(x)[0])


RECURRENT: dict[str, tuple[str, dict[str, Any], int]] = {
    "LSTM": ("LSTM", {}, 2),
    "GRU": ("GRU", {}, 2),
    "RNN, two layers, batch first": ("RNN", {"num_layers": 2, "batch_first": True}, 4),
    "LSTM without bias, two layers": ("LSTM", {"num_layers": 2, "bias": False}, 4),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECURRENT)
def test_each_direction_has_units_of_its_own(name: str, method: str) -> None:
    kind, options, count = RECURRENT[name]
    module, inputs = Tagger(kind, bidirectional=True, **options).double().eval(), (X.double(),)
    assert units_of(cipm_ir.load(module, inputs, method=method)) == [16] * count
    assert moved(module, inputs, method)[0] < 1e-12


@pytest.mark.parametrize("name", RECURRENT)
def test_both_directions_keep_equally_many(name: str) -> None:
    """Layers on top of each other may keep different numbers, which one module of torch.nn cannot express."""
    kind, options, count = RECURRENT[name]
    module = Tagger(kind, bidirectional=True, **options).eval()
    result = cipm_ir.optimize(module, ["prune{macs=0.6}"], example_inputs=(X,), verify=False)
    sizes = units_of(result.program)
    assert len(sizes) == count and all(sizes.count(n) % 2 == 0 for n in sizes) and max(sizes) < 16
    assert (type(result.model) is Tagger) == (len(set(sizes)) == 1)
    graph = emit_graph(result.program.origin.capture, result.program.emit())  # type: ignore[union-attr]
    torch.testing.assert_close(result.model(X), graph(X))


def test_a_module_whose_layers_differ_is_not_read_as_if_they_were_alike() -> None:
    """Torch starts all layers from one state; some of its kernels do not notice that it does not fit."""
    module = Tagger("LSTM", bidirectional=True, num_layers=2).eval()
    result = cipm_ir.optimize(module, ["prune{ratio=0.3}"], example_inputs=(X,), verify=False)
    assert (type(result.model) is Tagger) == (len(set(units_of(result.program))) == 1)


def test_control_directions_are_not_exchanged() -> None:
    """What the test of directions would see: units of one direction in the place of those of the other."""
    module, inputs = Tagger("LSTM", bidirectional=True).double().eval(), (X.double(),)
    before = module(*inputs).detach()
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            one, two = getattr(module.layer, name), getattr(module.layer, f"{name}_reverse")
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)
        weight = module.after.weight
        weight.copy_(torch.cat([weight[:, 16:], weight[:, :16]], 1))
    assert float((module(*inputs).detach() - before).abs().max() / before.abs().max()) > 0.01


# ---------------------------------------------------------------- computed weights
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm by hooks": nn.utils.weight_norm,
    "spectral norm by hooks": nn.utils.spectral_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_units_of_normalized_weights(name: str) -> None:
    norm = NORMS[name]
    module = nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 6, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        norm(nn.Linear(6, 4)),
    ).double().eval()  # fmt: skip
    inputs = (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    program = cipm_ir.load(module, inputs)
    assert units_of(program) == [6, 8] and not program.opaque
    assert moved(module, inputs, "auto")[0] < 1e-12
    result = cipm_ir.optimize(module, ["prune{params=0.7}"], example_inputs=inputs)
    assert type(result.model) is nn.Sequential and result.report.verification is not None


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_hooks_that_keep_what_they_compute(method: str) -> None:
    """Reading runs them on tensors without numbers, which must not stay on the caller's module."""
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)).eval()
    kept = module[0].weight
    program = cipm_ir.load(module, (torch.randn(2, 4),), method=method)
    assert module[0].weight is kept
    assert bool(program.opaque) == (method == "symbolic")
