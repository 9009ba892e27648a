"""Single-node models for the ONNX -> torch table: one row per case of an operator that the zoo does not show."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]


@dataclass(frozen=True)
class Const:
    """An input that is an initializer."""

    array: Array


@dataclass(frozen=True)
class Case:
    """One node: inputs are arrays (fed), `Const` or None; `dynamic`: why symbolic shapes are refused, if they are."""

    name: str
    op: str
    inputs: tuple[Array | Const | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 20
    reference: bool = False
    dynamic: str | None = None

    @property
    def feeds(self) -> dict[str, Array]:
        """Arrays by input name."""
        return {f"x{k}": a for k, a in enumerate(self.inputs) if isinstance(a, np.ndarray)}

    def model(self, dynamic: bool = False) -> onnx.ModelProto:
        """The model, with the sizes of its inputs or with a symbol for each."""
        names = ["" if a is None else f"{'c' if isinstance(a, Const) else 'x'}{k}" for k, a in enumerate(self.inputs)]
        inputs, initializers = [], []
        for name, a in zip(names, self.inputs, strict=True):
            if isinstance(a, Const):
                initializers.append(numpy_helper.from_array(a.array, name))
            elif a is not None:
                shape = [f"{name}_{k}" for k in range(a.ndim)] if dynamic else a.shape
                inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), shape))
        results = [f"y{k}" for k in range(self.outputs)]
        node = helper.make_node(self.op, names, results, name=f"the_{self.op}", **self.attributes)
        declared = [helper.make_empty_tensor_value_info(name) for name in results]
        graph = helper.make_graph([node], "case", inputs, declared, initializers)
        imports = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=imports)
        model.ir_version = max(8, helper.find_min_ir_version_for(imports))
        return model if dynamic else onnx.shape_inference.infer_shapes(model)


CASES: list[Case] = []


def add(name: str, op: str, *inputs: Any, **attributes: Any) -> None:
    """A case; lists among the inputs are int64 initializers. `n`: outputs; fields of `Case` are taken out."""
    made = tuple(Const(np.asarray(a, np.int64)) if isinstance(a, (list, int)) else a for a in inputs)
    options = {key: attributes.pop(key) for key in ("opset", "reference", "dynamic") if key in attributes}
    CASES.append(Case(name, op, made, outputs=attributes.pop("n", 1), attributes=attributes, **options))


def draw(*shape: int, low: float = -2.0, high: float = 2.0) -> Array:
    """Uniform floats, the same for the same request."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, low, high, len(CASES))).encode()))
    return rng.uniform(low, high, shape).astype(np.float32)


def whole(*shape: int, low: int = -7, high: int = 8, dtype: Any = np.int64) -> Array:
    """Uniform integers."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, low, high, len(CASES))).encode()))
    return rng.integers(low, high, shape).astype(dtype)


def weight(*shape: int) -> Const:
    """A float initializer."""
    return Const(draw(*shape))


def scalar(value: float) -> Const:
    """A float initializer of rank 0."""
    return Const(np.array(value, np.float32))


SIGNED = (
    "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Identity", "Mish", "Neg", "Relu", "Round", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh", "Atan", "Asinh", "Cosh", "Elu", "Celu", "Selu",
    "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Gelu", "Shrink", "IsNaN",
)  # fmt: skip


def elementwise() -> None:
    for op in SIGNED:
        add(f"{op.lower()}", op, draw(2, 5))
    for op in ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt"):
        add(op.lower(), op, draw(2, 5, low=0.1, high=0.9))
    add("acosh", "Acosh", draw(2, 5, low=1.1, high=3.0))
    add("round_half_to_even", "Round", np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32))
    add("gelu_tanh", "Gelu", draw(2, 5), approximate="tanh")
    add("swish_alpha", "Swish", draw(2, 5), opset=24, alpha=1.5, reference=True)
    add("elu_alpha", "Elu", draw(2, 5), alpha=0.3)
    add("selu_own", "Selu", draw(2, 5), alpha=1.5, gamma=1.2)
    add("shrink_own", "Shrink", draw(2, 5), bias=0.2, lambd=0.7)
    add("hard_sigmoid_torch", "HardSigmoid", draw(2, 5, low=-5, high=5), alpha=1 / 6, beta=0.5)
    add("prelu_per_channel", "PRelu", draw(2, 3, 4, 4), weight(3, 1, 1))
    add("prelu_last_axis", "PRelu", draw(2, 3), weight(3))
    add("divide_integers", "Div", whole(3, 8), whole(3, 8, low=1, high=4) * np.array([1, -1] * 4))
    add("divide_floats", "Div", draw(2, 3, 4), draw(3, 1, low=1))
    add("modulo_integers", "Mod", whole(3, 8), whole(3, 8, low=1, high=4) * np.array([1, -1] * 4))
    add("modulo_fmod", "Mod", draw(3, 8), draw(3, 8, low=0.5), fmod=1)
    add("power_integer_base", "Pow", whole(4), scalar(2))
    add("power_square", "Pow", draw(4), scalar(2.0))
    add("power_half", "Pow", draw(4, low=0.1), scalar(0.5))
    add("power_tensor", "Pow", draw(4, low=0.1), draw(3, 1))
    add("clip_both", "Clip", draw(9), scalar(-0.5), scalar(0.75))
    add("clip_below", "Clip", draw(9), scalar(-0.5))
    add("clip_above", "Clip", draw(9), None, scalar(0.5))
    add("clip_fed", "Clip", draw(9), np.array(-0.5, np.float32), scalar(0.5))
    add("clip_old", "Clip", draw(9), opset=6, min=-0.5, max=0.25)
    add("clip_integers", "Clip", whole(9), -2, 3)
    add("where", "Where", draw(2, 1, 3) > 0, draw(4, 1), draw(3))
    for op in ("Max", "Min", "Sum", "Mean"):
        add(f"{op.lower()}_of_three", op, draw(2, 3), draw(3), draw(2, 1))
    for op in ("And", "Or", "Xor"):
        add(op.lower(), op, draw(2, 3) > 0, draw(3) > 0)
    for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        add(op.lower(), op, whole(3, 5, low=0, high=3), whole(5, low=0, high=3))
    add("not", "Not", draw(5) > 0)
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
        add(op.lower(), op, whole(6, dtype=np.int32), whole(6, dtype=np.int32))
    add("bitwise_not", "BitwiseNot", whole(6, dtype=np.int32))
    for way in ("LEFT", "RIGHT"):
        bits = whole(6, low=0, high=200, dtype=np.uint8), whole(6, low=0, high=4, dtype=np.uint8)
        add(f"bit_shift_{way.lower()}", "BitShift", *bits, direction=way)
    add("cast_to_integer", "Cast", draw(9, low=-5, high=5), to=onnx.TensorProto.INT32)
    add("cast_to_bool", "Cast", whole(9, low=-1, high=2), to=onnx.TensorProto.BOOL)
    add("cast_like", "CastLike", draw(9), whole(1))
    special = np.array([1, -np.inf, np.inf, np.nan], np.float32)
    add("is_infinite", "IsInf", special)
    add("is_infinite_up", "IsInf", special, detect_negative=0)
    add("is_infinite_down", "IsInf", special, detect_positive=0)


def linear() -> None:
    add("gemm_transposed", "Gemm", draw(3, 4), weight(5, 3), weight(5), transA=1, transB=1, alpha=0.5, beta=2.0)
    add("gemm_linear", "Gemm", draw(4, 3), weight(5, 3), weight(5), transB=1)
    add("gemm_one_bias", "Gemm", draw(4, 3), weight(5, 3), weight(1), transB=1)
    add("gemm_column_bias", "Gemm", draw(4, 3), weight(3, 5), weight(4, 1))
    add("gemm_no_bias", "Gemm", draw(4, 3), weight(3, 5), alpha=1.5)
    add("matmul_vectors", "MatMul", draw(4), draw(4))
    add("matmul_batched", "MatMul", draw(2, 1, 3, 4), draw(5, 4, 2))
    add("einsum_ellipsis", "Einsum", draw(2, 3, 4), draw(2, 4, 5), equation="...ij, ...jk -> ...ki")


def convolution() -> None:
    image, kernel, bias = draw(2, 4, 9, 8), weight(6, 4, 3, 3), weight(6)
    add("conv_uneven_pads", "Conv", image, kernel, bias, pads=[0, 1, 2, 3], strides=[2, 1])
    for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        add(f"conv_{mode.lower()}", "Conv", image, weight(6, 4, 4, 3), auto_pad=mode, strides=[2, 3])
        add(f"conv_{mode.lower()}_stride_one", "Conv", image, weight(6, 4, 4, 2), auto_pad=mode)
    add("conv_1d_groups", "Conv", draw(2, 4, 9), weight(6, 2, 3), bias, group=2, dilations=[2], pads=[1, 1])
    add("conv_3d", "Conv", draw(1, 2, 5, 5, 5), weight(3, 2, 2, 2, 2), pads=[0, 0, 1, 1, 0, 1])
    small, other = draw(2, 4, 4, 5), weight(4, 3, 3, 3)
    steps = {"strides": [2, 2]}
    add("transposed_plain", "ConvTranspose", small, other, weight(3), pads=[1, 1, 1, 1], output_padding=[1, 1], **steps)
    add("transposed_uneven", "ConvTranspose", small, other, pads=[0, 1, 1, 0], **steps)
    add("transposed_uneven_extra", "ConvTranspose", small, other, pads=[0, 1, 1, 2], output_padding=[1, 0], **steps)
    add("transposed_groups", "ConvTranspose", small, other, group=2, dilations=[2, 1], strides=[1, 2])
    for mode in ("SAME_UPPER", "SAME_LOWER"):
        add(f"transposed_{mode.lower()}", "ConvTranspose", small, other, auto_pad=mode, **steps)
    static = "output_shape needs static"
    add("transposed_shape", "ConvTranspose", small, other, output_shape=[8, 10], dynamic=static, **steps)
    add("transposed_1d", "ConvTranspose", draw(2, 4, 5), weight(4, 3, 3), pads=[0, 2], strides=[2])


def pooling() -> None:
    image, static = draw(2, 3, 9, 8), "ceil_mode with this padding needs static"
    for op in ("MaxPool", "AveragePool"):
        short = op.lower()[:3]
        add(f"{short}_uneven", op, image, kernel_shape=[3, 3], pads=[0, 1, 1, 0], strides=[2, 2])
        add(f"{short}_ceil", op, image, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 3], ceil_mode=1)
        add(f"{short}_ceil_drops", op, draw(1, 1, 4, 4), kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1)
        uneven = {"pads": [1, 0, 0, 1], "strides": [2, 3], "ceil_mode": 1, "dynamic": static}
        add(f"{short}_ceil_uneven", op, image, kernel_shape=[3, 2], **uneven)
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            add(f"{short}_{mode.lower()}", op, image, kernel_shape=[4, 3], strides=[3, 2], auto_pad=mode)
        add(f"{short}_1d", op, draw(2, 3, 9), kernel_shape=[4], pads=[1, 2])
        add(f"{short}_3d", op, draw(1, 2, 5, 5, 5), kernel_shape=[2, 2, 2], strides=[2, 2, 2])
        add(f"{short}_wide_pads", op, image, kernel_shape=[3, 3], pads=[2, 2, 2, 2])
    add("max_dilated", "MaxPool", image, kernel_shape=[3, 2], dilations=[2, 3])
    for name, pads in (("even", [1, 1, 1, 1]), ("uneven", [0, 1, 1, 0])):
        counted = {"kernel_shape": [3, 3], "pads": pads, "strides": [2, 2], "count_include_pad": 1}
        add(f"average_counts_{name}", "AveragePool", image, **counted)
    add("lp_pool", "LpPool", image, kernel_shape=[2, 3], strides=[2, 1], pads=[0, 1, 1, 0], p=3)
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        add(op.lower(), op, image)


def normalization() -> None:
    for shape in ((4, 3), (2, 3, 5), (2, 3, 2, 2, 2)):
        rest = [weight(3), weight(3), weight(3), Const(draw(3, low=0.5))]
        add(f"batch_norm_{len(shape)}d", "BatchNormalization", draw(*shape), *rest, epsilon=1e-3)
    add("layer_norm_two_axes", "LayerNormalization", draw(2, 3, 4), weight(3, 4), weight(3, 4), axis=1)
    add("layer_norm_no_bias", "LayerNormalization", draw(2, 3, 4), weight(4), epsilon=1e-2)
    add("layer_norm_one_scale", "LayerNormalization", draw(2, 3, 4), weight(1), weight(4))
    add("layer_norm_statistics", "LayerNormalization", draw(2, 3, 4), weight(4), weight(4), n=3)
    add("rms_norm", "RMSNormalization", draw(2, 3, 4), weight(4), opset=23)
    add("rms_norm_two_axes", "RMSNormalization", draw(2, 3, 4), weight(1, 4), opset=23, axis=1)
    add("group_norm_21", "GroupNormalization", draw(2, 6, 3, 3), weight(6), weight(6), num_groups=3, opset=21)
    add("group_norm_18", "GroupNormalization", draw(2, 6, 3, 3), weight(3), weight(3), num_groups=3, opset=18,
        reference=True, dynamic="number of channels")  # fmt: skip
    add("instance_norm", "InstanceNormalization", draw(2, 3, 5), weight(3), weight(3))
    for size in (3, 4):
        # As many samples as channels: the reference evaluator of ONNX 1.23 counts the one for the other.
        add(f"lrn_{size}", "LRN", draw(7, 7, 3, 3), size=size, alpha=0.5, beta=0.6, bias=1.5, reference=size == 4)
    rows = draw(3, 4)
    rows[1] = 0
    for p in (1, 2):
        add(f"lp_norm_{p}", "LpNormalization", rows, p=p, axis=1)
    add("mean_variance", "MeanVarianceNormalization", draw(2, 3, 4, 4))


def every() -> Iterator[Case]:
    """All cases, each name once."""
    from tests.torch import torch_onnx_cases_moving as more

    if not CASES:
        families: Sequence[Any] = (elementwise, linear, convolution, pooling, normalization, *more.FAMILIES)
        for family in families:
            family()
    return iter(CASES)
