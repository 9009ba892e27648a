"""Networks for the tests of importance: some of their units are known not to matter, and outputs are one number."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from tests.zoo.net import Net

from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.importance.criteria import make_importance
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers
from cipm_ir.symmetry.space import Space

FAINT = (1, 4, 9)
"""The planted units of `planted`."""


def program(net: Net) -> Program:
    """Program of a finished net."""
    return Program.of(ir.from_proto(net.model()))


def rescaled(model: onnx.ModelProto, scales: dict[str, tuple[int, NDArray[Any]]]) -> Program:
    """The model with parameters multiplied along an axis."""
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            axis, factor = scales[tensor.name]
            array = numpy_helper.to_array(tensor)
            shape = [-1 if a == axis else 1 for a in range(array.ndim)]
            tensor.CopyFrom(numpy_helper.from_array((array * factor.reshape(shape)).astype(array.dtype), tensor.name))
    return Program.of(ir.from_proto(model))


def planted() -> Program:
    """Conv, batch norm, relu, conv, relu, classifier: of the first 12 channels, `FAINT` are faint all along."""
    net = Net("planted", opset=20)
    hidden = net.conv(net.image(3, 6), 3, 12, bias=False)
    normed = net.batch_norm(hidden, 12)
    net.classify(net.relu(net.conv(net.relu(normed), 12, 10)), 10)
    model = net.model()
    conv, norm, after = (n for n in model.graph.node if n.op_type in ("Conv", "BatchNormalization"))
    faint = np.where(np.isin(np.arange(12), FAINT), 1e-2, 1.0)
    names = {conv.input[1]: 0, norm.input[1]: 0, norm.input[2]: 0, norm.input[3]: 0, after.input[1]: 1}
    return rescaled(model, {name: (axis, faint) for name, axis in names.items()})


def one_hidden_layer(outputs: int = 1, width: int = 12, faint: float = 1.0) -> Program:
    """Gemm, relu, Gemm: what a hidden unit adds to the outputs is exactly its weight times its activation."""
    net = Net("one_hidden_layer")
    hidden = net.relu(net.gemm(net.input("x", ["N", 6]), 6, width))
    net.output(net.gemm(hidden, width, outputs), ["N", outputs])
    model = net.model()
    return rescaled(model, {model.graph.node[-1].input[1]: (0, np.full(outputs, faint))})


def stream() -> Program:
    """A residual stream of 6 with an inner layer of 8 and a layer that leads straight back; one number for a sample."""
    net = Net("stream")
    first = net.op("Tanh", net.gemm(net.input("x", ["N", 5]), 5, 6))
    inner = net.op("Tanh", net.gemm(first, 6, 8))
    second = net.op("Add", first, net.gemm(inner, 8, 6))
    third = net.op("Add", second, net.op("MatMul", second, net.weight((6, 6), 6)))
    net.output(net.gemm(net.op("Tanh", third), 6, 1), ["N", 1])
    return program(net)


def attention(heads: int = 3, dim: int = 4, time: int = 5) -> Program:
    """Self-attention, then a mean over time and one number for a sample."""
    net, width = Net("attention_scalar"), heads * dim
    x = net.op("Tanh", net.linear(net.input("x", ["N", time, 5]), 5, 7))

    def split(order: list[int]) -> str:
        wide = net.op("Reshape", net.linear(x, 7, width), net.const([0, time, heads, dim]))
        return net.op("Transpose", wide, perm=order)

    scores = net.op("MatMul", split([0, 2, 1, 3]), split([0, 2, 3, 1]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), split([0, 2, 1, 3]))
    merged = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.const([0, time, width]))
    mean = net.op("ReduceMean", net.op("Tanh", net.linear(merged, width, 7)), net.const([1]), keepdims=0)
    net.output(net.gemm(mean, 7, 1), ["N", 1])
    return program(net)


def samples(program: Program, count: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Normal inputs."""
    rng = np.random.default_rng(seed)
    found = {}
    for value in program.model.graph.inputs:
        assert value.shape is not None
        found[value.name or ""] = rng.standard_normal((count, *(int(str(d)) for d in list(value.shape)[1:]))).astype(
            np.float32
        )
    return found


def scores(what: Any, program: Program, ctx: Context) -> dict[str, NDArray[np.float64]]:
    """Scores of all spaces by name."""
    criterion = make_importance(what, "l2")
    return {space.name: criterion.score(program, space, ctx) for space in program.spaces}


def scaled_readers(program: Program, space: Space, element: int, scale: float) -> Program:
    """The program in which everything that reads one element sees it scaled."""
    weights: dict[str, NDArray[Any]] = {}
    for reader in readers(program, space):
        tensor = program.model.graph.initializers[reader.weight].const_value
        assert tensor is not None
        array = weights.get(reader.weight, np.asarray(tensor.numpy(), np.float64)).copy()
        index = [slice(None)] * array.ndim
        index[reader.axis] = reader.columns[element]
        array[tuple(index)] *= scale
        weights[reader.weight] = array
    return program.refit(weights)
