"""Centring of streams: which become RMS normalizations, what the group gains, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
from tests.models.expose_nets import (
    array_of,
    difference,
    expose,
    layer_norm,
    operators,
    pre_norm_stack,
    program,
    spelled_layer_norm,
)
from tests.zoo.net import Net

from cipm_ir.passes.exact.expose.centre import to_rms
from cipm_ir.passes.exact.expose.forms import find_norms
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter
from cipm_ir.symmetry.program import Program

N = 12
Norm = Callable[[Net, str, int], str]


def stack(name: str, norm: Norm = layer_norm, opset: int = 20, dtype: str = "float32") -> Net:
    net = Net(name, opset=opset, dtype=dtype)
    pre_norm_stack(net, N, norm=norm)
    return net


@pytest.mark.parametrize("norm", [layer_norm, spelled_layer_norm, partial(layer_norm, beta=False)])
@pytest.mark.parametrize("fold", [True, False])
def test_the_stream_may_be_rotated(norm: Norm, fold: bool) -> None:
    """Signs come with the RMS normalizations, rotations with equal gammas besides."""
    before = program(stack("stack", norm))
    after, step = expose(before, f"norm={str(fold).lower()}")
    assert step.metrics["centred"] == 3 and step.metrics.get("norms", 0) == 3 * fold
    gained = {what: step.metrics["after"][what] - n for what, n in step.metrics["before"].items()}
    assert gained["signs"] == N and gained["rotatable_units"] == N * fold
    assert gained["free_scales"] == gained["units"] == 0
    found = operators(after)
    assert "LayerNormalization" not in found and "Sub" not in found
    assert found.count("Sqrt") == 3
    table = next(name for name in after.model.graph.initializers if name.startswith("table"))
    assert abs(array_of(after, table).mean(axis=1)).max() < 1e-7


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_every_opset(opset: int) -> None:
    """One operator from opset 23 on; before, the way onnxruntime fuses; axes are an attribute before 18."""

    def plain(net: Net, x: str, n: int) -> str:
        return net.op("LayerNormalization", x, net.positive((n,), "gamma"), net.bias(n), epsilon=1e-3)

    net = Net(f"opset {opset}", opset=opset)
    x = net.input("x", ["N", 4])
    for n_in, act in ((4, False), (N, True)):
        x = net.linear(net.relu(x) if act else x, n_in, N)
    y = plain(net, x, N)
    net.output(net.op("MatMul", y, net.weight((N, 3), N)), ["N", 3])
    after, step = expose(program(net), "norm=false")
    assert step.metrics["centred"] == 1
    found = operators(after)
    assert found.count("RMSNormalization") == (opset >= 23) and found.count("Div") == (opset < 23)
    assert found[-2:] == ["Add", "MatMul"], "beta was not folded, so it is added"


def test_names_stay() -> None:
    before = program(stack("names"))
    after, _ = expose(before)
    outputs = {value.name for node in before.model.graph for value in node.outputs}
    assert outputs <= {value.name for node in after.model.graph for value in node.outputs}
    nodes = {node.name for node in before.model.graph}
    assert nodes <= {node.name for node in after.model.graph}


def test_writers_of_all_kinds() -> None:
    """Convolution, class token, positions, a mask, Gemm: all that vision transformers add up."""
    net = Net("writers", opset=17)
    patches = net.op("Conv", net.image(3, 4), net.weight((N, 3, 2, 2), 12), net.bias(N), strides=[2, 2])
    x = net.op("Transpose", net.op("Reshape", patches, net.const([0, N, 4])), perm=[0, 2, 1])
    first = net.op("Slice", net.op("Shape", x), net.const([0]), net.const([1]))
    shape = net.op("Concat", first, net.const([1, N]), axis=0)
    token = net.op("Expand", net.const(net.normal((1, 1, N), 1.0), "token"), shape)
    x = net.op("Concat", token, x, axis=1)
    x = net.op("Add", x, net.const(net.normal((1, 5, N), 1.0), "positions"))
    x = net.op("Mul", x, net.const(net.rng.uniform(0, 1, (1, 5, 1)), "mask"))
    y = layer_norm(net, x, N)
    x = net.op("Sub", x, net.linear(net.relu(net.linear(y, N, 7)), 7, N))
    pooled = net.op("ReduceMean", x, axes=[1], keepdims=0)
    net.output(net.gemm(layer_norm(net, pooled, N), N, 3), ["N", 3])
    after, step = expose(program(net))
    assert step.metrics["centred"] == 2 and step.metrics["norms"] == 2
    for name in ("token", "positions"):
        (full,) = [one for one in after.model.graph.initializers if one.startswith(name)]
        assert abs(array_of(after, full).mean(axis=-1)).max() < 1e-7


def test_gemm_written() -> None:
    net = Net("gemm")
    x = net.input("x", ["N", 4])
    h = net.op("Add", net.gemm(x, 4, N), net.gemm(x, 4, N, trans=0))
    net.output(net.gemm(layer_norm(net, h, N), N, 3), ["N", 3])
    _, step = expose(program(net))
    assert step.metrics["centred"] == 1


# --- left alone -----------------------------------------------------------------------------------


def refused(net: Net, options: str = "norm=false", tolerance: float = 1e-5) -> str:
    _, step = expose(program(net), options, tolerance=tolerance)
    assert not step.changed
    return step.summary


def test_another_reader() -> None:
    """A Linear sees the mean, so it stays."""
    net = Net("read")
    x = net.linear(net.input("x", ["N", 4]), 4, N)
    net.output(net.op("Add", net.linear(layer_norm(net, x, N), N, 3), net.linear(x, N, 3)), ["N", 3])
    assert refused(net) == "1 layer normalization kept: MatMul reads the stream"


def test_graph_input_and_output() -> None:
    net = Net("shown")
    net.output(net.linear(layer_norm(net, net.input("x", ["N", N]), N), N, 3), ["N", 3])
    assert "a graph input writes the stream" in refused(net)
    net = Net("shown too")
    x = net.linear(net.input("x", ["N", 4]), 4, N)
    net.output(net.linear(layer_norm(net, x, N), N, 3), ["N", 3])
    net.output(x, ["N", N])
    assert "a graph output shows the stream" in refused(net)


def test_the_mean_itself_is_read() -> None:
    net = Net("mean")
    x = net.linear(net.input("x", ["N", 4]), 4, N)
    y = net.linear(spelled_layer_norm(net, x, N), N, 3)
    mean = next(node.output[0] for node in net.nodes if node.op_type == "ReduceMean")
    net.output(net.op("Add", y, mean), ["N", 3])
    assert refused(net) == "nothing to expose"


def test_an_activation_writes() -> None:
    net = Net("activation")
    x = net.relu(net.linear(net.input("x", ["N", 4]), 4, N))
    net.output(net.linear(layer_norm(net, x, N), N, 3), ["N", 3])
    assert "Relu writes the stream" in refused(net)


@pytest.mark.parametrize("group", [N, 3])
def test_a_grouped_convolution_writes(group: int) -> None:
    """As in ConvNeXt: each output sums over other inputs, so that no change of the weight takes the mean away."""
    net = Net("grouped")
    x = net.op("Conv", net.image(3, 4), net.weight((N, 3, 1, 1), 3), net.bias(N))
    x = net.op("Conv", x, net.weight((N, N // group, 3, 3), 9), net.bias(N), group=group, pads=[1] * 4)
    x = net.op("Transpose", x, perm=[0, 2, 3, 1])
    net.output(net.linear(layer_norm(net, x, N), N, 3), ["N", 4, 4, 3])
    assert "a grouped Conv writes the stream" in refused(net)


def test_post_norm_stays() -> None:
    """As in BERT: what a normalization writes cannot lose its mean."""
    net = Net("post")
    x = net.linear(net.input("x", ["N", 4]), 4, N)
    y = layer_norm(net, x, N)
    z = layer_norm(net, net.op("Add", y, net.linear(y, N, N)), N)
    net.output(net.linear(z, N, 3), ["N", 3])
    after, step = expose(program(net), "norm=false")
    assert step.metrics["centred"] == 1 and "LayerNormalization writes the stream" in step.summary
    assert operators(after).count("LayerNormalization") == 1


def test_a_scale_by_unit() -> None:
    """Folded into the product before it, it is no obstacle any more."""
    net = Net("layer scale")
    x = net.linear(net.input("x", ["N", 4]), 4, N)
    x = net.op("Mul", x, net.positive((N,)))
    net.output(net.linear(layer_norm(net, x, N), N, 3), ["N", 3])
    assert "Mul scales the units of the stream one by one" in refused(net, "norm=false, layer_scale=false")
    after, step = expose(program(net))
    assert step.metrics["layer_scales"] == step.metrics["centred"] == 1
    assert operators(after)[:2] == ["MatMul", "Add"] and step.metrics["after"]["rotatable_units"] == N


def test_a_number_is_added() -> None:
    net = Net("number")
    x = net.op("Add", net.linear(net.input("x", ["N", 4]), 4, N), net.const(0.5))
    net.output(net.linear(layer_norm(net, x, N), N, 3), ["N", 3])
    assert "something without the axis is added" in refused(net)


def test_tied_table_needs_leave() -> None:
    """The head reads the embedding's table: centring it would change the head."""
    net = Net("tied")
    table = net.const(net.normal((7, N), 1.0), "table")
    x = net.op("Gather", table, net.input("x", ["N", "L"], onnx.TensorProto.INT64))
    y = net.op("MatMul", layer_norm(net, x, N), net.op("Transpose", table, perm=[1, 0]))
    net.output(y, ["N", "L", 7])
    assert "shared=all splits it" in refused(net, "norm=true")
    after, step = expose(program(net), "shared=all")
    assert step.metrics["centred"] == step.metrics["norms"] == 1
    tables = [name for name in after.model.graph.initializers if array_of(after, name).shape == (7, N)]
    assert len(tables) == 2


def test_half_precision_would_round() -> None:
    net = Net("half", dtype="float16")
    x = net.linear(net.input("x", ["N", 4]), 4, N)
    net.output(net.linear(layer_norm(net, x, N), N, 3), ["N", 3])
    assert "would round in float16" in refused(net, tolerance=1e-2)


def test_no_gain() -> None:
    """Where the units are pinned anyway, here by a graph output, nothing happens."""
    net = Net("pinned")
    table = net.const(net.normal((7, N), 1.0), "table")
    x = net.op("Gather", table, net.input("x", ["N"], onnx.TensorProto.INT64))
    net.output(layer_norm(net, x, N), ["N", N])
    assert "no sign would be free" in refused(net)


def test_without_centring_the_outputs_differ() -> None:
    """Negative control: an RMS normalization of a stream that keeps its mean computes something else."""
    before = program(stack("control"))
    draft = GraphRewriter(before.emit())
    for norm in find_norms(draft):
        to_rms(draft, norm)
    assert difference(before, Program.of(draft.model)) > 1e-2
    assert np.isfinite(difference(before, before))
