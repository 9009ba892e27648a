"""Multiply-accumulates of torch programs against torch's own FlopCounterMode, with every difference explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.torch.torch_zoo import CASES, built, program  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.errors import CipmError, SymmetryError  # noqa: E402
from cipm_ir.frontends.torch import counts as from_torch_counts  # noqa: E402

# torch's counter leaves these out: what it should have added, by name of the model.
LEFT_OUT: dict[str, int] = {
    # per step, item and direction, four gates of inputs and of hidden units
    "lstm_tagger": 36582 - 910,
    "lstm_tagger_bidirectional": 92092 - 1820,
    "lstm_last_state": 22738 - 1210,
    "complex_parameters": 2856 - 1848,  # Fourier transforms
    "mixtral": 2 * 2 * 14 * (24 * 40 + 20 * 24),  # two layers, two experts for each of 14 tokens
    "bilinear": 1910 - 326,  # torch.bilinear
    "spectral_norm": 12 * 27 + 5 * 108 + 12 + 5,  # matrices times vectors, and products of two vectors
}
# torch runs what nothing reads; the graph has it no more.
UNREAD = {"bad_unused": 4550 - 2730}
REFUSED = {
    "torch_transformer_decoder_guess",
    "bad_control_flow",
    "bad_data_size",
    "bad_numpy",
    "sparse_adjacency",
    "mixtral_eager",
}


def products(model: nn.Module, args: Any, kwargs: Any) -> int:
    """Half of the flops that torch counts in one run."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused layers are not counted
    try:
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_torch_zoo_is_counted_as_torch_counts(name: str) -> None:
    theirs = products(*built(name))
    try:
        counted = program(name).count()
    except CipmError:
        assert name in REFUSED
        return
    assert counted.total == theirs + LEFT_OUT.get(name, 0) - UNREAD.get(name, 0)
    assert not counted.unknown


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 2)]
    return nn.Sequential(*layers).eval()


def seen(hook: Callable[[nn.Module], Any]) -> nn.Module:
    model = net()
    hook(model[2])
    return model


HOOKS = {
    "feature": lambda layer: layer.register_forward_hook(lambda m, i, o: None),
    "changing": lambda layer: layer.register_forward_hook(lambda m, i, o: o * 2),
    "before": lambda layer: layer.register_forward_pre_hook(lambda m, i: None),
    "weight_norm": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("kind", sorted(HOOKS))
def test_a_hook_hides_no_layer_from_the_budget(kind: str) -> None:
    """Half of the products lie in the layer with the hook: it shrinks like the others, and torch counts the same."""
    model, x = seen(HOOKS[kind]), torch.randn(4, 5)
    result = cipm_ir.optimize(model, ["prune{macs=0.63}"], example_inputs=x)
    report, emitted = result.report, result.emitted
    assert emitted is not None
    assert report.before.macs == products(model, (x,), {})
    assert report.after.macs == products(emitted.object, (x,), {}) <= 0.63 * report.before.macs
    assert report.after.macs > 0.55 * report.before.macs


def test_hooks_everywhere() -> None:
    layers = [nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2)]
    model = nn.Sequential(*(nn.utils.weight_norm(x) if isinstance(x, nn.Linear) else x for x in layers)).eval()
    x = torch.randn(4, 5)
    report = cipm_ir.optimize(model, ["prune{macs=0.5}"], example_inputs=x).report
    assert report.before.macs == 4 * (5 * 12 + 12 * 2)
    assert report.steps[0].changed and report.after.macs <= 0.5 * report.before.macs


@pytest.mark.parametrize("kind", sorted(HOOKS))
def test_a_layer_that_stays_opaque_is_counted(kind: str) -> None:
    """Tracing, if asked for, keeps the layer as a call; what it costs is known all the same."""
    x = torch.randn(4, 5)
    program = cipm_ir.load(seen(HOOKS[kind]), (x,), method="symbolic")
    counted = program.count()
    assert (counted.total, counted.unknown) == (4 * (5 * 12 + 12 * 40 + 40 * 2), ())


class Opaque(nn.Module):
    """An operation without a rule between two layers."""

    def __init__(self, operation: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.operation = nn.Linear(5, 8), nn.Linear(8, 2), operation

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x).relu()) + self.operation(x)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: torch.linalg.matrix_norm(x @ x.T) * 0, 4 * 4 * 5),
        (lambda x: torch.histc(x, 4).sum() * 0, 0),
        (lambda x: torch.fft.fft(x.reshape(4, 5)).real.sum() * 0, 4 * 5 * 3),
        (
            lambda x: torch.fft.fft2(x.reshape(1, 4, 5), s=(4, 8)).real.sum() * 0,
            2 * (32 * 3 + 32 * 2),
        ),  # complex, along both axes
    ],
)
def test_opaque_operations_are_counted_where_torch_says_what_they_do(operation: Any, expected: int) -> None:
    counted = cipm_ir.load(Opaque(operation).eval(), (torch.randn(4, 5),)).count()
    assert [str(u) for u in counted.unknown] == []
    assert counted.total == 4 * (5 * 8 + 8 * 2) + expected


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.linalg.svd(x, full_matrices=False)[0].sum(),
        lambda x: torch.linalg.solve(x[:, :4] + torch.eye(4), x).sum(),
        lambda x: torch.special.bessel_j0(torch.linalg.eigvalsh(x @ x.T)).sum(),
    ],
)
def test_operations_without_a_formula_are_refused_by_name(operation: Any) -> None:
    model, x = Opaque(operation).eval(), torch.randn(4, 5)
    with pytest.raises(SymmetryError, match=r"linalg_.*no formula counts aten\._?linalg"):
        cipm_ir.optimize(model, ["prune{macs=0.5}"], example_inputs=x)
    assert cipm_ir.optimize(model, ["prune{params=0.7}"], example_inputs=x).report.steps[0].changed


def test_a_count_without_formulas_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: were opaque calls free, the comparison with torch would fail."""
    monkeypatch.setattr("cipm_ir.frontends.torch.lowering.count_call", lambda name, run: (0, ""))
    program = cipm_ir.load(seen(HOOKS["feature"]), (torch.randn(4, 5),), method="symbolic")
    assert program.macs == 4 * (5 * 12 + 40 * 2)


def test_unknown_operations_make_the_count_unknown() -> None:
    """Control: what is neither counted nor declared free is no zero."""
    run = lambda: torch.linalg.det(torch.empty(3, 3, device="meta"))  # noqa: E731
    macs, why = from_torch_counts.count_call("own", run)
    assert macs is None and "linalg_det" in why
