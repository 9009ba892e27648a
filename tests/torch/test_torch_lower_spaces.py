"""Symmetry survives lowering: the hidden spaces of torch programs that reshape, split, join and repeat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from tests.torch.torch_running import feeds_of
from tests.torch.torch_shape_cases import METHODS, Function
from torch import nn
from torch.nn import functional as F

from cipm_ir.frontends.torch.load import load_torch
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program


class Attention(nn.Module):
    """Four heads of four: queries, keys and values from one layer, taken apart in the ways that programs do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(8, 48)
        self.o = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        y, n, t = self.qkv(x), x.size(0), x.size(1)
        if self.how == "unbind":
            parts = y.reshape(n, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "index":
            parts = y.view(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        elif self.how == "chunk":
            chunks = y.chunk(3, -1)
            parts = [chunks[k].view(n, t, 4, 4).transpose(1, 2) for k in range(3)]
        else:
            pieces = y.split(16, -1)
            parts = [pieces[k].unflatten(-1, (4, -1)).movedim(2, 1) for k in range(3)]
        weights = (parts[0] @ parts[1].transpose(-2, -1)).softmax(-1)
        return self.o((weights @ parts[2]).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Two heads of keys and values for four of queries."""

    def __init__(self, interleave: bool) -> None:
        super().__init__()
        self.interleave = interleave
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        n, t = x.size(0), x.size(1)
        q = self.q(x).view(n, t, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(n, t, 2, 4).transpose(1, 2) for layer in (self.k, self.v))
        if self.interleave:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)
        else:
            k, v = (y[:, :, None].expand(n, 2, 2, t, 4).reshape(n, 4, t, 4) for y in (k, v))
        return self.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Between(nn.Module):
    """A hidden space of eight channels with something between its two layers."""

    def __init__(self, between: Function) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 4, 1)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8).reshape(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.between(self, F.relu(self.first(x))))


class Token(nn.Module):
    """Patches, a class token, positions, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.ones(1, 1, 6)), nn.Embedding(9, 6)
        self.patches, self.last = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.size(0), -1, -1), y], 1)
        return self.last((y + self.places(torch.arange(y.size(1), device=x.device)))[:, 0])


def _pair(parts: Any) -> Any:
    return F.silu(parts[0]) * parts[1]


class Gated(nn.Module):
    """Two halves of one layer, one the gate of the other."""

    def __init__(self, halves: Function) -> None:
        super().__init__()
        self.up, self.halves, self.down = nn.Linear(8, 16), halves, nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(_pair(self.halves(self.up(x))))


class Flat(nn.Module):
    """Channels and places flattened before a linear layer."""

    def __init__(self, flat: Function) -> None:
        super().__init__()
        self.conv, self.flat, self.last = nn.Conv2d(3, 8, 2, 2), flat, nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.flat(F.relu(self.conv(x))))


_IMAGE, _TOKENS = torch.linspace(-1, 1, 144).reshape(2, 3, 4, 6).sin(), torch.linspace(-1, 1, 80).reshape(2, 5, 8).cos()
HEADS = [4] * 9
BETWEEN: dict[str, Function] = {
    "zeros_like": lambda m, x: x + torch.zeros_like(x),
    "expand_as": lambda m, x: x * m.gain.expand_as(x),
    "expand literal": lambda m, x: x * m.gain.expand(2, 8, 4, 6),
    "flatten 0 1": lambda m, x: x.flatten(0, 1).unflatten(0, (x.size(0), -1)),
    "flatten 1 2": lambda m, x: x.flatten(1, 2).view(x.size(0), x.size(1), 4, 6),
    "roll": lambda m, x: torch.roll(x, (1, -2), (2, 3)),
    "flip": lambda m, x: x.flip(1),
    "index": lambda m, x: x[:, [3, 1, 0, 2, 4, 5, 7, 6]],
    "zeros": lambda m, x: x + torch.zeros((x.size(0), x.size(1), 1, 1)),
    "stack": lambda m, x: torch.stack([x, x * 2], 1).sum(1),
    "repeat": lambda m, x: x.repeat(1, 2, 1, 1)[:, :8],
    "size as bound": lambda m, x: x[:, : x.size(1)],
    "size of another": lambda m, x: x.reshape(x.size(0), m.gain.size(1), 4, 6),
}
SYMMETRIC: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[int]]] = {
    **{f"heads by {how}": (partial(Attention, how), _TOKENS, HEADS) for how in ("unbind", "index", "chunk", "split")},
    **{f"between: {name}": (partial(Between, f), _IMAGE, [8]) for name, f in BETWEEN.items()},
    "interleaved heads": (partial(Grouped, True), _TOKENS, [2, 2, 2, 4, 4, 4, 4]),
    "expanded heads": (partial(Grouped, False), _TOKENS, [2, 2, 2, 4, 4, 4, 4]),
    "class token": (Token, _IMAGE, [6]),
    "gate by chunk": (partial(Gated, lambda y: y.chunk(2, -1)), _TOKENS, [8]),
    "gate by split": (partial(Gated, lambda y: y.split(8, -1)), _TOKENS, [8]),
    "gate by size": (partial(Gated, lambda y: y.split(y.size(2) // 2, 2)), _TOKENS, [8]),
    "gate by slices": (partial(Gated, lambda y: (y[..., :8], y[..., 8:])), _TOKENS, [8]),
    "gate by step": (partial(Gated, lambda y: (y[..., ::2], y[..., 1::2])), _TOKENS, [8]),
    "flatten": (partial(Flat, lambda y: y.flatten(1)), _IMAGE, [8]),
    "view -1": (partial(Flat, lambda y: y.view(y.size(0), -1)), _IMAGE, [8]),
    "view literal": (partial(Flat, lambda y: y.view(-1, 48)), _IMAGE, [8]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetry_survives(name: str, method: str) -> None:
    """The hidden spaces are found, their elements keep the function, and units can be taken out."""
    make, x, sizes = SYMMETRIC[name]
    module = make()
    capture = load_torch(module, (x,), method=method)
    program = Program.of(capture.model)
    assert sorted(s.size for s in program.spaces) == sizes
    rng = np.random.default_rng(0)
    moved = program.act({s: s.random(rng) for s in program.spaces})
    with torch.no_grad(), Runner(moved.emit()) as runner:
        wanted, (got,) = module(x).numpy(), runner.run(feeds_of(capture, (x,), {})).values()
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    fewer = program.restrict({s: np.arange(s.size - 1) for s in program.spaces if s.parent is None})
    with Runner(fewer.emit()) as runner:
        (small,) = runner.run(feeds_of(capture, (x,), {})).values()
    assert small.shape == wanted.shape


def test_symmetry_control() -> None:
    """A permutation that the analysis does not offer changes the function: channels under a triangle have an order."""
    torch.manual_seed(0)
    module = Between(lambda m, x: torch.tril(x.transpose(1, 3)).transpose(1, 3))
    capture = load_torch(module, (_IMAGE,))
    assert Program.of(capture.model).spaces == ()
    with torch.no_grad():
        before = module(_IMAGE)
        order = [1, 0, 2, 3, 4, 5, 6, 7]
        module.first.weight.copy_(module.first.weight[order])
        assert module.first.bias is not None
        module.first.bias.copy_(module.first.bias[order])
        module.last.weight.copy_(module.last.weight[:, order])
        assert not torch.allclose(module(_IMAGE), before, atol=1e-3)
