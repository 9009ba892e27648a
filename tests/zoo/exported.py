"""Exports of real architectures, read from the folder that CIPM_TEST_DATA names (graphs/ and cifar10/)."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from tests.zoo.registry import UnavailableError, register

GRAPHS: dict[str, int | None] = {
    "bert": 768,  # 2 layers of 96 (q-k) + 96 (v-o) + 192 (inner); the residual stream is the output
    "bert_shared_bias": 768,  # equal biases stored once are still one bias per layer
    "vit": 864,  # as bert, and the stream of 96
    "llama_gqa": 712,  # one space of 8 rotary planes for all heads and layers
    "mobilenetv2": 5256,
    "efficientnet": 3760,
    "resnet_bottleneck": 832,
}
CIFAR: dict[str, int | None] = {
    "resnet20": 400,  # 336 inner + 64: zero-padded shortcuts tie the three stages of 16, 32 and 64
    "resnet32": None,
}
FAINT = ("mobilenetv2", "efficientnet")
RANGES = {"bert": {"a_0": 100, "a_1": 2}, "bert_shared_bias": {"a_0": 100, "a_1": 2}, "llama_gqa": {"a_0": 500}}


def data_file(relative: str) -> Path:
    """A file below CIPM_TEST_DATA; UnavailableError when the variable or the file is missing."""
    root = os.environ.get("CIPM_TEST_DATA")
    if not root:
        raise UnavailableError(f"CIPM_TEST_DATA is not set, so {relative} is not available")
    path = Path(root) / relative
    if not path.is_file():
        raise UnavailableError(f"{path} does not exist; CIPM_TEST_DATA should hold graphs/ and cifar10/")
    return path


def _reader(relative: str) -> Callable[[], onnx.ModelProto]:
    return lambda: onnx.load(data_file(relative))


def revive(model: onnx.ModelProto, seed: int) -> None:
    """Redraw the weights and biases of all Conv and Gemm nodes in place, so that the signal reaches the output.

    Weights N(0, 3 / fan_in), a little more than He's 2 because of the gates; biases N(0, 0.1²). A fresh MobileNet's
    signal dies out on its way (weights of std 0.02, no batch norm left): its output is the last bias, whatever goes in.
    """
    rng = np.random.default_rng(seed)
    initial = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight, bias = (initial[name] for name in node.input[1:3])
            std = np.sqrt(3.0 / np.prod(weight.dims[1:]))
            _redraw(weight, rng, float(std))
            _redraw(bias, rng, 0.1)


def _redraw(tensor: onnx.TensorProto, rng: np.random.Generator, std: float) -> None:
    array = (rng.standard_normal(tuple(tensor.dims)) * std).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _revived(name: str) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        model = onnx.load(data_file(f"graphs/{name}.onnx"))
        revive(model, zlib.crc32(name.encode()))
        return model

    return build


for _name, _units in GRAPHS.items():
    _tags = ("faint",) if _name in FAINT else ()
    register(_name, _reader(f"graphs/{_name}.onnx"), _units, "graphs", "data", *_tags, ranges=RANGES.get(_name))
for _name in FAINT:
    register(f"{_name}_revived", _revived(_name), GRAPHS[_name], "graphs", "data")
for _name, _units in CIFAR.items():
    register(_name, _reader(f"cifar10/{_name}.onnx"), _units, "cifar", "data")
