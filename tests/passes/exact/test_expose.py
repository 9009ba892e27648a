"""The pass `expose` as a whole: shared constants, batch norm, options, real architectures, models in odd shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.models.expose_nets import array_of, difference, expose, layer_norm, operators, pre_norm_stack, program
from tests.zoo.net import Net

from cipm_ir.api import load
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter
from cipm_ir.passes.exact.expose.shared import split_shared
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.symmetry.program import Program

# --- shared constants -----------------------------------------------------------------------------


def twins(matrix: bool = False) -> Net:
    """Two layers with one bias, and one square weight where ``matrix``."""
    net = Net(f"twins {matrix}")
    bias, weight = net.bias(6, "shared"), net.weight((6, 6), 6, "weight")
    x = net.input("x", ["N", 6])
    for _ in range(2):
        given = weight if matrix else net.weight((6, 6), 6, "own")
        x = net.relu(net.op("Add", net.op("MatMul", x, given), bias))
    net.output(net.linear(x, 6, 3), ["N", 3])
    return net


def test_vectors_are_split() -> None:
    after, step = expose(program(twins()), exact=True)
    assert step.metrics["split"] == 1 and "1 shared constant split (24 bytes more)" in step.summary
    names = [name for name in after.model.graph.initializers if name.startswith("shared")]
    assert len(names) == 2 and (array_of(after, names[0]) == array_of(after, names[1])).all()


def test_matrices_are_split_where_it_frees_symmetry() -> None:
    """The tie takes the first layer's units along with the second's."""
    net = twins(matrix=True)
    _, step = expose(program(net), exact=True)
    assert step.metrics["split"] == 1
    _, step = expose(program(net), "shared=all", exact=True)
    assert step.metrics["split"] == 2
    assert step.metrics["after"]["free_scales"] - step.metrics["before"]["free_scales"] >= 6


def test_a_matrix_that_frees_nothing_stays_shared() -> None:
    """Its axes are those of the graph's input and outputs."""
    net = Net("pinned")
    weight = net.weight((6, 6), 6)
    x = net.input("x", ["N", 6])
    net.output(net.op("MatMul", x, weight), ["N", 6])
    net.output(net.op("MatMul", net.op("Neg", x), weight), ["N", 6])
    _, step = expose(program(net), "shared=all")
    assert not step.changed


def test_none_splits_nothing() -> None:
    _, step = expose(program(twins()), "shared=none")
    assert not step.changed and step.summary == "nothing to expose"


def test_numbers_and_integers_stay_shared() -> None:
    net = Net("numbers")
    x, one, index = net.input("x", ["N", 6]), net.const(np.ones(1)), net.const([0, 2])
    for _ in range(2):
        x = net.op("Concat", net.op("Mul", x, one), net.op("Gather", x, index, axis=1), axis=1)
    net.output(net.op("MatMul", x, net.weight((10, 2), 6)), ["N", 2])
    assert split_shared(GraphRewriter(program(net).emit(), "all")).copies == 0


def test_one_changed_copy_is_seen() -> None:
    """Negative control: the comparison reads both copies."""
    after, _ = expose(program(twins()), exact=True)
    for name in [name for name in after.model.graph.initializers if name.startswith("shared")]:
        assert difference(after, after.refit({name: np.zeros(6, np.float32)})) > 1e-2


# --- the pass -------------------------------------------------------------------------------------


def test_batch_norm_is_folded() -> None:
    net = Net("norms")
    x = net.batch_norm(net.conv(net.image(), 3, 5), 5)
    net.classify(net.batch_norm(net.relu(net.conv(net.relu(x), 5, 4)), 4), 4)
    after, step = expose(program(net))
    assert step.metrics["batch_norms"] == 1 and operators(after).count("BatchNormalization") == 1
    said = "1 batch normalization folded, and the scales between it and its product with it"
    assert step.summary.startswith(f"{said}; 1 batch normalization kept: nothing before can take it")


def test_options_turn_each_rewrite_off() -> None:
    net = Net("all")
    pre_norm_stack(net)
    before = program(net)
    _, step = expose(before, "norm=false, centre=false")
    assert not step.changed
    _, step = expose(before, "centre=false")
    assert (step.metrics["norms"], step.metrics.get("centred")) == (3, None)
    assert str(parse_passes("expose{relu6=true, shared=all}")[0]) == "expose{shared=all, relu6=true}"


def test_nothing_to_do_gives_the_program_back() -> None:
    net = Net("plain")
    net.output(net.linear(net.relu(net.linear(net.input("x", ["N", 4]), 4, 5)), 5, 3), ["N", 3])
    _, step = expose(program(net))
    assert not step.changed and step.summary == "nothing to expose"


def test_ir_version_3() -> None:
    """Initializers that are inputs, as all were then, become plain ones where something is rewritten."""
    net = Net("old", opset=8)
    net.classify(net.relu(net.batch_norm(net.conv(net.image(), 3, 5), 5)), 5)
    model = net.model()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    after, step = expose(program(model))
    assert step.metrics["batch_norms"] == 1 and len(after.model.graph.inputs) == 1


def test_an_initializer_that_a_caller_may_override_stays() -> None:
    net = Net("overridden")
    y = net.linear(layer_norm(net, net.input("x", ["N", 8]), 8), 8, 3)
    net.output(y, ["N", 3])
    model = net.model()
    gamma = next(one for one in model.graph.initializer if one.name.startswith("gamma"))
    model.graph.input.append(onnx.helper.make_tensor_value_info(gamma.name, gamma.data_type, gamma.dims))
    _, step = expose(program(model))
    assert not step.changed


def test_constants_of_constant_nodes() -> None:
    """Weights that are Constant nodes become initializers where they change."""
    net = Net("constants")
    net.output(net.linear(layer_norm(net, net.input("x", ["N", 8]), 8), 8, 3), ["N", 3])
    model = net.model()
    nodes = [onnx.helper.make_node("Constant", [], [one.name], value=one) for one in model.graph.initializer]
    del model.graph.initializer[:]
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    after, step = expose(program(model))
    assert step.metrics["norms"] == 1
    assert operators(after).count("Constant") == 0 and len(after.model.graph.initializers) == 3


def test_functions_are_inlined_where_something_is_rewritten() -> None:
    net = Net("function")
    x = net.op("Twice", net.input("x", ["N", 8]), domain="local")
    net.domains["local"] = 1
    double = onnx.helper.make_node("Add", ["a", "a"], ["b"])
    net.functions.append(
        onnx.helper.make_function("local", "Twice", ["a"], ["b"], [double], [onnx.helper.make_opsetid("", 20)])
    )
    net.output(net.linear(layer_norm(net, x, 8), 8, 3), ["N", 3])
    after, step = expose(program(net))
    assert step.metrics["norms"] == 1 and operators(after)[0] == "Add"


# --- architectures --------------------------------------------------------------------------------

GRAPHS = {
    "bert": {},
    "bert_shared_bias": {"split": 3},
    "llama_gqa": {"norms": 5},
    "vit": {"norms": 5, "centred": 5},
    "mobilenetv2": {"clips": 35},
    "resnet_bottleneck": {},
    "efficientnet": {},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_exported_graphs(name: str, data_dir: Path) -> None:
    before = load(str(data_dir / "graphs" / f"{name}.onnx"))
    exact = name in ("mobilenetv2", "bert_shared_bias")
    _, step = expose(before, "relu6=true", exact=exact)
    done = {what: n for what, n in step.metrics.items() if isinstance(n, int) and n}
    assert done == GRAPHS[name]
    if step.changed:
        gained = {what: step.metrics["after"][what] - n for what, n in step.metrics["before"].items()}
        assert min(gained.values()) >= 0
        assert any(gained.values()) == (name != "bert_shared_bias")


def test_the_source_is_untouched() -> None:
    net = Net("untouched")
    pre_norm_stack(net)
    before = program(net)
    stored = ir.to_proto(before.emit()).SerializeToString()
    expose(before)
    assert ir.to_proto(before.emit()).SerializeToString() == stored
    assert isinstance(before, Program)
