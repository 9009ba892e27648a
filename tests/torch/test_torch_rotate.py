"""`rotate` on modules: tied weights stay tied, the module computes what it did."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import cipm_ir  # noqa: E402 (only where torch is there)
from cipm_ir.passes.exact.rotate.rotate import Rotate  # noqa: E402

nn = torch.nn


class Block(nn.Module):  # type: ignore[misc,name-defined]
    """x + MLP(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Any) -> Any:
        """Keeps the shape."""
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Tied(nn.Module):  # type: ignore[misc,name-defined]
    """A language model whose head is its embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, width), nn.RMSNorm(width), nn.Linear(width, 11, bias=False)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        """Token ids to logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_modules_rotate() -> None:
    torch.manual_seed(0)
    module, ids = Tied().eval(), torch.randint(0, 11, (2, 5))
    result = cipm_ir.optimize(module, passes=[Rotate()], example_inputs=(ids,))
    assert result.report.steps[0].summary.startswith("1 residual stream rotated")
    made = result.model
    assert (made(ids) - module(ids)).abs().max() < 1e-4
    assert made.head.weight is made.embed.weight
    assert not torch.allclose(made.embed.weight, module.embed.weight)
    assert set(made.state_dict()) == set(module.state_dict())
