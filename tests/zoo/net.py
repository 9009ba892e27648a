"""A small writer of ONNX graphs: every parameter is drawn from a generator seeded by the model's name."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Dim = int | str


class Net:
    """Collects nodes, parameters, inputs and outputs of one model; values are passed around by name."""

    def __init__(self, name: str, opset: int = 20, dtype: str = "float32") -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.domains = {"": opset}
        self.functions: list[onnx.FunctionProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def fresh(self, stem: str) -> str:
        """A value name that is not in use."""
        self._count += 1
        return f"{stem}_{self._count}"

    @property
    def elem(self) -> int:
        """ONNX element type of the model's floating-point values."""
        return int(helper.np_dtype_to_tensor_dtype(self.dtype))

    def input(self, name: str, shape: Sequence[Dim], elem: int | None = None) -> str:
        """Declare a graph input, of the model's floating-point type unless `elem` is given."""
        self.inputs.append(helper.make_tensor_value_info(name, elem or self.elem, shape))
        return name

    def output(self, value: str, shape: Sequence[Dim], elem: int | None = None) -> None:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(value, elem or self.elem, shape))

    def const(self, array: Any, stem: str = "c", dtype: Any = None) -> str:
        """An initializer with the given content; Python floats take the model's type, integers int64."""
        data = np.asarray(array, dtype=dtype)
        if dtype is None and data.dtype.kind == "f":
            data = data.astype(self.dtype)
        name = self.fresh(stem)
        self.initializers.append(numpy_helper.from_array(data, name))
        return name

    def normal(self, shape: Sequence[int], std: float) -> NDArray[Any]:
        """Draw N(0, std²) in the model's type."""
        return (self.rng.standard_normal(tuple(shape)) * std).astype(self.dtype)

    def weight(self, shape: Sequence[int], fan_in: int, stem: str = "w") -> str:
        """An initializer drawn from N(0, 2 / fan_in)."""
        return self.const(self.normal(shape, float(np.sqrt(2.0 / fan_in))), stem)

    def bias(self, size: int, stem: str = "b") -> str:
        """An initializer of shape (size,) drawn from N(0, 0.3²), large enough for a lost bias to show."""
        return self.const(self.normal((size,), 0.3), stem)

    def positive(self, shape: Sequence[int], stem: str = "s") -> str:
        """An initializer drawn from U(0.5, 1.5)."""
        return self.const(self.rng.uniform(0.5, 1.5, tuple(shape)).astype(self.dtype), stem)

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        return self.multi(op_type, list(inputs), 1, domain=domain, **attributes)[0]

    def multi(self, op_type: str, inputs: list[str], outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """A node with several outputs; returns their names."""
        names = [self.fresh(op_type.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, domain=domain, name=names[0], **attributes))
        return names

    def gemm(self, x: str, n_in: int, n_out: int, trans: int = 1) -> str:
        """Fully connected layer as Gemm, (N, n_in) -> (N, n_out)."""
        shape = (n_out, n_in) if trans else (n_in, n_out)
        return self.op("Gemm", x, self.weight(shape, n_in), self.bias(n_out), transB=trans)

    def linear(self, x: str, n_in: int, n_out: int) -> str:
        """Fully connected layer as MatMul and Add, (..., n_in) -> (..., n_out)."""
        return self.op("Add", self.op("MatMul", x, self.weight((n_in, n_out), n_in)), self.bias(n_out))

    def conv(
        self, x: str, n_in: int, n_out: int, k: int = 3, group: int = 1, bias: bool = True, stride: int = 1
    ) -> str:
        """Convolution with padding that keeps the size at stride 1, (N, n_in, H, W) -> (N, n_out, H, W)."""
        weight = self.weight((n_out, n_in // group, k, k), (n_in // group) * k * k)
        parts = [x, weight, self.bias(n_out)] if bias else [x, weight]
        attributes: dict[str, Any] = {
            "kernel_shape": [k, k],
            "pads": [k // 2] * 4,
            "strides": [stride] * 2,
            "group": group,
        }
        return self.op("Conv", *parts, **attributes)

    def relu(self, x: str) -> str:
        """Relu."""
        return self.op("Relu", x)

    def image(self, channels: int = 3, size: int = 6, batch: Dim = "N") -> str:
        """The graph input "x" of shape (N, channels, size, size)."""
        return self.input("x", [batch, channels, size, size])

    def batch_norm(self, x: str, channels: int) -> str:
        """Inference-mode BatchNormalization over axis 1."""
        mean, var = self.bias(channels, "mean"), self.positive((channels,), "var")
        return self.op("BatchNormalization", x, self.positive((channels,)), self.bias(channels), mean, var)

    def classify(self, x: str, channels: int, batch: Dim = "N") -> None:
        """Global average pool, Flatten, Gemm to 3 outputs: the graph output."""
        pooled = self.op("Flatten", self.op("GlobalAveragePool", x))
        self.output(self.gemm(pooled, channels, 3), [batch, 3])

    def model(self) -> onnx.ModelProto:
        """The finished ModelProto, at the lowest IR version that its opset allows."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        imports = [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        model = helper.make_model(graph, opset_imports=imports, functions=self.functions, producer_name="cipm-zoo")
        model.ir_version = max(9, helper.find_min_ir_version_for([helper.make_opsetid("", self.domains[""])]))
        return model


INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL
