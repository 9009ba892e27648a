"""Sizes of hidden axes that a torch program reads, writes down or implies: none may be stale once units are gone.

In each case units that are zero on both sides are removed. What is written without them must compute what it computed
with them, and what its IR computes in onnxruntime, even where the units were not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.models.dead_units import killed, random_keep, restricted  # noqa: E402
from tests.torch.test_torch_fuzz import apart, emitted, outputs  # noqa: E402
from tests.torch.torch_running import feeds_of, largest_difference, run_both  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.runtime.session import Runner  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

UNITS = 8
Function = Callable[[Any, Any], Any]


class Hidden(nn.Module):
    """A function of hidden units (batch 2, sequence 5, units 8) between two linear layers."""

    def __init__(self, function: Function, units: int = UNITS) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.a, self.lin = nn.Linear(4, units), nn.Linear(units, units)
        self.p, self.table = nn.Parameter(torch.randn(units)), nn.Parameter(torch.randn(20))
        self.norm, self.slope = nn.BatchNorm1d(units), nn.PReLU(units)
        self.rows = nn.Embedding(10, units, padding_idx=0)
        self.lstm = nn.LSTM(units, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(units, 2 - units % 2, batch_first=True)
        nn.init.uniform_(self.norm.get_buffer("running_var"), 0.5, 1.5)
        self.eval()
        with torch.no_grad():
            width = function(self, self.a(example())).shape[-1]
        self.b = nn.Linear(width, 3)
        self.eval()

    def forward(self, x: Any) -> Any:
        return self.b(self.function(self, self.a(x)))


def example(batch: int = 2, seed: int = 0) -> Any:
    return torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(seed))


def heads(x: Any) -> Any:
    """(2, 5, 8) to (2, 2, 5, 4), every size a literal or -1."""
    return x.view(x.size(0), -1, 2, 4).transpose(1, 2)


def pieces(x: Any, weights: Any) -> Any:
    """A projection by the first and the last third of a weight."""
    return F.linear(x, weights[0]).relu() + F.linear(x, weights[2])


# What is kept as a torch node although it means something else once the axis is shorter, or must be written anew.
CASES: dict[str, Function] = {
    "a size as a factor": lambda m, x: x * x.size(-1) ** -0.5,
    "a size as a divisor": lambda m, x: x.relu() + x.sum(-1, keepdim=True) / x.size(-1),
    "half a size": lambda m, x: x * (x.shape[2] // 2),
    "a size rounded up": lambda m, x: x * -(-x.size(-1) // 3),
    "a size less one": lambda m, x: x / (x.size(-1) - 1),
    "numel": lambda m, x: x * (x[0, 0].numel() / 8),
    "a row of a table by size": lambda m, x: x.relu() * m.table[x.size(-1)],
    "ones of a size": lambda m, x: x * torch.ones(x.size(-1)),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, m.lin(x), x),
    "attention in heads": lambda m, x: F.scaled_dot_product_attention(heads(x), heads(m.lin(x)), heads(x)).flatten(2),
    "scores by a literal": lambda m, x: torch.softmax(x @ x.mT / math.sqrt(8), -1) @ x,
    "scores by a size": lambda m, x: torch.softmax(x @ x.mT / x.size(-1) ** 0.5, -1) @ x,
    "normalize": lambda m, x: F.normalize(x, dim=-1),
    "cosine": lambda m, x: x * F.cosine_similarity(x, x.roll(1, 1), dim=-1).unsqueeze(-1),
    "expand -1": lambda m, x: x.mean(1, keepdim=True).expand(-1, 5, -1) + x,
    "expand by literals": lambda m, x: x.mean(1, keepdim=True).expand(2, 5, 8) + x,
    "view with -1 for the batch": lambda m, x: x.reshape(-1, 8),
    "view with -1 for the units": lambda m, x: x.reshape(10, -1).reshape(2, 5, -1),
    "view of everything": lambda m, x: x.flatten().view(x.size(0), 5, 8),
    "view by product": lambda m, x: x.reshape(x.size(0) * x.size(1), 8).reshape(x.shape),
    "flatten": lambda m, x: x.reshape(2, -1),
    "pad by units": lambda m, x: F.pad(x, (0, 4)),
    "pad up to a width": lambda m, x: F.pad(x, (0, 12 - x.size(-1))),
    "interpolation to the same size": lambda m, x: F.interpolate(x, size=8),
    "pooling to the same size": lambda m, x: F.adaptive_avg_pool1d(x, 8),
    "identity matrix": lambda m, x: x @ torch.eye(8),
    "gram": lambda m, x: x @ (x.mT @ x),
    "batch norm": lambda m, x: m.norm(x.mT).mT,
    "prelu": lambda m, x: m.slope(x.mT).mT,
    "rows of an embedding": lambda m, x: x + m.rows(torch.arange(5)),
    "slice of an embedding": lambda m, x: x + m.rows.weight[:5],
    "tied and transposed": lambda m, x: F.linear(F.linear(x, m.lin.weight).relu(), m.lin.weight.t()),
    "pieces of a parameter": lambda m, x: pieces(x, m.attention.in_proj_weight.chunk(3)),
    "normalized weight": lambda m, x: F.linear(x, F.normalize(m.lin.weight, dim=1)),
    "size of a parameter": lambda m, x: x * m.p.shape[0],
    "multi-head attention": lambda m, x: m.attention(x, x, x)[0],
    "lstm": lambda m, x: m.lstm(x)[0],
    "lstm from zeros": lambda m, x: m.lstm(x, (torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)))[0],
    "mean of what is there": lambda m, x: x + x.sum((1, 2), keepdim=True),
}


def loaded(module: nn.Module, method: str) -> Program:
    return cipm_ir.load(module, example_inputs=(example(),), method=method)


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("name", CASES)
def test_no_size_is_stale(name: str, method: str) -> None:
    module = Hidden(CASES[name])
    program = loaded(module, method)
    keep = random_keep(program, np.random.default_rng(0))
    assert keep, "nothing may be removed: the case tests nothing"
    other = example(seed=1)
    dead = killed(program, keep)
    assert not apart("restrict", outputs(emitted(dead), other), outputs(emitted(restricted(dead, keep)), other), 1e-5)
    small = program.restrict(keep)
    with Runner(small.model) as runner:
        wanted = list(runner.run(feeds_of(program.origin.capture, (other,), {})).values())  # type: ignore[union-attr]
    assert not apart("the IR", wanted, outputs(emitted(small), other), 1e-4)


# What depends on the order of the units, or on how many there are, so that none may be taken away.
HELD: dict[str, Function] = {
    "positions": lambda m, x: x * torch.arange(8),
    "positions by size": lambda m, x: x * torch.arange(x.size(-1)),
    "cumsum": lambda m, x: x.cumsum(-1),
    "a mask by size": lambda m, x: x.masked_fill(torch.arange(x.size(-1)) < 4, 0),
    "half of the positions": lambda m, x: x * (torch.arange(8) < x.size(-1) // 2),
    "triangle": lambda m, x: x @ (x.mT @ x).tril(),
    "neighbours": lambda m, x: F.max_pool1d(x, 2),
    "interpolation": lambda m, x: F.interpolate(x, scale_factor=2),
    "sorted": lambda m, x: x.topk(4, -1)[0],
    "position of the largest": lambda m, x: x + x.argmax(-1, keepdim=True),
}


@pytest.mark.parametrize("name", HELD)
def test_order_pins(name: str) -> None:
    assert [s.name for s in loaded(Hidden(HELD[name]), "symbolic").spaces if s.size == UNITS] == []


AVERAGED: dict[str, Function] = {
    "mean": lambda m, x: x - x.mean(-1, keepdim=True),
    "variance": lambda m, x: x / (x.var(-1, keepdim=True) + 1),
    "deviation": lambda m, x: x / (x.std(-1, keepdim=True, correction=0) + 1),
    "layer norm": lambda m, x: F.layer_norm(x, (8,), m.p),
}


@pytest.mark.parametrize("name", AVERAGED)
def test_zero_is_not_nothing_to_an_average(name: str) -> None:
    """Dead units count: they move, but are not removed."""
    module = Hidden(AVERAGED[name])
    program = loaded(module, "symbolic")
    assert [s.size for s in program.spaces if s.name == "a"] == [UNITS]
    assert random_keep(program, np.random.default_rng(0)) == {}
    moved = program.act({s: s.random(np.random.default_rng(0)) for s in program.spaces})
    assert not apart("act", outputs(module, example()), outputs(emitted(moved), example()), 1e-4)


# Numbers that a traced program computes from sizes.
NUMBERS: dict[str, Function] = {
    "floor of a negative": lambda m, x: x * ((-x.size(-1)) // 3),
    "rounded up": lambda m, x: torch.cat([x[..., -(-x.size(-1) // 2) :], x[..., : -(-x.size(-1) // 2)].relu()], -1),
    "remainder of a negative": lambda m, x: x * ((-x.size(-1)) % 3),
    "padded to a multiple": lambda m, x: F.pad(x, (0, (-x.size(-1)) % 4)),
    "power": lambda m, x: x * (x.size(-1) ** 2),
    "power of two": lambda m, x: x * 2 ** -x.size(-1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_round_as_python_does(name: str) -> None:
    module = Hidden(NUMBERS[name], 7)
    program = loaded(module, "symbolic")
    assert not program.opaque
    assert largest_difference(run_both(program.origin.capture, module, (example(),), {})) < 1e-5  # type: ignore[union-attr]
    moved = program.act({s: s.random(np.random.default_rng(0)) for s in program.spaces})
    assert not apart("act", outputs(module, example()), outputs(emitted(moved), example()), 1e-4)


def test_a_size_rounded_up_follows_dynamic_sizes() -> None:
    module = Hidden(lambda m, x: x * -(-x.size(1) // 2) * -(-x.size(0) // 2))
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = cipm_ir.load(module, example_inputs=(example(),), method="export", dynamic_shapes=dynamic)
    moved = program.act({s: s.random(np.random.default_rng(0)) for s in program.spaces})
    assert not apart("act", outputs(module, example(5)), outputs(emitted(moved), example(5)), 1e-4)


def test_an_early_linear_softplus_is_not_a_softplus() -> None:
    program = loaded(Hidden(lambda m, x: F.softplus(x * 20, 2, 3)), "symbolic")
    assert [node.op for node in program.opaque] == ["softplus"]
    assert not loaded(Hidden(lambda m, x: F.softplus(x, 2)), "symbolic").opaque


def test_a_stale_size_is_found_out() -> None:
    """The negative control: a scale that shrinks with the units is another function."""
    module = Hidden(CASES["a size as a factor"])
    program = loaded(module, "symbolic")
    keep = {program.spaces[0]: np.array([0, 3, 5])}
    dead = killed(program, keep)
    stale = emitted(restricted(dead, keep))
    wrong = [torch.from_numpy(outputs(stale, example())[0]) * math.sqrt(8 / 3)]
    assert apart("restrict", outputs(emitted(dead), example()), [w.numpy() for w in wrong], 1e-5)
