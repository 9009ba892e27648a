"""What broke when torch modules from outside the tests were used through the public API."""

from __future__ import annotations

import pytest

import cipm_ir

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402


class Attention(nn.Module):
    """Heads whose number and size come from attributes that no layer knows: pruned, it comes out as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        made: Tensor = self.o(
            torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        )
        return made


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_with_fixed_sizes_says_so(dynamic: bool) -> None:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    example = (torch.randn(2, 5, 8),)
    result = cipm_ir.optimize(Attention().eval(), "prune{params=0.7}", example_inputs=example, dynamic_shapes=shapes)
    assert isinstance(result.model, torch.fx.GraphModule)
    assert ("dynamic_shapes= keeps sizes open" in str(result.report)) is not dynamic
    if dynamic:
        assert result.model(torch.randn(7, 5, 8)).shape == (7, 5, 8)
