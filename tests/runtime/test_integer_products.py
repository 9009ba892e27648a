"""Products of 8-bit integers are exact on every processor, once signed weights are re-encoded as unsigned ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tests import zoo

from cipm_ir.runtime import session
from cipm_ir.runtime.integer_products import processor_saturates, reencode_signed_weights
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verification.verify import verify_models
from cipm_ir.symmetry.program import Program

RNG = np.random.default_rng(0)
LARGE = {"u8": (TensorProto.UINT8, 200, 256), "s8": (TensorProto.INT8, 100, 128)}
MODELS = ("dynamic_quantization", "qlinear_conv_net", "qdq_conv_net")


def model(op: str, data: str, group: int = 1, *, zero: Any = None, constant: bool = True) -> onnx.ModelProto:
    """One product of large integers, whose sums of pairs leave 16 bits."""
    kind = LARGE[data][0]
    conv = "Conv" in op
    shape = [1, 8, 9, 9] if conv else [2, 64]
    weight = RNG.integers(100, 128, (16, 8 // group, 3, 3) if conv else (64, 16)).astype(np.int8)
    made = {"b": weight}
    if op.startswith("QLinear"):
        point = np.zeros((), helper.tensor_dtype_to_np_dtype(kind))
        scale = np.float32(1500 if conv else 1200)
        made |= {"s": np.asarray(np.float32(0.1)), "z": point, "t": np.asarray(scale)}
        made["wz"] = np.zeros((), np.int8) if zero is None else zero
        names, out = ["a", "s", "z", "b", "s", "wz", "t", "z"], kind
    else:
        names, out = ["a", "b", "", "bz"] if zero is not None else ["a", "b"], TensorProto.INT32
        made |= {"bz": zero} if zero is not None else {}
    attributes: dict[str, Any] = {"group": group} if conv else {}
    inputs = [helper.make_tensor_value_info("a", kind, shape)]
    if not constant:
        inputs.append(helper.make_tensor_value_info("b", TensorProto.INT8, weight.shape))
        made.pop("b")
    result = helper.make_tensor_value_info("y", out, [None] * len(shape))
    tensors = [numpy_helper.from_array(array, name) for name, array in made.items()]
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **attributes)], "g", inputs, [result], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("data", ["u8", "s8"])
@pytest.mark.parametrize(
    ("op", "group", "zero"),
    [
        ("MatMulInteger", 1, None),
        ("MatMulInteger", 1, np.array(-3, np.int8)),
        ("MatMulInteger", 1, np.arange(-8, 8, dtype=np.int8)),
        ("ConvInteger", 1, None),
        ("QLinearMatMul", 1, None),
        ("QLinearConv", 1, None),
        ("QLinearConv", 8, None),
        ("QLinearConv", 1, np.zeros(16, np.int8)),
    ],
)
def test_re_encoded_products_are_exact(op: str, group: int, zero: Any, data: str) -> None:
    proto = model(op, data, group, zero=zero)
    if op == "ConvInteger" and data == "s8":
        pytest.skip("onnxruntime has no ConvInteger of signed activations")
    elem, low, high = LARGE[data]
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"a": RNG.integers(low, high, shape).astype(helper.tensor_dtype_to_np_dtype(elem))}
    (wanted,) = list(ReferenceEvaluator(proto).run(None, feeds))
    changed = ir.from_proto(proto)
    assert reencode_signed_weights(changed) == (data == "u8")
    for one in (changed, ir.from_proto(proto)):
        with Runner(one, backend="onnxruntime") as runner:
            np.testing.assert_array_equal(runner.run(feeds)["y"], wanted)


def test_a_weight_that_is_an_input_is_re_encoded_too() -> None:
    proto = model("MatMulInteger", "u8", constant=False)
    feeds: dict[str, Any] = {"a": RNG.integers(200, 256, (2, 64)).astype(np.uint8)}
    feeds["b"] = RNG.integers(100, 128, (64, 16)).astype(np.int8)
    changed = ir.from_proto(proto)
    assert reencode_signed_weights(changed) == 1
    with Runner(changed, backend="onnxruntime") as runner:
        wanted = feeds["a"].astype(np.int32) @ feeds["b"].astype(np.int32)
        np.testing.assert_array_equal(runner.run(feeds)["y"], wanted)


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_pass_is_blamed_for_a_kernel_that_saturates(
    name: str, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "processor_saturates", lambda: saturates or processor_saturates())
    program = Program.of(ir.from_proto(zoo.build(name)))
    moved = program.act({space: space.random(np.random.default_rng(0)) for space in program.spaces})
    assert verify_models(program.emit(), moved.emit()).ok
