"""Models as onnxruntime's optimizers write them have the units of the originals; shapes behind unknown operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests import zoo
from tests.ops import (
    cases_runtime as registry_cases_runtime,
)
from tests.ops import (
    cases_runtime_quantized as registry_cases_runtime_quantized,
)
from tests.ops.sample import difference
from tests.ops.test_rules_resize import agree, attributes, built, member, removed, silenced
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.ir import fused_shapes
from cipm_ir.ir.probed_shapes import probed_shapes
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program

CASES_OF = (registry_cases_runtime, registry_cases_runtime_quantized)


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as onnxruntime writes it after all optimizations that do not depend on the processor."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def sizes(program: Program) -> Counter[tuple[str, int]]:
    """How many spaces of each kind and size there are."""
    return Counter((space.kind, space.size) for space in program.spaces)


def fused(model: onnx.ModelProto) -> set[str]:
    """Operators of onnxruntime's own in a model."""
    return {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}


NETS = {
    "attention_separate": "FusedMatMul",
    "attention_gqa": "FusedMatMul",
    "attention_rope_table": "FusedMatMul",
    "layer_norm": "FusedGemm",
    "residual_blocks": "FusedConv",
    "grouped_conv": "FusedConv",
    "depthwise_multiplier_two": "FusedConv",
    "channel_shuffle": "FusedConv",
    "unet_concat_skip": "FusedConv",
    "squeeze_excitation": "FusedConv",
    "dynamic_quantization": "DynamicQuantizeMatMul",
    "minilm": "SkipLayerNormalization",
}


@pytest.mark.parametrize("name", NETS)
def test_fusing_loses_no_unit(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    other = optimized(model, tmp_path)
    assert NETS[name] in fused(other)
    before, after = (Program.of(ir.from_proto(m)) for m in (model, other))
    assert sizes(after) == sizes(before)
    assert {str(node) for node in after.opaque} <= {str(node) for node in before.opaque}


# ---------------------------------------------------------------- what counts units follows
MICROSOFT = "com.microsoft::"
HEADS = [
    # a case, the heads that go, the positions that they have in what reads them, and what the attributes become
    ("Attention-projections_inside", 3, {"num_heads": 1}),
    ("Attention-narrow_values", 2, {"num_heads": 1, "qkv_hidden_sizes": [3, 3, 2]}),
    ("MultiHeadAttention-three_inputs", 3, {"num_heads": 1}),
    ("QAttention-attention", 3, {"num_heads": 1}),
]


@pytest.mark.parametrize(("name", "width", "wanted"), HEADS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_head_goes_as_a_whole(name: str, width: int, wanted: dict[str, object]) -> None:
    proto, sample = built(MICROSOFT + name)
    small = removed(proto, member(sample.readers["v"][0]), [1], "blocks")
    found = attributes(small, name.split("-")[0])
    assert {key: found[key] for key in wanted} == wanted
    assert agree(silenced(proto, sample.readers["v"], list(range(width, 2 * width))), small, sample)
    assert not agree(silenced(proto, sample.readers["v"], list(range(width))), small, sample)


@pytest.mark.parametrize("name", ["GroupQueryAttention-grouped", "GroupQueryAttention-packed_in_one"])
def test_query_heads_go_with_their_key_head(name: str) -> None:
    proto, sample = built(MICROSOFT + name)
    small = removed(proto, member(sample.readers["o"][0]), [1], "blocks")
    found = attributes(small, "GroupQueryAttention")
    assert (found["num_heads"], found["kv_num_heads"]) == (2, 1)
    assert agree(silenced(proto, sample.readers["o"], list(range(16, 32))), small, sample)


def test_positions_of_values_go_alike_in_all_heads() -> None:
    proto, sample = built(MICROSOFT + "Attention-projections_inside")
    small = removed(proto, member(sample.readers["v"][0]), [0])
    found = attributes(small, "Attention")
    assert (found["num_heads"], found["qkv_hidden_sizes"]) == (2, [6, 6, 4])
    assert agree(silenced(proto, sample.readers["v"], [0, 3]), small, sample)


def test_the_scale_stays_when_queries_become_narrow() -> None:
    proto, sample = built(MICROSOFT + "MultiHeadAttention-three_inputs")
    small = removed(proto, member(sample.makers["q"][0]), [1])
    assert attributes(small, "MultiHeadAttention")["scale"] == pytest.approx(1 / np.sqrt(3))
    assert agree(silenced(proto, sample.readers["q"], [1, 4]), small, sample)


def test_heads_of_a_size_that_the_kernel_does_not_take_are_refused() -> None:
    proto, sample = built(MICROSOFT + "GroupQueryAttention-grouped")
    with pytest.raises(SymmetryError, match="size"):
        removed(proto, member(sample.readers["o"][0]), [1])


@pytest.mark.parametrize(
    ("name", "attribute", "count"),
    [("MatMulNBits-flat_with_zero_points", "N", 6), ("MatMulNBits-table_with_zero_points", "N", 6)],
)
def test_numbers_of_units_follow(name: str, attribute: str, count: int) -> None:
    proto, sample = built(MICROSOFT + name)
    small = removed(proto, member(sample.readers["c"][0]), [1, 3])
    assert attributes(small, name.split("-")[0])[attribute] == count
    assert agree(silenced(proto, sample.readers["c"], [1, 3]), small, sample)


def test_the_hidden_size_of_a_quantized_lstm_follows() -> None:
    proto, sample = built(MICROSOFT + "DynamicQuantizeLSTM-lstm")
    program = Program.of(ir.from_proto(proto))
    (space,) = [s for s in program.spaces if member(sample.readers["u"][0]) in s.members]
    small = program.restrict({space: np.array([0, 2, 4])}).emit()
    assert attributes(ir.to_proto(small), "DynamicQuantizeLSTM")["hidden_size"] == 3
    assert all(np.isfinite(y).all() for y in run(small, sample.feeds).values())


# ---------------------------------------------------------------- shapes
def block(between: str, *, domain: str = "com.microsoft", dynamic: bool = False) -> onnx.ModelProto:
    """A layer of 8, an operator of a runtime, and a block of 6 units that a Reshape by computed sizes makes."""
    net = Net("block")
    net.domains[domain] = 1
    x = net.input("x", ["N" if dynamic else 2, 4])
    h = net.op(between, net.op("MatMul", x, net.weight((4, 8), 4)), domain=domain)
    rows = net.op("Gather", net.op("Shape", h), net.const([0]))
    h = net.op("Reshape", h, net.op("Concat", rows, net.const([2, 4]), axis=0))
    h = net.op("Relu", net.linear(net.op("ReduceSum", h, net.const([1]), keepdims=0), 4, 6))
    net.output(net.linear(h, 6, 3), ["N" if dynamic else 2, 3])
    return net.model()


@pytest.mark.parametrize("dynamic", [False, True])
def test_shapes_go_on_behind_an_operator_without_a_rule(dynamic: bool) -> None:
    """ScaledSiLU stands in no table of shapes: it is run."""
    assert "ScaledSiLU" not in fused_shapes._RULES
    program = Program.of(ir.from_proto(block("ScaledSiLU", dynamic=dynamic)))
    assert [node.op for node in program.opaque] == ["ScaledSiLU"]
    assert [space.size for space in program.spaces] == [6]


def test_an_operator_that_nobody_knows_hides_shapes_still() -> None:
    """The control: what cannot be run is not guessed."""
    program = Program.of(ir.from_proto(block("Nothing", domain="elsewhere")))
    assert len(program.opaque) > 1


def probe(op: str, *shapes: tuple[int, ...], types: list[ir.DataType] | None = None) -> object:
    node = ir.Node("com.microsoft", op, [ir.Value(name=f"x{k}") for k in range(len(shapes))], num_outputs=1)
    node.outputs[0].name = "y"
    return probed_shapes(node, shapes, 1, types or [ir.DataType.FLOAT] * len(shapes), [None] * len(shapes))


def test_sizes_that_depend_on_content_are_not_known() -> None:
    assert probe("CDist", (3, 4), (5, 4)) == [(3, 5)]
    assert probe("Unique", (7,)) is None  # as many as there are different entries
    assert probe("CDist", (3, 4), (5, 6)) is None  # does not run


BATCHED = [
    {"transBatchA": 1},
    {"transBatchA": 1, "transA": 1},
    {"transBatchB": 1, "transB": 1},
    {"transA": 1, "transB": 1},
]


@pytest.mark.parametrize("turned", BATCHED, ids=str)
def test_shapes_and_labels_of_turned_products(turned: dict[str, int]) -> None:
    """A FusedMatMul with every transpose: the shape as onnxruntime has it, and random elements of all spaces."""
    rng = np.random.default_rng(0)
    a, b = (3, 2, 4, 5), (3, 2, 5, 6)  # (batch, batch, rows, columns)
    for name, sizes_ in (("A", a), ("B", b)):
        if turned.get(f"trans{name}"):
            sizes_ = (*sizes_[:2], sizes_[3], sizes_[2])
        if turned.get(f"transBatch{name}"):
            sizes_ = (sizes_[2], *sizes_[:2], sizes_[3])
        a, b = (sizes_, b) if name == "A" else (a, sizes_)
    parameters = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in (("a", a), ("b", b))
    ]
    given: dict[str, Any] = dict(turned)
    nodes = [
        helper.make_node("Mul", ["a", "one"], ["m"]),
        helper.make_node("FusedMatMul", ["m", "b"], ["y"], domain="com.microsoft", **given),
        helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info("one", 1, [])], [info("z", TensorProto.FLOAT, [])], parameters)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    program = Program.of(ir.from_proto(model))
    feeds = {"one": np.ones((), np.float32)}
    assert program.spaces
    assert program.analysis.walk.shapes.first["y"] == (3, 2, 4, 6)
    moved = program.act({space: space.random(rng) for space in program.spaces})
    assert difference(run(ir.from_proto(model), feeds), run(moved.emit(), feeds)) < 1e-5
