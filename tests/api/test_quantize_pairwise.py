"""The baseline of the quantization benchmark does what its paper says, and `equalize` does better where it must."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from tests.benchmarks import pairwise
from tests.benchmarks.quantizers import Loss, outputs, rounded, sqnr, weights_rounded
from tests.models.compress_nets import residual, two_convs
from tests.models.quantized_models import feeds, separable

import cipm_ir
from cipm_ir.algebra import Element
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]


def parameters(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def scrambled(model: onnx.ModelProto) -> onnx.ModelProto:
    """A random element of the scaling group, e^N(0, 1.5)."""
    program = Program.of(ir.from_proto(model))
    rng, chosen = np.random.default_rng(0), {}
    for space in program.spaces:
        scale = np.exp(1.5 * rng.standard_normal((space.group.scales, space.size)))
        chosen[space] = Element(np.arange(space.size), scale, np.ones((space.group.signs, space.size), np.int8))
    return ir.to_proto(program.act(chosen).emit())


def ranges(model: onnx.ModelProto, link: pairwise.Link) -> tuple[Array, Array]:
    weights = parameters(model)
    first, second = np.abs(weights[link.first.weight]), np.abs(weights[link.second.weight])
    axis = 0 if link.second.depthwise else link.second.inward
    return (
        first.max(axis=tuple(a for a in range(first.ndim) if a != link.first.outward)),
        second.max(axis=tuple(a for a in range(second.ndim) if a != axis)),
    )


def test_a_pair_gets_equal_ranges() -> None:
    model = scrambled(two_convs().model())
    ((link,),) = pairwise.find_chains(model)
    made = pairwise.equalized(model)
    one, two = ranges(made, link)
    assert np.allclose(one, two, rtol=1e-3)
    before, after = ranges(model, link)
    assert np.allclose(one, np.sqrt(before * after), rtol=1e-3)


def test_a_depthwise_triple_gets_equal_ranges() -> None:
    model = scrambled(separable())
    chains = pairwise.find_chains(model)
    assert [len(chain) for chain in chains] == [2], "nothing goes through the pooling before the last layer"
    made = pairwise.equalized(model)
    one, two = ranges(made, chains[0][0])
    _, three = ranges(made, chains[0][1])
    assert np.allclose(one, two, rtol=1e-3) and np.allclose(two, three, rtol=1e-3)


def test_the_function_stays() -> None:
    for model in (two_convs().model(), separable(), residual().model()):
        (inputs,) = feeds(model, count=1)[0].values()
        wanted = outputs(model, "x", inputs)
        assert np.abs(outputs(pairwise.equalized(model), "x", inputs) - wanted).max() < 1e-5
        exact = pairwise.equalized(model, power_of_two=True)
        assert np.array_equal(outputs(exact, "x", inputs), wanted)
        assert any(not np.array_equal(a, parameters(exact)[name]) for name, a in parameters(model).items())


def test_residual_streams_are_beyond_it() -> None:
    chains = pairwise.find_chains(residual(blocks=3).model())
    assert len(chains) == 3, "the inner pair of every block"


def test_layers_that_share_a_weight_are_left_out() -> None:
    model = two_convs().model()
    nodes = [n for n in model.graph.node if n.op_type == "Conv"]
    model.graph.node.append(onnx.helper.make_node("Identity", [nodes[0].input[1]], ["copy"]))
    assert not pairwise.find_chains(model)


def test_the_whole_graph_does_better_where_pairs_do_not_reach() -> None:
    """A scrambled residual network in eight bits per tensor: lost, better with pairs, found again with `equalize`."""
    plain = residual().model()
    moved = scrambled(plain)
    (inputs,) = feeds(plain, count=1, batch=64)[0].values()
    wanted = outputs(plain, "x", inputs)

    def error(model: onnx.ModelProto) -> float:
        made = [weights_rounded(model, 8, per_channel=False, stretch=s)[0] for s in (1.0, 1.01, 1.02, 1.03)]
        return Loss.mean([Loss.of(wanted, outputs(m, "x", inputs), wanted.argmax(axis=1)) for m in made]).error

    made = cipm_ir.optimize(moved, ["equalize"]).model
    assert np.array_equal(outputs(made, "x", inputs), outputs(moved, "x", inputs))
    assert error(made) < 0.2 * error(pairwise.equalized(moved)) < 0.2 * error(moved)
    assert error(made) < 10 * error(plain)
    assert error(cipm_ir.optimize(moved, ["equalize{exact=false}"]).model) < 10 * error(plain)


def test_steps_and_ratio() -> None:
    weight = np.array([[1.0, -0.5, 0.1], [100.0, 3.0, -70.0]])
    assert np.array_equal(rounded(weight, 8, 0)[:, 0], weight[:, 0])
    assert sqnr(weight, rounded(weight, 8, 0)) > sqnr(weight, rounded(weight, 4, 0)) > 0
    assert (rounded(weight, 4, None)[0] == 0).all(), "the small row is lost with one step for all"
