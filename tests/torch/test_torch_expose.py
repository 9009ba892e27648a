"""`expose` on torch programs: modules come back and compute the same."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import cipm_ir  # noqa: E402
import cipm_ir.passes.exact.expose.expose  # noqa: E402


class PreNorm(torch.nn.Module):  # type: ignore[name-defined,misc]
    """An encoder block with its norms in front."""

    def __init__(self, norm: Any, n: int = 12) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(5, n)
        self.first, self.last = norm(n), norm(n)
        self.up, self.down, self.head = torch.nn.Linear(n, 20), torch.nn.Linear(20, n), torch.nn.Linear(n, 3)

    def forward(self, x: Any) -> Any:
        x = self.embed(x)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.first(x))))
        return self.head(self.last(x))


def drawn(module: Any) -> Any:
    """All parameters random, norms included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.6)
    return module.eval()


def relative(module: Any, other: Any, x: Any) -> float:
    with torch.no_grad():
        a, b = module(x), other(x)
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize(("norm", "centred"), [(torch.nn.LayerNorm, 2), (torch.nn.RMSNorm, 0)])
def test_transformer_block(norm: Any, centred: int) -> None:
    module, x = drawn(PreNorm(norm)), torch.randn(2, 7, 5)
    result = cipm_ir.optimize(module, passes="expose", example_inputs=(x,))
    (step,) = result.report.steps
    assert (step.metrics["norms"], step.metrics["centred"]) == (2, centred)
    assert step.metrics["after"]["rotatable_units"] == 12
    assert relative(module, result.model, x) < 1e-5


@pytest.mark.parametrize("activation", [torch.nn.ReLU6, torch.nn.Hardtanh])
def test_clips(activation: Any) -> None:
    module = drawn(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), activation(), torch.nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 6, 6)
    result = cipm_ir.optimize(module, passes="expose{relu6=true, hardtanh=true}", example_inputs=(x,))
    (step,) = result.report.steps
    assert step.metrics["clips"] == 1 and step.metrics["after"]["exact_scales"] == 8
    assert relative(module, result.model, x) == 0


def test_batch_norm() -> None:
    module = drawn(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
    x = torch.randn(2, 3, 6, 6)
    result = cipm_ir.optimize(module, passes="expose", example_inputs=(x,))
    assert result.report.steps[0].metrics["batch_norms"] == 1
    assert relative(module, result.model, x) < 1e-5


class Twice(torch.nn.Module):  # type: ignore[name-defined,misc]
    """One layer used two times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = torch.nn.Linear(5, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.again(torch.relu(self.again(x)))))


def test_meant_ties_stay_unless_asked() -> None:
    """A layer that a module uses twice is one; its bias is no coincidence."""
    module, x = drawn(Twice()), torch.randn(4, 5)
    result = cipm_ir.optimize(module, passes="expose", example_inputs=(x,))
    assert not result.report.steps[0].changed
    result = cipm_ir.optimize(module, passes="expose{shared=all}", example_inputs=(x,))
    (step,) = result.report.steps
    assert step.metrics["after"]["free_scales"] > step.metrics["before"]["free_scales"]
    assert relative(module, result.model, x) == 0


@pytest.mark.models
@pytest.mark.parametrize("split", ["vectors", "all"])
def test_tied_gpt2(split: str) -> None:
    """The head shares the embedding's table: only a copy of its own lets the stream be centred and rotated."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    module, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "ln_" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.3)
    result = cipm_ir.optimize(module, passes=f"expose{{shared={split}}}", example_inputs=(ids,))
    (step,) = result.report.steps
    assert (step.metrics["norms"], step.metrics["centred"]) == ((2, 0) if split == "vectors" else (3, 3))
    assert ("shared=all splits it" in step.summary) == (split == "vectors")
    with torch.no_grad():
        a, b = module(ids).logits, result.model(ids).logits
    assert float((a - b).abs().max() / a.abs().max()) < 1e-5
