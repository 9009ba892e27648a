"""Small nets, exported from torch with weights spread as training spreads them: what `detection` runs on."""

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
from tests.benchmarks.detection_audio import LogMel, Masked, Recurrent, Speech, Temporal
from tests.benchmarks.detection_convolutions import Boxes, Heads, Inverted, NextBlock, Residual, UNet, conv
from tests.benchmarks.detection_transformers import LENGTH, WIDTH, Crossed, Decoder, Encoder, Mixer, Patches
from torch import Tensor, nn


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


def _ids(*shape: int) -> Any:
    return torch.zeros(shape, dtype=torch.int64)


def _image(size: int = 16) -> tuple[Tensor, ...]:
    return (torch.zeros(1, 3, size, size),)


def _resnet() -> nn.Module:
    return nn.Sequential(conv(3, 12, act=nn.ReLU()), Residual(12, 12, 1), Residual(12, 20, 2))


def _mobile() -> nn.Module:
    return nn.Sequential(conv(3, 12, 3, 2, act=nn.Hardswish()), Inverted(12), Inverted(12))


def _grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=4)]
    return nn.Sequential(*layers, nn.GroupNorm(4, 16), nn.SiLU())


def _next() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), NextBlock(16), NextBlock(16))


_SPECTROGRAM = (torch.zeros(1, 16, 20),)

SPECS: dict[str, Spec] = {
    "pre_ln_decoder": Spec("transformer", lambda: Decoder(rotary=False), (_ids(1, LENGTH),)),
    "rope_gqa_decoder": Spec("transformer", lambda: Decoder(rotary=True, groups=2), (_ids(1, LENGTH),), 20),
    "post_ln_encoder": Spec("transformer", Encoder, (_ids(1, LENGTH),) * 3, 17),
    "post_ln_encoder_traced": Spec("transformer", Encoder, (_ids(1, LENGTH),) * 3, 17, False, dynamic=True),
    "patches_softmax": Spec("transformer", Patches, _image(), 19),
    "cross_attention": Spec("transformer", Crossed, (torch.zeros(1, 9, 20), torch.zeros(1, 5, WIDTH))),
    "mixer": Spec("transformer", Mixer, (torch.zeros(1, LENGTH, WIDTH),)),
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
            axes = {name: {0: "batch", 1: "length"} for name in names}
            options |= {"input_names": names, "dynamic_axes": axes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, spec.inputs, str(path), **options)
    return onnx.load(path)
