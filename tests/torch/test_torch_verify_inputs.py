"""The inputs on which torch programs are compared reach what the example does not."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cipm_ir  # noqa: E402


@pytest.mark.parametrize("row", [0, 7, 150, 299])
def test_every_row_of_an_embedding_is_reached(row: int) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(300, 4)
    net = nn.Sequential(table, nn.Linear(4, 3)).eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter("0.weight")[row] *= 1.01
    ids = torch.arange(16).reshape(2, 8)
    assert cipm_ir.verify(net, net, example_inputs=(ids,)).ok
    assert cipm_ir.verify(net, other, example_inputs=(ids,)).ok is False
