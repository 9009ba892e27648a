"""Clean-up and folding of batch normalizations: what they change, what they refuse, and that names stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cipm_ir.api import load
from cipm_ir.passes.exact.cleanup.clean_up import CleanUp, FoldBatchNorm
from cipm_ir.passes.framework.pipeline import Outcome, run_passes
from cipm_ir.symmetry.program import Program

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
PARAMETERS = ("scale", "shift", "mean", "var")


def floats(*shape: int, dtype: str = "float32") -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def norm(n: int, prefix: str = "") -> dict[str, Array]:
    made = {prefix + name: floats(n) for name in PARAMETERS}
    made[prefix + "var"] = np.abs(made[prefix + "var"]) + np.float32(0.5)
    return made


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    shape: tuple[Any, ...] = ("N", 4, 6, 6),
    outputs: tuple[str, ...] = ("y",),
    opset: int = 20,
    ir_version: int = 10,
    inputs: tuple[str, ...] = (),
) -> Program:
    """A program of nodes from x to y; `inputs` names initializers that are graph inputs too."""
    tensors = {name: numpy_helper.from_array(array, name) for name, array in weights.items()}
    listed = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    listed += [helper.make_tensor_value_info(name, tensors[name].data_type, weights[name].shape) for name in inputs]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", listed, results, list(tensors.values()))
    opsets = [helper.make_opsetid("", opset)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version))


def batch_norm(x: str, y: str, prefix: str = "", **attributes: Any) -> onnx.NodeProto:
    inputs = [x, *(prefix + name for name in PARAMETERS)]
    return helper.make_node("BatchNormalization", inputs, [y], name=f"norm_{y}", **attributes)


def training(x: str, y: str, prefix: str = "") -> onnx.NodeProto:
    inputs = [x, *(prefix + name for name in PARAMETERS)]
    return helper.make_node("BatchNormalization", inputs, [y, f"{y}_mean", f"{y}_var"], training_mode=1)


def conv(x: str, y: str, *weights: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, *weights], [y], name=f"conv_{y}", **attributes)


def operators(program: Program) -> list[str]:
    return [node.op_type for node in program.model.graph]


def initializers(program: Program) -> set[str]:
    return set(program.model.graph.initializers)


def fold(program: Program) -> Outcome:
    """Fold; the pipeline has verified that the outputs are equal."""
    outcome = run_passes(program, [FoldBatchNorm()])
    (step,) = outcome.report.steps
    assert step.checked == ("verified" if step.changed else "unchanged")
    return outcome


# --- folding --------------------------------------------------------------------------------------


def test_into_conv() -> None:
    weights = {"a.weight": floats(5, 4, 3, 3), **norm(5)}
    folded = fold(build([conv("x", "a", "a.weight"), batch_norm("a", "y")], weights)).program
    (node,) = folded.model.graph
    assert (node.op_type, node.name, node.outputs[0].name) == ("Conv", "conv_a", "y")
    assert initializers(folded) == {"a.weight", "a.bias"}


def test_into_conv_with_bias_and_groups() -> None:
    weights = {"w": floats(6, 2, 3, 3), "b": floats(6), **norm(6)}
    folded = fold(build([conv("x", "a", "w", "b", group=2), batch_norm("a", "y", epsilon=0.1)], weights)).program
    assert operators(folded) == ["Conv"] and initializers(folded) == {"w", "b"}


def test_into_conv_transpose() -> None:
    weights = {"w": floats(4, 3, 3, 3), **norm(6)}
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["a"], group=2), batch_norm("a", "y")]
    assert operators(fold(build(nodes, weights)).program) == ["ConvTranspose"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_into_gemm(transposed: int, bias: bool) -> None:
    weights = {"w": floats(5, 4) if transposed else floats(4, 5), **norm(5)}
    given = ["x", "w", "b"] if bias else ["x", "w"]
    weights |= {"b": floats(5)} if bias else {}
    gemm = helper.make_node("Gemm", given, ["a"], transB=transposed, alpha=0.5, beta=3.0)
    folded = fold(build([gemm, batch_norm("a", "y")], weights, shape=("N", 4))).program
    assert operators(folded) == ["Gemm"]


def test_shared_bias_is_copied() -> None:
    """Exporters write equal tensors once: two convolutions with one zero bias."""
    weights = {"w1": floats(4, 4, 1, 1), "w2": floats(4, 4, 1, 1), "zero": np.zeros(4, np.float32)}
    weights |= norm(4, "p.") | norm(4, "q.")
    nodes = [
        conv("x", "a", "w1", "zero"),
        batch_norm("a", "b", "p."),
        conv("b", "c", "w2", "zero"),
        batch_norm("c", "y", "q."),
    ]
    folded = fold(build(nodes, weights)).program
    assert operators(folded) == ["Conv", "Conv"] and len(initializers(folded)) == 4


def test_shared_weight_is_copied_where_another_node_reads_it() -> None:
    weights = {"w": floats(4, 4, 1, 1), **norm(4)}
    nodes = [conv("x", "a", "w"), batch_norm("a", "b"), conv("b", "y", "w")]
    folded = fold(build(nodes, weights)).program
    assert operators(folded) == ["Conv", "Conv"] and {"w", "w_1"} <= initializers(folded)


def test_weights_from_constant_and_identity_nodes() -> None:
    parameters = norm(4)
    scale = parameters.pop("scale")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(floats(4, 4, 1, 1))),
        helper.make_node("Identity", ["shared"], ["scale"]),
        conv("x", "a", "w"),
        batch_norm("a", "y"),
    ]
    folded = fold(build(nodes, {"shared": scale, **parameters})).program
    assert operators(folded) == ["Conv"]
    assert "shared" not in initializers(folded)


def test_ir_version_3() -> None:
    weights = {"w": floats(5, 4, 1, 1), **norm(5)}
    program = build([conv("x", "a", "w"), batch_norm("a", "y")], weights, ir_version=3, opset=9, inputs=tuple(weights))
    outcome = fold(program)
    assert operators(outcome.program) == ["Conv"] and outcome.program.model.ir_version == 4
    assert [value.name for value in outcome.program.model.graph.inputs] == ["x"]
    assert "no longer inputs" in outcome.report.steps[0].summary


def test_two_readers_of_the_inner_value() -> None:
    weights = {"w": floats(4, 4, 1, 1), **norm(4)}
    nodes = [conv("x", "a", "w"), batch_norm("a", "b"), helper.make_node("Add", ["a", "b"], ["y"])]
    refuse(build(nodes, weights))


def refuse(program: Program) -> None:
    outcome = fold(program)
    assert outcome.program is program and "kept" in outcome.report.steps[0].summary


def test_refused() -> None:
    weights = {"w": floats(4, 4, 1, 1), **norm(4)}
    pair = [conv("x", "a", "w"), batch_norm("a", "y")]
    refuse(build(pair, weights, outputs=("y", "a")))
    refuse(build([batch_norm("x", "a"), conv("a", "y", "w")], weights))
    # What a caller may override is not constant.
    refuse(build(pair, weights, inputs=("w",)))
    refuse(build(pair, weights, inputs=("mean",)))
    refuse(build([conv("x", "a", "w"), training("a", "y")], weights))
    computed = [helper.make_node("Relu", ["w0"], ["w"]), *pair]
    refuse(build(computed, {"w0": weights["w"], **{name: weights[name] for name in PARAMETERS}}))


def test_training_mode_stays_beside_one_that_is_folded() -> None:
    weights = {"w": floats(4, 4, 1, 1), "v": floats(4, 4, 1, 1), **norm(4, "p."), **norm(4, "q.")}
    nodes = [
        conv("x", "a", "w"),
        batch_norm("a", "b", "p."),
        conv("b", "c", "v"),
        training("c", "y", "q."),
    ]
    folded = fold(build(nodes, weights)).program
    assert operators(folded) == ["Conv", "Conv", "BatchNormalization"]
    assert [node.domain for node in folded.model.graph] == ["", "", ""]


def test_nothing_else_is_touched() -> None:
    weights = {"w": floats(4, 4, 1, 1), "unused": floats(3), "one": np.ones(1, np.float32), **norm(4)}
    nodes = [
        conv("x", "a", "w"),
        batch_norm("a", "b"),
        helper.make_node("Identity", ["b"], ["c"]),
        helper.make_node("Mul", ["c", "one"], ["y"]),
        helper.make_node("Relu", ["x"], ["idle"]),
    ]
    folded = fold(build(nodes, weights)).program
    assert operators(folded) == ["Conv", "Identity", "Mul", "Relu"]
    assert initializers(folded) == {"w", "w.bias", "unused", "one"}


def test_source_is_untouched_and_names_are_its_own() -> None:
    weights = {"w": floats(4, 4, 1, 1), "zero": np.zeros(4, np.float32), **norm(4)}
    program = build([conv("x", "a", "w", "zero"), batch_norm("a", "b"), conv("b", "y", "w", "zero")], weights)
    before = ir.to_proto(program.emit()).SerializeToString(deterministic=True)
    outcome = fold(program)
    ir.to_proto(outcome.program.emit())
    assert ir.to_proto(program.emit()).SerializeToString(deterministic=True) == before


# --- clean-up -------------------------------------------------------------------------------------


def clean(program: Program, **options: Any) -> Outcome:
    outcome = run_passes(program, [CleanUp(**options)])
    (step,) = outcome.report.steps
    assert step.checked == ("verified" if step.changed else "unchanged")
    return outcome


def constants(size: int = 4) -> Program:
    nodes = [
        helper.make_node("Add", ["u", "v"], ["w"]),
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "w"], ["b"]),
        helper.make_node("Mul", ["b", "one"], ["y"]),
        helper.make_node("Relu", ["x"], ["idle"]),
    ]
    weights = {"u": floats(size), "v": floats(size), "one": np.ones((), np.float32), "unused": floats(2)}
    return build(nodes, weights, shape=("N", size))


def test_constants_identities_and_idle_nodes_go() -> None:
    outcome = clean(constants())
    assert operators(outcome.program) == ["Mul"]
    assert [value.name for value in outcome.program.model.graph.outputs] == ["y"]
    assert "5 to 1 nodes" in outcome.report.steps[0].summary


def test_big_constants_stay() -> None:
    assert operators(clean(constants(64), input_size_limit=10).program) == ["Add", "Mul"]
    nodes = [helper.make_node("Expand", ["one", "size"], ["w"]), helper.make_node("Mul", ["x", "w"], ["y"])]
    weights = {"one": floats(1), "size": np.array([64])}
    assert operators(clean(build(nodes, weights, shape=("N", 64))).program) == ["Mul"]
    program = build(nodes, weights, shape=("N", 64))
    assert clean(program, output_size_limit=10).program is program


def test_equal_nodes_are_merged_if_asked() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["x"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    assert operators(clean(build(nodes, {}, shape=("N", 4))).program) == ["Relu", "Add"]
    program = build(nodes, {}, shape=("N", 4))
    assert clean(program, merge=False).program is program


def test_random_and_quantized_constants_stay() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("RandomUniform", [], ["r"], shape=[4], seed=1.0),
        helper.make_node("Add", ["a", "r"], ["y"]),
    ]
    weights: dict[str, Array] = {"q": np.ones((4, 4), np.int8), "scale": np.array(0.5, np.float32)}
    program = build(nodes, weights, shape=("N", 4))
    assert run_passes(program, [CleanUp()], verify=False).program is program


def test_batch_normalizations_stay_nodes() -> None:
    program = build([conv("x", "a", "w"), batch_norm("a", "y")], {"w": floats(4, 4, 1, 1), **norm(4)})
    assert clean(program).program is program


def test_graph_output_that_is_an_input_keeps_its_name() -> None:
    program = build([helper.make_node("Identity", ["x"], ["y"])], {}, shape=("N", 4))
    cleaned = clean(program).program
    assert [value.name for value in cleaned.model.graph.outputs] == ["y"]


@pytest.mark.parametrize("name", ["resnet_bottleneck", "llama_gqa", "vit"])
def test_real_graphs(data_dir: Path, name: str) -> None:
    outcome = run_passes(load(data_dir / "graphs" / f"{name}.onnx"), "clean-up, fold-batch-norm")
    assert outcome.report.error is not None
