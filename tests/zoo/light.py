"""The nine classic architectures that the onnx package ships without weights, refilled with seeded random ones.

The files (ir_version 3, opset 9) make each large weight with ConstantOfShape from a shape initializer. The refilled
copies carry initializers of the same value names instead, drawn so that activations keep their size; the originals are
registered as `<name>_constant`. Two refilled copies have narrower hidden layers than their originals (`NARROWED`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from tests.zoo.registry import UnavailableError, register

MODELS: dict[str, int | None] = {
    "bvlc_alexnet": 9216,  # 384 + 384 + 256 + 2 * 4096; LRN keeps the first 96 and 256 in place
    "densenet121": 10240,
    "inception_v1": 7024,
    "inception_v2": None,
    "resnet50": 11456,
    "shufflenet": None,  # at least 5008
    "squeezenet": 2944,
    "vgg19": 7552,  # 5504 channels + 2 * 1024
    "zfnet512": 3584,
}
# Half a gigabyte of weights, most of it in one matrix, shows no more than a fifth of it: the layers of 4096 units that
# are connected fully have 1024. The files as shipped keep their size.
NARROWED = {"vgg19": (4096, 1024), "zfnet512": (4096, 1024)}
AT_LEAST = {"shufflenet": 5008}
LARGE = {"bvlc_alexnet", "vgg19", "zfnet512", "resnet50"}
# Factors, found by trial, on the scales of all batch norms and on the last weight. Without the first, residual sums
# grow a thousandfold and drown the biases, so that a lost bias would not show; without the second, softmax saturates.
NORM_GAIN = {"resnet50": 0.7, "shufflenet": 0.6, "inception_v2": 0.93, "densenet121": 0.9}
LOGIT_GAIN = {
    "bvlc_alexnet": 0.25,
    "inception_v1": 0.25,
    "inception_v2": 1.0,
    "resnet50": 0.125,
    "shufflenet": 0.5,
    "squeezenet": 0.5,
    "vgg19": 0.25,
}

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Role = Callable[[np.random.Generator, Shape], Array]


def _weight(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    fan_in = shape[-1] if shape[:2] == (1, 1) else int(np.prod(shape[1:]))
    array = rng.standard_normal(shape, dtype=np.float32)
    array *= np.float32(np.sqrt(2.0 / fan_in))
    return array


def _near_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)


def _scale(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def _variance(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


ROLES: dict[tuple[str, int], Role] = {
    ("Conv", 1): _weight,
    ("Gemm", 1): _weight,
    ("Reshape", 0): _weight,  # Inception v1 reshapes the weight of its Gemm
    ("Conv", 2): _near_zero,
    ("Gemm", 2): _near_zero,
    ("BatchNormalization", 1): _scale,
    ("BatchNormalization", 2): _near_zero,
    ("BatchNormalization", 3): _near_zero,
    ("BatchNormalization", 4): _variance,
    ("Mul", 1): _scale,  # a scale and a shift that arrive through Unsqueeze
    ("Add", 1): _near_zero,
}


def light_file(name: str) -> Path:
    """Path of one of the files of the onnx package."""
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    if not path.is_file():
        raise UnavailableError(f"the installed onnx package does not ship {path.name}")
    return path


def _roles(graph: onnx.GraphProto) -> dict[str, Role]:
    """The role of each floating-point parameter, by its first use; Unsqueeze passes the role of its result back."""
    first_use: dict[str, tuple[str, int]] = {}
    for node in graph.node:
        for slot, value in enumerate(node.input):
            first_use.setdefault(value, (node.op_type, slot))
    for node in graph.node:
        if node.op_type == "Unsqueeze":
            first_use[node.input[0]] = first_use[node.output[0]]
    return {value: ROLES[use] for value, use in first_use.items() if use in ROLES}


def _parameter_shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Shapes of all floating-point parameters in file order: initializers and ConstantOfShape outputs."""
    initial = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {name: tuple(t.dims) for name, t in initial.items() if t.data_type == TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(int(n) for n in numpy_helper.to_array(initial[node.input[0]]))
    return shapes


def _replace(message: Any, items: list[Any]) -> None:
    kept = list(items)
    del message[:]
    message.extend(kept)


def _narrowed(graph: onnx.GraphProto, shapes: Mapping[str, Shape], old: int, new: int) -> dict[str, Shape]:
    """The shapes with `old` replaced by `new` where a Gemm reads them."""
    read = {value for node in graph.node if node.op_type == "Gemm" for value in node.input}
    return {n: tuple(new if d == old and n in read else d for d in shape) for n, shape in shapes.items()}


def refill(
    model: onnx.ModelProto, seed: int, norm_gain: float, logit_gain: float, widths: tuple[int, int] | None = None
) -> None:
    """Give every parameter random values in place; the inputs that are left are the true inputs (ir_version 8).

    `widths`: the size of the hidden layers connected fully, as it is and as it shall be.
    """
    graph, rng = model.graph, np.random.default_rng(seed)
    shapes, roles = _parameter_shapes(graph), _roles(graph)
    if widths:
        shapes = _narrowed(graph, shapes, *widths)
    weights = [name for name in shapes if roles.get(name) is _weight]
    order = {value: i for i, node in enumerate(graph.node) for value in node.input}
    last = max(weights, key=lambda name: order[name])
    makers = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    retired = {node.input[0] for node in makers} | set(shapes)
    initializers = [tensor for tensor in graph.initializer if tensor.name not in retired]
    known = {tensor.name for tensor in graph.initializer} | retired
    _replace(graph.input, [value for value in graph.input if value.name not in known])
    _replace(graph.node, [node for node in graph.node if node.op_type != "ConstantOfShape"])
    _replace(graph.initializer, initializers)
    for name, shape in shapes.items():
        array = roles.get(name, _near_zero)(rng, shape)  # ResNet-50 has one that no node reads
        if roles.get(name) is _scale:
            array *= np.float32(norm_gain)
        if name == last:
            array *= np.float32(logit_gain)
        # Written in place: to append a finished tensor would copy it once more.
        tensor = graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.raw_data = array.tobytes()
    model.ir_version = 8


def _refilled(name: str) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        model = onnx.load(light_file(name))
        seed, gains = zlib.crc32(name.encode()), (NORM_GAIN.get(name, 1.0), LOGIT_GAIN.get(name, 1.0))
        refill(model, seed, *gains, NARROWED.get(name))
        return model

    return build


def _original(name: str) -> Callable[[], onnx.ModelProto]:
    return lambda: onnx.load(light_file(name))


for _name, _units in MODELS.items():
    _size = ("large",) if _name in LARGE else ()
    register(_name, _refilled(_name), _units, "light", *_size, at_least=AT_LEAST.get(_name))
    register(f"{_name}_constant", _original(_name), None, "constant", *_size)
