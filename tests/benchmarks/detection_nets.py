"""Small transformers, convolution nets and audio nets, exported from torch with weights spread as training spreads them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDTH, _HEADS, _LENGTH, _WORDS = 32, 4, 12, 60


# --- transformers ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Heads with separate products; `groups` key and value heads; rotary or additive-mask variants."""

    def __init__(self, groups: int = _HEADS, rotary: bool = False) -> None:
        super().__init__()
        self.size, self.groups, self.rotary = _WIDTH // _HEADS, groups, rotary
        self.q, self.o = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.k, self.v = (nn.Linear(_WIDTH, groups * self.size) for _ in range(2))
        angle = torch.arange(64)[:, None] * 100.0 ** (-torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1))

    def turn(self, x: Tensor) -> Tensor:
        if not self.rotary:
            return x
        a, b = x.chunk(2, -1)
        return x * self.cos[: x.shape[-2]] + torch.cat([-b, a], -1) * self.sin[: x.shape[-2]]

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
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
        self.gate, self.up = (nn.Linear(_WIDTH, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, _WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _feed(activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(_WIDTH, 64), activation(), nn.Linear(64, _WIDTH))


class Block(nn.Module):
    def __init__(self, attention: Attention, feed: nn.Module, norm: Callable[[], nn.Module], before: bool) -> None:
        super().__init__()
        self.attention, self.feed, self.before = attention, feed, before
        self.first, self.second = norm(), norm()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.before:
            x = x + self.attention(self.first(x), mask)
            return x + self.feed(self.second(x))
        x = self.first(x + self.attention(x, mask))
        return self.second(x + self.feed(x))


def _layer_norm() -> nn.Module:
    return nn.LayerNorm(_WIDTH)


class Decoder(nn.Module):
    """Tokens in, logits out; pre-normalized; tied or own head; learned or rotary positions."""

    def __init__(self, *, rotary: bool, groups: int = _HEADS, depth: int = 2) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(_WIDTH)) if rotary else _layer_norm
        self.words = nn.Embedding(_WORDS, _WIDTH)
        self.places = None if rotary else nn.Embedding(24, _WIDTH)
        feeds = (Gated() if rotary else _feed() for _ in range(depth))
        self.blocks = nn.ModuleList(Block(Attention(groups, rotary), feed, norm, True) for feed in feeds)
        self.norm = norm()
        self.head = nn.Linear(_WIDTH, _WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
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
        self.words, self.places = nn.Embedding(_WORDS, _WIDTH), nn.Embedding(24, _WIDTH)
        self.types, self.norm = nn.Embedding(2, _WIDTH), nn.LayerNorm(_WIDTH, eps=1e-12)
        self.blocks = nn.ModuleList(Block(Attention(), _feed(), _layer_norm, False) for _ in range(2))
        self.pool = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
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
        self.patch = nn.Conv2d(3, _WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, _WIDTH))
        self.places = nn.Parameter(torch.randn(1, 17, _WIDTH) * 0.3)
        self.blocks = nn.ModuleList(Block(Attention(), _feed(), _layer_norm, True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0]).softmax(-1)


class Crossed(nn.Module):
    """An encoder of features and a decoder that attends to it, ReLU inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(Attention(), _feed(nn.ReLU), _layer_norm, True)
        self.own, self.cross, self.feed = Attention(), Attention(), _feed(nn.ReLU)
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(4))
        self.into, self.out = nn.Linear(20, _WIDTH), nn.Linear(_WIDTH, 15)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        memory = self.norms[3](self.inner(self.into(features)))
        x = queries + self.own(self.norms[0](queries))
        x = x + self.cross(self.norms[1](x), None, memory)
        return self.out(x + self.feed(self.norms[2](x))).log_softmax(-1)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(5))
        mixers = [nn.Sequential(nn.Linear(_LENGTH, 24), nn.GELU(), nn.Linear(24, _LENGTH)) for _ in range(2)]
        self.tokens, self.channels = nn.ModuleList(mixers), nn.ModuleList(_feed() for _ in range(2))
        self.head = nn.Linear(_WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for k in range(2):
            x = x + self.tokens[k](self.norms[2 * k](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[k](self.norms[2 * k + 1](x))
        return self.head(self.norms[4](x).mean(1))


# --- convolutions ---------------------------------------------------------------------------------


def _conv(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), *([] if act is None else [act]))


class Residual(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(a, b, 3, stride, act=nn.ReLU()), _conv(b, b))
        self.short = _conv(a, b, 1, stride) if stride > 1 or a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """Expansion, depthwise, squeeze and excitation, projection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        inner = 3 * size
        self.expand = _conv(size, inner, 1, act=nn.Hardswish())
        self.depth = _conv(inner, inner, 3, groups=inner, act=nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 8, 1), nn.ReLU(), nn.Conv2d(8, inner, 1))
        self.project = _conv(inner, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        return x + self.project(y * F.hardsigmoid(self.squeeze(y)))


class UNet(nn.Module):
    """Skips, a transposed convolution, and a sigmoid whose bias saturates it, as a detector of rare things has it."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.down, self.low = _conv(3, 12, act=nn.ReLU()), _conv(12, 24, 3, 2, act=nn.ReLU())
        self.up, self.join = nn.ConvTranspose2d(24, 12, 2, 2), _conv(24, 12, act=nn.ReLU())
        self.out, self.bias = nn.Conv2d(12, 1, 1), bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        z = self.join(torch.cat([y, self.up(self.low(y))], 1))
        return torch.sigmoid(self.out(z) + self.bias)


class NextBlock(nn.Module):
    """ConvNeXt: layer norm over channels, a small layer scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(size, size, 7, padding=3, groups=size), nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.gain = nn.Parameter(torch.full((size,), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.gain * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Boxes(nn.Module):
    """A detection head: boxes in pixels beside scores between 0 and 1, in one output of seven rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 16, 3, 2, act=nn.SiLU()), Residual(16, 16, 1), _conv(16, 16, act=nn.SiLU()))
        self.box, self.score = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        boxes = F.softplus(self.box(y)).flatten(2) * 320
        return torch.cat([boxes, torch.sigmoid(self.score(y) - 6).flatten(2)], 1)


class Heads(nn.Module):
    """Global pooling and two layers; logits, or probabilities from a softmax."""

    def __init__(self, body: nn.Module, size: int, probabilities: bool) -> None:
        super().__init__()
        self.body, self.hidden, self.out = body, nn.Linear(size, 32), nn.Linear(32, 10)
        self.probabilities = probabilities

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.relu(self.hidden(self.body(x).mean((2, 3)))))
        return y.softmax(-1) if self.probabilities else y


# --- audio ----------------------------------------------------------------------------------------


class LogMel(nn.Module):
    """Windowed Fourier transform by a convolution, mel bands, log(x + 1e-10), and a small net."""

    def __init__(self) -> None:
        super().__init__()
        size, bands = 64, 12
        n = torch.arange(size)
        angle = 2 * torch.pi * n * torch.arange(size // 2 + 1)[:, None] / size
        window = torch.hann_window(size)
        self.register_buffer("fourier", torch.cat([angle.cos() * window, -angle.sin() * window])[:, None])
        centre = torch.linspace(1, size // 2, bands)[:, None]
        self.register_buffer("mel", torch.relu(1 - (torch.arange(size // 2 + 1) - centre).abs() / 4))
        self.norm = nn.BatchNorm1d(bands)
        self.net = nn.Sequential(
            nn.Conv1d(bands, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1), nn.ReLU()
        )
        self.out = nn.Linear(24, 5)

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = F.conv1d(wave[:, None], self.fourier, stride=32)
        real, imaginary = spectrum.chunk(2, 1)
        power = real**2 + imaginary**2
        logs = torch.log(self.mel @ power + 1e-10)
        return torch.sigmoid(self.out(self.net(self.norm(logs)).mean(-1)))


class Temporal(nn.Module):
    """Dilated one-dimensional convolutions with residuals and PReLU, as separators of speech have them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(1, 16, 16, 8), nn.ConvTranspose1d(16, 1, 16, 8)
        self.norms = nn.ModuleList(nn.GroupNorm(1, 32) for _ in range(3))
        self.into = nn.ModuleList(nn.Conv1d(16, 32, 1) for _ in range(3))
        self.depth = nn.ModuleList(nn.Conv1d(32, 32, 3, padding=2**k, dilation=2**k, groups=32) for k in range(3))
        self.back, self.slopes = nn.ModuleList(nn.Conv1d(32, 16, 1) for _ in range(3)), nn.PReLU(32, 0.2)

    def forward(self, wave: Tensor) -> Tensor:
        start = torch.relu(self.encode(wave))
        x = start
        for k in range(3):
            y = self.slopes(self.norms[k](self.into[k](x)))
            x = x + self.back[k](self.depth[k](y))
        return self.decode(start * torch.sigmoid(x))


class Recurrent(nn.Module):
    """Convolutions over a spectrogram, then a recurrent layer; one vector for each step."""

    def __init__(self, layer: nn.RNNBase, size: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(1, 8, 3, act=nn.ReLU()), nn.MaxPool2d((2, 1)), _conv(8, 12, 3, act=nn.ReLU()))
        self.layer, self.out, self.activation = layer, nn.Linear(size, 7), activation

    def forward(self, spectrogram: Tensor) -> Tensor:
        y = self.conv(spectrogram[:, None]).flatten(1, 2).transpose(1, 2)
        y = self.out(self.layer(y)[0])
        return y.log_softmax(-1) if self.activation == "log_softmax" else torch.sigmoid(y)


class Masked(nn.Module):
    """A mask for a spectrogram, from a recurrent layer: large and small bins side by side in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(2, -6, 20))
        self.into, self.layer, self.out = nn.Linear(20, 24), nn.GRU(24, 24, batch_first=True), nn.Linear(24, 20)

    def forward(self, magnitude: Tensor) -> Tensor:
        x = magnitude.abs() * torch.exp(self.mean)
        y = self.layer(torch.tanh(self.into(torch.log1p(x))))[0]
        return x * torch.sigmoid(self.out(y))


class Speech(nn.Module):
    """Strided convolutions with group norm and GELU over a wave, then a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 16, 10, 5, bias=False), nn.GroupNorm(16, 16)
        self.second, self.project = nn.Conv1d(16, 16, 3, 2, bias=False), nn.Linear(16, _WIDTH)
        self.block, self.middle, self.out = (
            Block(Attention(), _feed(), _layer_norm, False),
            nn.LayerNorm(16),
            nn.Linear(_WIDTH, 8),
        )

    def forward(self, wave: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.norm(self.first(wave[:, None])))))
        return self.out(self.block(self.project(self.middle(x.transpose(1, 2)))))


# --- the list -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """How one net is made and exported.

    Attributes:
        kind: "transformer", "convolution" or "audio".
        make: its module.
        inputs: an example.
        opset: of the file.
        dynamo: by torch.export; else by tracing, which writes weights and small constants in other ways.
        dynamic: where traced, the first two axes of every input get names.
        folded: with batch normalizations folded by the exporter.
        spread: standard deviation of the log of each output channel's scale.
    """

    kind: str
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    opset: int = 18
    dynamo: bool = True
    dynamic: bool = False
    folded: bool = True
    spread: float = 0.4


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _image(size: int = 16) -> tuple[Tensor, ...]:
    return (torch.zeros(1, 3, size, size),)


def _resnet() -> nn.Module:
    return nn.Sequential(_conv(3, 12, act=nn.ReLU()), Residual(12, 12, 1), Residual(12, 20, 2))


def _mobile() -> nn.Module:
    return nn.Sequential(_conv(3, 12, 3, 2, act=nn.Hardswish()), Inverted(12), Inverted(12))


def _grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=4)]
    return nn.Sequential(*layers, nn.GroupNorm(4, 16), nn.SiLU())


def _next() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), NextBlock(16), NextBlock(16))


_SPECTROGRAM = (torch.zeros(1, 16, 20),)

SPECS: dict[str, Spec] = {
    "pre_ln_decoder": Spec("transformer", lambda: Decoder(rotary=False), (_ids(1, _LENGTH),)),
    "rope_gqa_decoder": Spec("transformer", lambda: Decoder(rotary=True, groups=2), (_ids(1, _LENGTH),), 20),
    "post_ln_encoder": Spec("transformer", Encoder, (_ids(1, _LENGTH),) * 3, 17),
    "post_ln_encoder_traced": Spec("transformer", Encoder, (_ids(1, _LENGTH),) * 3, 17, False, dynamic=True),
    "patches_softmax": Spec("transformer", Patches, _image(), 19),
    "cross_attention": Spec("transformer", Crossed, (torch.zeros(1, 9, 20), torch.zeros(1, 5, _WIDTH))),
    "mixer": Spec("transformer", Mixer, (torch.zeros(1, _LENGTH, _WIDTH),)),
    "residual_bn": Spec("convolution", lambda: Heads(_resnet(), 20, False), _image(), folded=False),
    "residual_bn_traced": Spec("convolution", lambda: Heads(_resnet(), 20, True), _image(), 17, False),
    "mobile_se": Spec("convolution", lambda: Heads(_mobile(), 12, False), _image(), folded=False),
    "group_norm": Spec("convolution", lambda: Heads(_grouped(), 16, False), _image()),
    "convnext": Spec("convolution", lambda: Heads(_next(), 16, True), _image(), 20),
    "unet_sigmoid": Spec("convolution", lambda: UNet(0.0), _image()),
    "unet_saturated": Spec("convolution", lambda: UNet(-14.0), _image()),
    "boxes_and_scores": Spec("convolution", Boxes, _image()),
    "log_mel": Spec("audio", LogMel, (torch.zeros(1, 800),)),
    "temporal": Spec("audio", Temporal, (torch.zeros(1, 1, 400),)),
    "crnn_gru": Spec("audio", lambda: Recurrent(nn.GRU(96, 20, batch_first=True), 20, ""), _SPECTROGRAM, 17, False),
    "crnn_lstm": Spec(
        "audio",
        lambda: Recurrent(nn.LSTM(96, 14, batch_first=True, bidirectional=True), 28, "log_softmax"),
        _SPECTROGRAM,
        17,
        False,
    ),
    "mask_gru": Spec("audio", Masked, (torch.zeros(1, 18, 20),), 17, False),
    "speech": Spec("audio", Speech, (torch.zeros(1, 400),)),
}


def _spread(module: nn.Module, width: float, rng: np.random.Generator) -> None:
    """Give each output channel a scale of its own, each bias and statistic a value, as training does."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        leaf, shape = name.rsplit(".", 1)[-1], tuple(tensor.shape)
        if leaf == "running_var":
            new = rng.lognormal(0.0, 0.7, shape)
        elif leaf == "running_mean" or (leaf.startswith("bias") and len(shape) == 1):
            new = rng.normal(0.0, 0.2, shape)
        elif len(shape) == 1 and "weight" in leaf:
            new = rng.lognormal(0.0, 0.3, shape)
        elif len(shape) > 1 and isinstance(tensor, nn.Parameter):
            scale = rng.lognormal(0.0, width, (shape[0], *[1] * (len(shape) - 1)))
            new = tensor.detach().numpy() * scale
        else:
            continue
        tensor.data = torch.from_numpy(np.asarray(new)).to(tensor.dtype)


def build(name: str, folder: Path) -> onnx.ModelProto:
    """Export a net into a folder, or read it there."""
    path = folder / f"{name}.onnx"
    if not path.is_file():
        spec = SPECS[name]
        torch.manual_seed(zlib.crc32(name.encode()))
        module = spec.make().eval()
        _spread(module, spec.spread, np.random.default_rng(zlib.crc32(name.encode())))
        options: dict[str, Any] = {"dynamo": spec.dynamo, "opset_version": spec.opset, "verbose": False}
        if spec.dynamo:
            options |= {"external_data": False, "optimize": spec.folded}
        elif spec.dynamic:
            names = [f"input_{k}" for k in range(len(spec.inputs))]
            axes = dict.fromkeys(names, {0: "batch", 1: "length"})
            options |= {"input_names": names, "dynamic_axes": axes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, spec.inputs, str(path), **options)
    return onnx.load(path)
