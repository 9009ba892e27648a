"""Folding gamma and beta of normalizations into the products that read them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tests.models.expose_nets import (
    array_of,
    difference,
    expose,
    layer_norm,
    operators,
    program,
    rms_norm,
    spelled_layer_norm,
    vectors,
)
from tests.zoo.net import Net

from cipm_ir.passes.exact.expose.forms import find_norms
from cipm_ir.passes.exact.expose.linear import absorb_input, carry_out
from cipm_ir.passes.exact.expose.norm import affine_of
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter
from cipm_ir.passes.framework.pipeline import run_passes
from cipm_ir.symmetry.program import Program

ONLY = "centre=false"


def gammas(made: Program) -> list[bool]:
    """Per constant named gamma, whether it is all ones."""
    names = sorted(name for name in made.model.graph.initializers if name.startswith("gamma"))
    return [bool((array_of(made, name) == 1).all()) for name in names]


def rows(net: Net, n: int = 8) -> str:
    return net.input("x", ["N", "L", n])


def finish(net: Net, *values: str) -> Net:
    for value in values:
        net.output(value, ["N", None, None])  # type: ignore[list-item]
    return net


def test_layer_norm_into_three_products() -> None:
    """Query, key and value read one normalization: with a bias, without, and as Gemm would, transposed."""
    net = Net("qkv")
    y = layer_norm(net, rows(net), 8)
    q = net.linear(y, 8, 5)
    k = net.op("MatMul", y, net.weight((8, 5), 8))
    v = net.op("MatMul", y, net.op("Transpose", net.weight((5, 8), 8), perm=[1, 0]))
    after, step = expose(program(finish(net, q, k, v)))
    assert step.metrics["norms"] == 1 and "folded into 3 products" in step.summary
    assert gammas(after) == [True]
    (norm,) = [node for node in after.model.graph if node.op_type == "LayerNormalization"]
    assert len(norm.inputs) == 2, "beta is gone"
    assert operators(after).count("Add") == 3, "each product has a bias now"
    assert [value.name for value in after.model.graph.outputs] == [q, k, v]


@pytest.mark.parametrize("form", ["reciprocal", "divided", "power", "one over", "multiplied"])
def test_spelled_rms(form: str) -> None:
    net = Net(f"rms {form}")
    after, step = expose(program(finish(net, net.linear(rms_norm(net, rows(net), 8, form), 8, 4))))
    assert step.metrics["norms"] == 1 and gammas(after) == [True]


@pytest.mark.parametrize("form", ["operator"])
def test_rms_operator(form: str) -> None:
    net = Net(f"rms {form}", opset=23)
    after, step = expose(program(finish(net, net.linear(rms_norm(net, rows(net), 8, form), 8, 4))))
    assert step.metrics["norms"] == 1 and gammas(after) == [True]


@pytest.mark.parametrize("opset", [13, 20])
def test_spelled_layer_norm(opset: int) -> None:
    net = Net("spelled", opset=opset)
    before = program(finish(net, net.linear(spelled_layer_norm(net, rows(net), 8), 8, 4)))
    after, step = expose(before)
    assert step.metrics["norms"] == 1 and gammas(after) == [True]
    assert operators(after) == operators(before), "the Add stays, so that runtimes still find the pattern"
    (beta,) = [name for name in after.model.graph.initializers if name.startswith("beta")]
    assert not array_of(after, beta).any()


def test_onnxruntimes_own_operator() -> None:
    """SimplifiedLayerNormalization: onnx does not know it, so its checker and its shape inference are no help."""
    net = Net("simplified")
    y = net.op("SimplifiedLayerNormalization", rows(net), vectors(net, 8)[0], axis=-1, epsilon=1e-6)
    before = program(finish(net, net.linear(y, 8, 4)))
    after = run_passes(before, "expose").program
    assert gammas(after) == [True] and difference(before, after) < 1e-5


def test_into_gemm_through_moves() -> None:
    """Reshape, Slice, Squeeze and Transpose lie between; alpha and beta scale the parts of a Gemm."""
    net = Net("moves")
    y = net.op("Reshape", layer_norm(net, rows(net), 8), net.const([0, 0, 1, 8]))
    y = net.op("Transpose", y, perm=[1, 2, 3, 0])
    y = net.op("Slice", y, net.const([0]), net.const([1]), net.const([0]))
    y = net.op("Transpose", net.op("Squeeze", y, net.const([0, 1])), perm=[1, 0])
    y = net.op("Gemm", y, net.weight((5, 8), 8), net.bias(5), transB=1, alpha=0.5, beta=2.0)
    net.output(y, ["N", 5])
    after, step = expose(program(net))
    assert step.metrics["norms"] == 1 and operators(after) == operators(program(net))


def test_into_convolution_without_padding() -> None:
    net = Net("patches", opset=17)
    y = net.op("Transpose", layer_norm(net, net.input("x", ["N", 4, 4, 6]), 6), perm=[0, 3, 1, 2])
    y = net.op("Conv", y, net.weight((5, 6, 2, 2), 24), kernel_shape=[2, 2], strides=[2, 2])
    net.output(y, ["N", 5, 2, 2])
    _, step = expose(program(net))
    assert step.metrics["norms"] == 1


def test_spelled_over_channels() -> None:
    """As ConvNeXt does it: over axis 1, gamma and beta of shape (C, 1, 1)."""
    net = Net("channels")
    y = spelled_layer_norm(net, net.image(6, 4), 6, axis=1, shape=(6, 1, 1))
    net.output(net.op("Conv", y, net.weight((5, 6, 2, 2), 24), net.bias(5), kernel_shape=[2, 2]), ["N", 5, 3, 3])
    _, step = expose(program(net))
    assert step.metrics["norms"] == 1


def test_signs_and_zeros_of_gamma() -> None:
    """A gamma with zeros folds too: these units end there."""
    net = Net("zeros")
    gamma = net.const(np.array([0, 1, -2, 0, 3, 0, 1, 1], np.float32), "gamma")
    y = net.op("LayerNormalization", rows(net), gamma)
    after, step = expose(program(finish(net, net.linear(y, 8, 3))))
    assert step.metrics["norms"] == 1 and gammas(after) == [True]


def test_twice_is_once() -> None:
    net = Net("twice")
    after, _ = expose(program(finish(net, net.linear(layer_norm(net, rows(net), 8), 8, 3))))
    _, step = expose(after, ONLY)
    assert not step.changed and step.summary == "nothing to expose"


# --- left alone -----------------------------------------------------------------------------------


def refused(net: Net, *values: str, options: str = ONLY, **kind: float) -> str:
    """The summary of a run that changes nothing."""
    _, step = expose(program(finish(net, *values)), options, **kind)  # type: ignore[arg-type]
    assert not step.changed
    return step.summary


def test_another_reader() -> None:
    net = Net("residual")
    y = layer_norm(net, rows(net), 8)
    assert refused(net, net.op("Add", y, net.linear(y, 8, 8))) == "1 gamma kept: Add reads it"


def test_graph_output() -> None:
    net = Net("shown")
    y = layer_norm(net, rows(net), 8)
    assert "a graph output shows it" in refused(net, net.linear(y, 8, 3), y)


def test_padded_convolution_takes_no_beta() -> None:
    net = Net("padded", opset=17)
    y = net.op("Transpose", layer_norm(net, net.input("x", ["N", 4, 4, 6]), 6), perm=[0, 3, 1, 2])
    net.output(net.conv(y, 6, 5), ["N", 5, 4, 4])
    _, step = expose(program(net))
    assert not step.changed and "pads with zeros" in step.summary


def test_computed_weight() -> None:
    net = Net("computed")
    weight = net.input("weight", [8, 3])
    y = net.op("MatMul", layer_norm(net, rows(net), 8), weight)
    assert "MatMul reads it without a float weight" in refused(net, y)


def test_quantized_weight() -> None:
    net = Net("quantized")
    whole = net.const(net.rng.integers(-100, 100, (8, 3)), "whole", np.int8)
    weight = net.op("DequantizeLinear", whole, net.const(0.01), net.const(np.int8(0), dtype=np.int8))
    assert "without a float weight" in refused(net, net.op("MatMul", layer_norm(net, rows(net), 8), weight))


def test_subgraph() -> None:
    """The branch of an If reads the normalization from outside."""
    net = Net("branch")
    y = layer_norm(net, rows(net), 8)
    inner = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)
    then = onnx.helper.make_graph([onnx.helper.make_node("Identity", [y], ["inner"])], "then", [], [inner])
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", [y], ["inner"])], "other", [], [inner])
    z = net.op("If", net.const(True, dtype=bool), then_branch=then, else_branch=other)
    assert "a subgraph reads it" in refused(net, net.linear(y, 8, 8), z)


def test_shared_weight_needs_leave() -> None:
    """A matrix that two products read is split only if asked; then each gets its own gamma."""
    net = Net("tied")
    x = rows(net)
    weight = net.weight((8, 8), 8)
    y = net.op("MatMul", layer_norm(net, x, 8), weight)
    net = finish(net, net.op("MatMul", layer_norm(net, y, 8), weight))
    _, step = expose(program(net), ONLY)
    assert not step.changed and "shared=all splits it" in step.summary
    after, step = expose(program(net), f"{ONLY}, shared=all")
    assert step.metrics["norms"] == 2 and gammas(after) == [True, True]


def test_shared_gamma_and_bias_are_split() -> None:
    """Exporters write equal vectors once."""
    net = Net("merged")
    x = rows(net)
    gamma, beta, bias = net.positive((8,), "gamma"), net.bias(8, "beta"), net.bias(8)
    for _ in range(2):
        y = net.op("LayerNormalization", x, gamma, beta)
        x = net.op("Add", net.op("MatMul", y, net.weight((8, 8), 8)), bias)
    after, step = expose(program(finish(net, x)), ONLY)
    assert step.metrics["norms"] == 2 and all(gammas(after))
    _, step = expose(program(net), f"{ONLY}, shared=none")
    assert not step.changed and "shared=vectors splits it" in step.summary


def test_half_precision_is_left_where_it_would_round() -> None:
    net = Net("half", dtype="float16")
    y = layer_norm(net, rows(net), 8)
    assert "would round in float16" in refused(net, net.linear(y, 8, 3), tolerance=1e-2)
    net = Net("half, powers of two", dtype="float16")
    gamma = net.const(np.array([1, 2, 4, 0.5, -1, -2, 1, 8], np.float16), "gamma")
    y = net.op("LayerNormalization", rows(net), gamma)
    _, step = expose(program(finish(net, net.linear(y, 8, 3))), tolerance=1e-2)
    assert step.metrics["norms"] == 1


def test_two_axes() -> None:
    net = Net("two axes")
    x = net.input("x", ["N", 4, 8])
    y = net.op("LayerNormalization", x, net.const(net.normal((4, 8), 1.0), "gamma"), axis=-2)
    assert refused(net, net.linear(y, 8, 3)) == "nothing to expose"


def test_one_reader_of_two_is_caught() -> None:
    """Negative control: folding into one of two readers changes the outputs, and the comparison says so."""
    net = Net("half done")
    y = layer_norm(net, rows(net), 8)
    before = program(finish(net, net.linear(y, 8, 3), net.linear(y, 8, 3)))
    draft = GraphRewriter(before.emit())
    (norm,) = find_norms(draft)
    scale, shift = affine_of(draft, norm)
    node, index = next((use.node, use.idx) for use in norm.output.uses())
    steps = absorb_input(draft, node, index, norm.axis, scale, shift)
    assert norm.gamma is not None
    carry_out(draft, [*steps, draft.change(norm.gamma, np.ones_like)])
    norm.node.resize_inputs(2)
    assert difference(before, Program.of(draft.model)) > 1e-2
