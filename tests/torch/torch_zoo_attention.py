"""Attention in its many spellings: einsum, causal masks, grouped queries, rotary positions, relative biases."""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, register
from tests.torch.torch_zoo_sequence import attend
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LENGTH = 14, 7
VECTORS = floats((2, LENGTH, WIDTH))


class Attention(nn.Module):
    """Projections and a residual around `mix`, which subclasses write: [b, n, h, d] queries, [b, n, k, d] keys."""

    heads, kv_heads, size = 3, 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, self.heads * self.size)
        self.key = nn.Linear(WIDTH, self.kv_heads * self.size, bias=False)
        self.value = nn.Linear(WIDTH, self.kv_heads * self.size)
        self.out = nn.Linear(self.heads * self.size, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """Attention on [b, h, n, d] tensors; the same layout back."""
        return attend(query, key, value, self.size)

    def split(self, x: Tensor, heads: int) -> Any:
        return x.view(x.shape[0], LENGTH, heads, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Any:
        query = self.split(self.query(x), self.heads)
        key, value = self.split(self.key(x), self.kv_heads), self.split(self.value(x), self.kv_heads)
        mixed = self.mix(query, key, value).transpose(1, 2).reshape(x.shape[0], LENGTH, self.heads * self.size)
        return self.head(x + self.out(mixed))


@register("attention_einsum", "extra", "transformer", inputs=VECTORS)
class EinsumAttention(Attention):
    """Einsum throughout, also for the output projection on a weight with three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.out_weight = nn.Parameter(torch.zeros(WIDTH, self.heads, self.size))
        del self.out

    def forward(self, x: Tensor) -> Any:
        query = self.query(x).view(2, LENGTH, self.heads, self.size)
        key = self.key(x).view(2, LENGTH, self.heads, self.size)
        value = self.value(x).unflatten(-1, (self.heads, self.size))
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", query, key) / 2.0, dim=-1)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, value)
        return self.head(x + torch.einsum("bihd,ohd->bio", mixed, self.out_weight))


@register("attention_causal_buffer", "extra", "transformer", inputs=VECTORS, symbolic=False)
class CausalBuffer(Attention):
    """masked_fill with a triangular buffer cut to the sequence (minimal GPT code); fx cannot slice by a proxy."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(9, 9)).view(1, 1, 9, 9), persistent=False)

    def length(self, query: Tensor) -> int:
        return query.size(2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        length = self.length(query)
        scores = query @ key.transpose(-2, -1) * (1.0 / self.size**0.5)
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ value


@register("attention_causal_buffer_fixed", "extra", "transformer", inputs=VECTORS)
class CausalBufferFixed(CausalBuffer):
    """The same with the length as a literal."""

    def length(self, query: Tensor) -> int:
        return LENGTH


@register("attention_sdpa_causal", "extra", "transformer", inputs=VECTORS)
class CausalFused(Attention):
    """scaled_dot_product_attention with is_causal."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@register("attention_sdpa_mask", "extra", "transformer", inputs=VECTORS)
class MaskedFused(Attention):
    """scaled_dot_product_attention with a bias for every head, which distinguishes the heads, and a scale."""

    distance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.ones(self.heads))
        distance = torch.arange(LENGTH)[None, :] - torch.arange(LENGTH)[:, None]
        self.register_buffer("distance", -distance.abs().float())

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        bias = self.slopes[:, None, None] * self.distance
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.7)


@register("attention_gqa_expand", "extra", "transformer", "gqa", inputs=VECTORS)
class GroupedExpand(Attention):
    """Six query heads on two key-value heads, repeated by expand and reshape."""

    heads, kv_heads, size = 6, 2, 4

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        times = self.heads // self.kv_heads
        x = x[:, :, None, :, :].expand(batch, heads, times, length, size)
        return x.reshape(batch, heads * times, length, size)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attend(query, self.repeat(key), self.repeat(value), self.size)


@register("attention_gqa_interleave", "extra", "transformer", "gqa", inputs=VECTORS)
class GroupedInterleave(GroupedExpand):
    """The same repeated by repeat_interleave."""

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)


@register("attention_gqa_fused", "extra", "transformer", "gqa", inputs=VECTORS)
class GroupedFused(Attention):
    """The same inside scaled_dot_product_attention (enable_gqa)."""

    heads, kv_heads, size = 6, 2, 4

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@register("attention_multi_query", "extra", "transformer", "gqa", inputs=VECTORS)
class MultiQuery(Attention):
    """One key-value head, broadcast over all query heads."""

    heads, kv_heads, size = 3, 1, 4


def rotate_half(x: Tensor) -> Tensor:
    """The second half, negated, before the first."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Rotary(Attention):
    """Rotary positions on halves; angles are a buffer."""

    cos: Tensor
    sin: Tensor

    heads, kv_heads, size = 3, 3, 6

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        return x * self.cos + rotate_half(x) * self.sin

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attend(self.rotate(query), self.rotate(key), value, self.size)


register("attention_rotary", "extra", "transformer", "rotary", inputs=VECTORS)(Rotary)


@register("attention_rotary_interleaved", "extra", "transformer", "rotary", inputs=VECTORS)
class RotaryInterleaved(Rotary):
    """Rotary positions on neighbouring pairs, by strided slices and stack."""

    def rotate(self, x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = self.cos[:, :3], self.sin[:, :3]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@register("attention_relative_bias", "extra", "transformer", inputs=VECTORS)
class RelativeBias(Attention):
    """A table of biases for every head and distance, indexed by a buffer (Swin)."""

    relative_index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.relative_bias_table = nn.Parameter(torch.zeros(2 * LENGTH - 1, self.heads))
        places = torch.arange(LENGTH)
        self.register_buffer("relative_index", places[:, None] - places[None, :] + LENGTH - 1)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        bias = self.relative_bias_table[self.relative_index.view(-1)].view(LENGTH, LENGTH, self.heads)
        scores = query @ key.transpose(-2, -1) + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        return scores.softmax(-1) @ value


@register("attention_bmm", "extra", "transformer", inputs=VECTORS)
class BatchMatrices(Attention):
    """Heads folded into the batch; bmm and baddbmm."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        folded = [x.reshape(2 * self.heads, LENGTH, self.size) for x in (query, key, value)]
        start = folded[0].new_zeros(1, LENGTH, LENGTH)
        scores = torch.baddbmm(start, folded[0], folded[1].transpose(1, 2), beta=0.0, alpha=0.5)
        return torch.bmm(scores.softmax(2), folded[2]).view(2, self.heads, LENGTH, self.size)


@register("attention_head_scale", "extra", "transformer", inputs=VECTORS)
class QueryKeyNorm(Attention):
    """Queries and keys normalized within each head by shared RMS norms; one learned scale for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(self.size), nn.LayerNorm(self.size)
        self.head_scale = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.head_scale * attend(self.query_norm(query), self.key_norm(key), value, self.size)
