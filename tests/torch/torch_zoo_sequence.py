"""Taggers and encoders: LSTM, GRU, fused query-key-value layouts, torch.nn's own transformer layers."""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, register, tokens
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 37, 7
IDS = tokens(VOCABULARY, LENGTH)


class Tagger(nn.Module):
    """Embedding, a recurrent network, one Linear per position."""

    def __init__(self, network: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, network.input_size)
        self.rnn = network
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Any:
        outputs, _ = self.rnn(self.embedding(ids))
        return self.head(self.dropout(outputs))


@register("lstm_tagger", "rnn", inputs=IDS)
def lstm_tagger() -> nn.Module:
    """One direction, two layers."""
    return Tagger(nn.LSTM(10, 13, num_layers=2, batch_first=True, dropout=0.1), 13)


@register("lstm_tagger_bidirectional", "rnn", inputs=IDS)
def lstm_tagger_bidirectional() -> nn.Module:
    """Both directions, two layers."""
    return Tagger(nn.LSTM(10, 13, num_layers=2, batch_first=True, bidirectional=True), 26)


@register("gru_tagger", "rnn", inputs=IDS)
def gru_tagger() -> nn.Module:
    """One direction, two layers."""
    return Tagger(nn.GRU(10, 13, num_layers=2, batch_first=True), 13)


@register("gru_tagger_bidirectional", "rnn", inputs=IDS)
def gru_tagger_bidirectional() -> nn.Module:
    """Both directions, one layer, without biases."""
    return Tagger(nn.GRU(10, 13, batch_first=True, bidirectional=True, bias=False), 26)


@register("rnn_tagger", "rnn", "extra", inputs=IDS)
def rnn_tagger() -> nn.Module:
    """The plain recurrent network with tanh."""
    return Tagger(nn.RNN(10, 13, batch_first=True), 13)


@register("lstm_last_state", "rnn", "extra", inputs=floats((9, 2, 6)))
class LastState(nn.Module):
    """Time first, learned initial states, classification from the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 10)
        self.hidden_bias, self.cell_bias = nn.Parameter(torch.zeros(13)), nn.Parameter(torch.zeros(13))
        self.rnn = nn.LSTM(10, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Any:
        start = (self.hidden_bias.expand(1, 2, 13).contiguous(), self.cell_bias.expand(1, 2, 13).contiguous())
        _, (hidden, _) = self.rnn(F.relu(self.encoder(x)), start)
        return self.head(hidden[-1])


@register("gru_cell", "rnn", "extra", inputs=floats((2, 4, 6)))
class CellLoop(nn.Module):
    """GRUCell and LSTMCell stepped by hand over four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(6, 11), nn.LSTMCell(11, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        state, hidden, cell = x.new_zeros(2, 11), x.new_zeros(2, 9), x.new_zeros(2, 9)
        for step in range(4):
            state = self.gru(x[:, step], state)
            hidden, cell = self.lstm(state, (hidden, cell))
        return self.head(hidden)


def attend(query: Tensor, key: Tensor, value: Tensor, size: int) -> Any:
    """Softmax attention written out, the scale as a literal."""
    scores = query @ key.transpose(-2, -1) * size**-0.5
    return scores.softmax(dim=-1) @ value


class FusedAttention(nn.Module):
    """One Linear for query, key and value, its output units in the order [3, heads, size] (timm's ViT)."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.proj = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = attend(query, key, value, self.head_dim)
        return self.proj(x.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class HeadMajorAttention(FusedAttention):
    """The same with the units in the order [heads, 3, size] (GPT-NeoX)."""

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        x = attend(query, key, value, self.head_dim)
        return self.proj(x.permute(0, 2, 1, 3).contiguous().view(batch, length, self.num_heads * self.head_dim))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, attention: nn.Module, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Embeddings with learned positions, blocks, norm, head."""

    def __init__(self, *attentions: nn.Module, width: int = 18, inner: int = 31) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(1, LENGTH, width))
        self.blocks = nn.Sequential(*(Block(attention, width, inner) for attention in attentions))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.position)))


@register("encoder_qkv_3hd", "transformer", inputs=IDS)
def encoder_3hd() -> nn.Module:
    """Fused query, key, value as [3, heads, size]."""
    return Encoder(FusedAttention(18, 3, 4), FusedAttention(18, 3, 4))


@register("encoder_qkv_head_major", "transformer", inputs=IDS)
def encoder_head_major() -> nn.Module:
    """Fused query, key, value as [heads, 3, size]."""
    return Encoder(HeadMajorAttention(18, 3, 4), HeadMajorAttention(18, 3, 4))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on one input."""

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


@register("multihead_attention", "transformer", inputs=IDS)
def multihead_attention() -> nn.Module:
    """nn.MultiheadAttention in a pre-norm encoder."""
    return Encoder(SelfAttention(18, 3), SelfAttention(18, 3, bias=False))


@register("multihead_attention_time_first", "transformer", "extra", inputs=floats((7, 2, 18), (5, 2, 10)))
class CrossAttention(nn.Module):
    """batch_first=False, keys and values of another width, extra key and value biases, weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(18, 3, kdim=10, vdim=10, add_bias_kv=True)
        self.norm = nn.LayerNorm(18)
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        attended, weights = self.attention(x, memory, memory)
        return self.head(self.norm(x + attended)), weights


@register("torch_transformer_encoder", "transformer", inputs=IDS)
class TransformerEncoder(nn.Module):
    """nn.TransformerEncoder, post-norm, ReLU; with an even number of heads torch runs it as one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 18)
        layer = nn.TransformerEncoderLayer(18, 2, dim_feedforward=31, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(18, 5)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.encoder(self.embedding(ids)))


@register("torch_transformer_encoder_pre_norm", "transformer", inputs=floats((7, 2, 18)))
class PreNormEncoder(nn.Module):
    """The same, pre-norm, GELU, time first, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(18, 3, dim_feedforward=31, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(18), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encoder(x, mask=self.mask, is_causal=True))


class Decoder(nn.Module):
    """nn.TransformerDecoder with self- and cross-attention and a causal mask."""

    def __init__(self, is_causal: bool | None) -> None:
        super().__init__()
        self.is_causal = is_causal
        layer = nn.TransformerDecoderLayer(18, 3, dim_feedforward=31, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        return self.head(self.decoder(x, memory, tgt_mask=self.mask, tgt_is_causal=self.is_causal))


@register("torch_transformer_decoder", "transformer", inputs=floats((2, 7, 18), (2, 5, 18)))
def torch_transformer_decoder() -> nn.Module:
    """The mask is said to be causal."""
    return Decoder(True)


@register("torch_transformer_decoder_guess", "transformer", "extra", "no_export", inputs=floats((2, 7, 18), (2, 5, 18)))
def torch_transformer_decoder_guess() -> nn.Module:
    """Torch looks at the values of the mask to see whether it is causal, which torch.export cannot follow."""
    return Decoder(None)
