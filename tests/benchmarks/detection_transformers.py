"""Small transformers: both places of the norm, rotary positions, masks, patches, cross-attention, token mixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LENGTH, WORDS = 32, 12, 60
_HEADS = 4


class Attention(nn.Module):
    """Heads with separate products; `groups` key and value heads; rotary or additive-mask variants."""

    cos: Tensor
    sin: Tensor

    def __init__(self, groups: int = _HEADS, rotary: bool = False) -> None:
        super().__init__()
        self.size, self.groups, self.rotary = WIDTH // _HEADS, groups, rotary
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, groups * self.size) for _ in range(2))
        angle = torch.arange(64)[:, None] * 100.0 ** (-torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1))

    def turn(self, x: Tensor) -> Any:
        if not self.rotary:
            return x
        a, b = x.chunk(2, -1)
        return x * self.cos[: x.shape[-2]] + torch.cat([-b, a], -1) * self.sin[: x.shape[-2]]

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Any:
        source = x if memory is None else memory
        q = self.turn(self.q(x).unflatten(-1, (_HEADS, self.size)).transpose(1, 2))
        k, v = (layer(source).unflatten(-1, (self.groups, self.size)).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (t.repeat_interleave(_HEADS // self.groups, 1) for t in (self.turn(k), v))
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        scores = scores if mask is None else scores + mask
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def feed_forward(activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 64), activation(), nn.Linear(64, WIDTH))


class Block(nn.Module):
    def __init__(self, attention: Attention, feed: nn.Module, norm: Callable[[], nn.Module], before: bool) -> None:
        super().__init__()
        self.attention, self.feed, self.before = attention, feed, before
        self.first, self.second = norm(), norm()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        if self.before:
            x = x + self.attention(self.first(x), mask)
            return x + self.feed(self.second(x))
        x = self.first(x + self.attention(x, mask))
        return self.second(x + self.feed(x))


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


class Decoder(nn.Module):
    """Tokens in, logits out; pre-normalized; tied or own head; learned or rotary positions."""

    def __init__(self, *, rotary: bool, groups: int = _HEADS, depth: int = 2) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(WIDTH)) if rotary else layer_norm
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = None if rotary else nn.Embedding(24, WIDTH)
        feeds = (Gated() if rotary else feed_forward() for _ in range(depth))
        self.blocks = nn.ModuleList(Block(Attention(groups, rotary), feed, norm, True) for feed in feeds)
        self.norm = norm()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1]))
        mask = torch.full((ids.shape[1], ids.shape[1]), -1e9).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """Post-normalized, with a mask of padding and token types; gives the sequence and a pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(24, WIDTH)
        self.types, self.norm = nn.Embedding(2, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        self.blocks = nn.ModuleList(Block(Attention(), feed_forward(), layer_norm, False) for _ in range(2))
        self.pool = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Any, Any]:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])) + self.types(token_type_ids)
        x = self.norm(x)
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -10000.0
        for block in self.blocks:
            x = block(x, mask)
        return x, torch.tanh(self.pool(x[:, 0]))


class Patches(nn.Module):
    """A vision transformer with a class token; probabilities out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.3)
        self.blocks = nn.ModuleList(Block(Attention(), feed_forward(), layer_norm, True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Any:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0]).softmax(-1)


class Crossed(nn.Module):
    """An encoder of features and a decoder that attends to it, ReLU inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(Attention(), feed_forward(nn.ReLU), layer_norm, True)
        self.own, self.cross, self.feed = Attention(), Attention(), feed_forward(nn.ReLU)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.into, self.out = nn.Linear(20, WIDTH), nn.Linear(WIDTH, 15)

    def forward(self, features: Tensor, queries: Tensor) -> Any:
        memory = self.norms[3](self.inner(self.into(features)))
        x = queries + self.own(self.norms[0](queries))
        x = x + self.cross(self.norms[1](x), None, memory)
        return self.out(x + self.feed(self.norms[2](x))).log_softmax(-1)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        mixers = [nn.Sequential(nn.Linear(LENGTH, 24), nn.GELU(), nn.Linear(24, LENGTH)) for _ in range(2)]
        self.tokens, self.channels = nn.ModuleList(mixers), nn.ModuleList(feed_forward() for _ in range(2))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Any:
        for k in range(2):
            x = x + self.tokens[k](self.norms[2 * k](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[k](self.norms[2 * k + 1](x))
        return self.head(self.norms[4](x).mean(1))
