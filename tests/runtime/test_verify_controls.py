"""What a verification must see, as small as it is: a weight, a bias, an epsilon, a channel; and what it must let pass.

Where an edit is not seen, a run in double precision must show that it moves no output, or hardly more than rounding.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.oracles.double_precision import HIDDEN, Single, effect, probes
from tests.oracles.mutations import Mutant, mutate, weights

from cipm_ir.runtime.verification.verify import Verifier, verify_models
from cipm_ir.symmetry.program import Program

# Between the steps of a quantization an edit shows only where a value lies beside a step, so no small edit is sure to.
MODELS = zoo.names("synthetic", without=("reference", "quantized"))
WITH_NORM = [
    "batch_norm_relu",
    "batch_norm_1d",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "layer_norm_channels",
]
WITH_BIAS = ["mlp_relu", "conv1d", "grouped_conv_transpose", "layer_norm", "group_norm", "batch_norm_linear", "lstm"]
WITH_BIAS += [
    "gru_linear_before_reset",
    "rnn",
    "attention_separate",
    "squeeze_excitation",
    "unet_concat_skip",
    "mlp_sigmoid",
]


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def other_gauge(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    program = Program.of(model)
    return program.act({space: space.random(rng) for space in program.spaces}).emit()


def check_caught(verifier: Verifier, copy: ir.Model, mutant: Mutant) -> None:
    """Fail where the mutant of a copy passes for the original although double precision tells them apart."""
    found = verifier.check(mutant.model)
    if found.ok is not False:
        measured = effect(verifier.model, copy, mutant.model, probes(verifier.model))
        assert measured.verdict in HIDDEN, f"{mutant}: {found}, but it is {measured}"


@pytest.mark.parametrize("name", MODELS)
def test_one_weight_off_by_a_thousandth_is_caught_in_another_gauge(name: str) -> None:
    model, rng = ir.from_proto(zoo.build(name)), _rng(name)
    copy, verifier = other_gauge(model, rng), Verifier(model)
    assert verifier.check(copy).ok, "the copy without an edit"
    layers = [one.name for one in weights(copy) if one.array.size > 1]
    for layer in rng.choice(layers, min(2, len(layers)), replace=False):
        mutant = mutate(copy, "entry", rng, str(layer))
        assert mutant is not None
        check_caught(verifier, copy, mutant)


@pytest.mark.parametrize("name", WITH_NORM)
def test_a_wrong_epsilon_is_caught(name: str) -> None:
    model = ir.from_proto(zoo.build(name))
    verifier, tried = Verifier(model), 0
    for node in model.graph:
        if "Normalization" not in node.op_type:
            continue
        copy = model.clone()
        twin = next(other for other in copy.graph if other.name == node.name)
        epsilon = twin.attributes.get_float("epsilon", 1e-5)
        twin.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10 * epsilon)
        check_caught(verifier, model, Mutant(copy, "attribute", node.name or "", f"epsilon {epsilon:g} x 10"))
        tried += 1
    assert tried


@pytest.mark.parametrize("kind", ["dropped bias", "swap", "row", "activation"])
@pytest.mark.parametrize("name", WITH_BIAS)
def test_a_dropped_bias_a_swapped_channel_a_row_and_an_activation_are_caught(name: str, kind: str) -> None:
    model, rng = ir.from_proto(zoo.build(name)), _rng(name + kind)
    made = [mutant for _ in range(3) if (mutant := mutate(model, kind, rng)) is not None]
    verifier = Verifier(model)
    for mutant in made:
        check_caught(verifier, model, mutant)
    assert made or kind == "activation"


def _model(nodes: list[onnx.NodeProto], x: list[int], y: list[int], **tensors: NDArray[Any]) -> ir.Model:
    info = onnx.helper.make_tensor_value_info
    inputs, outputs = [info("x", onnx.TensorProto.FLOAT, x)], [info("y", onnx.TensorProto.FLOAT, y)]
    arrays = [onnx.numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, arrays)
    opsets = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


SIZES = np.array([1e6, 1.0, 1e-3, 1e6])


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("form", ["columns", "channels", "batch of one", "squeezed"])
def test_one_percent_of_a_small_column_beside_large_ones_is_caught(form: str, place: int) -> None:
    rng = np.random.default_rng(3)
    node = onnx.helper.make_node
    wrong = SIZES.copy()
    wrong[place] *= 1.01

    def build(sizes: NDArray[Any]) -> ir.Model:
        if form == "channels":
            kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 3)) * sizes[:, None, None, None]
            return _model([node("Conv", ["x", "w"], ["y"])], [1, 3, 7, 7], [1, 4, 5, 5], w=kernel)
        matrix = np.random.default_rng(0).standard_normal((6, 4)) * sizes
        if form == "squeezed":
            return _model([node("MatMul", ["x", "w"], ["y"])], [6], [4], w=matrix)
        rows = 1 if form == "batch of one" else 5
        return _model([node("MatMul", ["x", "w"], ["y"])], [rows, 6], [rows, 4], w=matrix)

    assert verify_models(build(SIZES), build(SIZES), seed=int(rng.integers(100))).ok
    assert verify_models(build(SIZES), build(wrong)).ok is False


@pytest.mark.parametrize("last", ["Sigmoid", "Softmax"])
def test_behind_a_saturated_activation_rounding_passes_and_a_row_is_caught(last: str) -> None:
    rng = np.random.default_rng(0)
    hidden, bias = rng.standard_normal((6, 16)), rng.standard_normal(16)
    out, low = rng.standard_normal((16, 3)) / 4, np.full(3, -16.0) if last == "Sigmoid" else np.array([30.0, 0, 0])

    def build(order: NDArray[Any], factor: float) -> ir.Model:
        names = [
            ("Gemm", ["x", "w", "b"], "h"),
            ("Relu", ["h"], "r"),
            ("Gemm", ["r", "v", "c"], "z"),
            (last, ["z"], "y"),
        ]
        nodes = [onnx.helper.make_node(op, inputs, [output]) for op, inputs, output in names]
        v = out.copy()
        v[:, 1] *= factor
        return _model(nodes, [5, 6], [5, 3], w=hidden[:, order], b=bias[order], v=v[order], c=low)

    same = np.arange(16)
    for _ in range(5):
        assert verify_models(build(same, 1.0), build(rng.permutation(16), 1.0)).ok
    assert verify_models(build(same, 1.0), build(rng.permutation(16), 1.01)).ok is False


def test_the_controls_themselves_tell_edits_apart() -> None:
    """An equivalent edit, a visible one, and one below rounding get these names."""
    x = np.random.default_rng(0).standard_normal((6, 4))
    unread = np.concatenate([x, np.zeros((6, 1))], axis=1)
    node = onnx.helper.make_node

    def build(w: NDArray[Any], v: NDArray[Any]) -> ir.Model:
        return _model([node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])], [5, 6], [5, 2], w=w, v=v)

    v = np.vstack([np.random.default_rng(1).standard_normal((4, 2)), np.zeros((1, 2))])
    model = build(unread, v)
    feeds = probes(model, 0, Single(model))
    other, near, far = unread.copy(), unread.copy(), unread.copy()
    other[:, 4], near[0, 0], far[0, 0] = 1.0, near[0, 0] * (1 + 3e-8), far[0, 0] * 1.001
    verdicts = [effect(model, model, build(changed, v), feeds).verdict for changed in (other, near, far)]
    assert verdicts[0] == "equivalent" and verdicts[1] in ("equivalent", "below rounding") and verdicts[2] == "visible"
