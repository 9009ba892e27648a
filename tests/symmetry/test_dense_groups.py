"""Which spaces admit O(n) or GL(n): transformers of several styles, and every way to spoil it that we know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from tests import zoo
from tests.models.dense_models import BATCH, BERT, LENGTH, LLAMA, Spoil, Style, ids, transformer
from tests.symmetry.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.algebra import DenseElement, Element
from cipm_ir.symmetry.dense import linearities
from cipm_ir.symmetry.primitives.act import act_edits
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space
from cipm_ir.symmetry.spaces import Linearity

WIDTH = LLAMA.width


def stream_of(program: Program) -> Space:
    """The space of the embedding's columns."""
    return next(space for space in program.spaces if any("table" in name for name in space.members))


def dense_elements(program: Program, seed: int = 0) -> dict[Space, DenseElement]:
    """A random matrix for every space with a dense group."""
    rng = np.random.default_rng(seed)
    return {
        space: DenseElement.orthogonal(space.size, rng)
        if space.dense == "O"
        else DenseElement.invertible(space.size, rng)
        for space in program.spaces
        if space.dense
    }


def change(
    model: onnx.ModelProto, elements: Mapping[Space, Element | DenseElement], program: Program, **feeds: NDArray[Any]
) -> float:
    """Relative change of the outputs when elements act."""
    inputs = feeds or ids()
    before = zoo.run(model, inputs, reference=_new_operators(model))
    return largest_change(before, zoo.run(turned(program, elements), inputs, reference=_new_operators(model)))


def turned(program: Program, elements: Mapping[Space, Element | DenseElement]) -> onnx.ModelProto:
    """The model after the elements acted."""
    return ir.to_proto(program.act(elements).emit())


def _new_operators(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "RMSNormalization" for node in model.graph.node)


STYLES = {
    "llama": LLAMA,
    "llama with one operator": replace(LLAMA, spelled=False),
    "llama, equal gammas": replace(LLAMA, gamma="equal"),
    "llama without gamma": replace(LLAMA, gamma="none"),
    "llama, tied": replace(LLAMA, tied=True),
    "bert": BERT,
    "bert, normalized first": replace(BERT, post=False, gamma="equal"),
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_streams_admit_rotations_and_heads_any_matrix(style: Style) -> None:
    program = program_of(transformer(style))
    stream = stream_of(program)
    assert (stream.dense, stream.size) == ("O", style.width)
    assert stream.linearity.normalized
    heads = Counter(space.dense for space in program.spaces if space is not stream and space.dense)
    assert heads == {"GL": 2 * style.groups * style.layers}  # V to O, and Q to K, per key head
    hidden = [space for space in program.spaces if space.size == style.hidden]
    assert len(hidden) == style.layers and not any(space.dense for space in hidden)
    assert f"O({style.width})" in str(stream) and f"O({style.width})" in str(program)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_random_matrices_change_nothing(style: Style) -> None:
    model = transformer(style)
    program = program_of(model)
    elements = dense_elements(program)
    assert stream_of(program) in elements
    assert change(model, elements, program) < 1e-5


def test_gammas_that_differ_end_it_and_say_so() -> None:
    for spelled in (True, False):
        program = program_of(transformer(replace(LLAMA, gamma="random", spelled=spelled)))
        stream = stream_of(program)
        assert stream.dense == "" and stream.linearity.normalized
        assert "gamma" in stream.linearity.reason and "not equal" in stream.linearity.reason
        assert sum(space.dense == "GL" for space in program.spaces) == 8


def test_the_group_follows_the_entries_of_gamma() -> None:
    """Structure is analysed once, entries are read anew: scaled gammas end O(n)."""
    program = program_of(transformer(LLAMA))
    stream = stream_of(program)
    scale = np.ones((stream.group.scales, stream.size))
    scale[:, 0] = 2.0
    element = Element(np.arange(stream.size), scale, np.ones((stream.group.signs, stream.size), np.int8))
    moved = program.act({stream: element})
    assert moved.analysis is program.analysis
    assert (stream.dense, stream_of(moved).dense) == ("O", "")


def _halves(net: Net, x: str) -> str:
    one, two = net.multi("Split", [x], 2, axis=-1, num_outputs=2)
    return net.op("Concat", one, two, axis=-1)


def _token(net: Net, x: str) -> str:
    token = net.op("Expand", net.const(net.normal((1, 1, WIDTH), 1.0), "token"), net.const([BATCH, 1, WIDTH]))
    longer = net.op("Concat", token, x, axis=1)
    return net.op("Slice", longer, net.const([0]), net.const([LENGTH]), net.const([1]))


def _masked(net: Net, x: str) -> str:
    mask = net.const(np.arange(LENGTH)[:, None] > 0)
    return net.op("Where", mask, x, net.const(0.0))


LINEAR: dict[str, Spoil] = {
    "identity": lambda net, x: net.op("Identity", x),
    "negative": lambda net, x: net.op("Neg", x),
    "scalar": lambda net, x: net.op("Mul", x, net.const(0.5)),
    "divided": lambda net, x: net.op("Div", x, net.const(2.0)),
    "bias": lambda net, x: net.op("Add", x, net.bias(WIDTH)),
    "positions": lambda net, x: net.op("Add", x, net.const(net.normal((LENGTH, WIDTH), 1.0), "positions")),
    "residual product": lambda net, x: net.op("Add", x, net.op("MatMul", x, net.weight((WIDTH, WIDTH), WIDTH))),
    "dropout": lambda net, x: net.op("Dropout", x),
    "cast": lambda net, x: net.op("Cast", net.op("Cast", x, to=TensorProto.DOUBLE), to=net.elem),
    "mean of positions": lambda net, x: net.op("Add", x, net.op("ReduceMean", x, net.const([1]), keepdims=1)),
    "token": _token,
    "masked": _masked,
    "length": lambda net, x: net.op("Mul", x, net.op("ReduceL2", x, net.const([-1]), keepdims=1)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operators_leave_it(name: str) -> None:
    model = transformer(LLAMA, LINEAR[name])
    program = program_of(model)
    assert stream_of(program).dense == "O"
    assert change(model, dense_elements(program), program) < 1e-5


def test_halves_of_a_stream_rotate_apart() -> None:
    model = transformer(LLAMA, _halves)
    program = program_of(model)
    halves = [space for space in program.spaces if space.linearity.normalized]
    assert [(space.dense, space.size) for space in halves] == [("O", WIDTH // 2)] * 2
    assert change(model, dense_elements(program), program) < 1e-5


def _scaled(net: Net, x: str) -> str:
    return net.op("Mul", x, net.positive((WIDTH,)))


def _squares(net: Net, x: str) -> str:
    square = net.op("Pow", x, net.const(2.0))
    return net.op("Add", x, net.op("MatMul", square, net.weight((WIDTH, WIDTH), WIDTH)))


def _both_ways(net: Net, x: str) -> str:
    """One table is added to the stream, and multiplied with it."""
    table = net.const(net.normal((LENGTH, WIDTH), 1.0), "twice")
    product = net.op("MatMul", net.op("Mul", x, table), net.weight((WIDTH, WIDTH), WIDTH))
    return net.op("Add", net.op("Add", x, table), product)


def _norm_of(op: str, power: float | None = None) -> Spoil:
    def spoil(net: Net, x: str) -> str:
        powered = x if power is None else net.op("Pow", x, net.const(power))
        return net.op("Mul", x, net.op(op, powered, net.const([-1]), keepdims=1))

    return spoil


def _through(op: str) -> Spoil:
    return lambda net, x: net.op(op, x)


def _copy_times(net: Net, x: str) -> str:
    product = net.op("Mul", x, net.op("Identity", x))
    return net.op("Add", x, net.op("MatMul", product, net.weight((WIDTH, WIDTH), WIDTH)))


def _read_through(op: str) -> Spoil:
    """A side branch, so that the stream itself keeps its signs."""

    def spoil(net: Net, x: str) -> str:
        return net.op("Add", x, net.op("MatMul", net.op(op, x), net.weight((WIDTH, WIDTH), WIDTH)))

    return spoil


NOT_LINEAR: dict[str, Spoil] = {
    "tanh": _through("Tanh"),
    "relu": _through("Relu"),
    "softmax": _through("Softmax"),
    "tanh aside": _read_through("Tanh"),
    "absolute value aside": _read_through("Abs"),
    "cosine aside": _read_through("Cos"),
    "scaled unit by unit": _scaled,
    "squares in a product": _squares,
    "times its copy": _copy_times,
    "added and multiplied": _both_ways,
    "sum of magnitudes": _norm_of("ReduceL1"),
    "sum of fourth powers": _norm_of("ReduceSum", 4.0),
    "largest": _norm_of("ReduceMax", 2.0),
    "mean of units": _norm_of("ReduceMean"),
    "one for all": lambda net, x: net.op("Add", x, net.const(1.0)),
    "clip": lambda net, x: net.op("Clip", x, net.const(-0.5), net.const(0.5)),
    "rounded": _through("Round"),
    "cumulative": lambda net, x: net.op("CumSum", x, net.const(np.asarray(2))),
}


def forced(program: Program, space: Space, element: DenseElement) -> onnx.ModelProto:
    """What a wrong analysis would do: the matrix acts although the space admits none."""
    analysis = program.analysis
    k = program.index(space)
    found = list(linearities(analysis))
    try:
        analysis.linear = [Linearity("O") if n == k else one for n, one in enumerate(found)]
        clone = program.model.clone()
        Editor(clone, analysis).apply(act_edits(analysis, {k: element}))
    finally:
        analysis.linear = found
    return ir.to_proto(clone)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_ends_it(name: str) -> None:
    """Also the control: had the space been taken for O(n), the outputs would have changed."""
    model = transformer(LLAMA, NOT_LINEAR[name])
    program = program_of(model)
    streams = [space for space in program.spaces if any("table" in member for member in space.members)]
    assert all(space.dense == "" for space in streams)
    assert sum(space.dense == "GL" for space in program.spaces) == 8
    for space in streams:
        assert space.linearity.reason
        element = DenseElement.orthogonal(space.size, np.random.default_rng(0))
        assert largest_change(zoo.run(model, ids()), zoo.run(forced(program, space, element), ids())) > 1e-3


def test_layer_normalizations_end_it() -> None:
    def layer_norm(net: Net, x: str) -> str:
        return net.op("LayerNormalization", x, net.const(np.ones(WIDTH)), axis=-1)

    stream = stream_of(program_of(transformer(LLAMA, layer_norm)))
    assert stream.dense == ""


def test_a_tied_matrix_is_no_invertible_one() -> None:
    """Tied tables are read and written: orthogonal matrices only, even where nothing is normalized."""
    for tied in (False, True):
        net = Net("linear", 20)
        index = net.input("ids", [3], TensorProto.INT64)
        table = net.const(net.normal((7, 5), 1.0), "table")
        head = net.op("Transpose", table if tied else net.const(net.normal((7, 5), 1.0), "head"), perm=[1, 0])
        net.output(net.op("MatMul", net.op("Gather", table, index), head), [3, 7])
        model = net.model()
        program = program_of(model)
        space = stream_of(program)
        assert space.dense == ("O" if tied else "GL")
        assert change(model, dense_elements(program), program, ids=np.arange(3)) < 1e-5


def test_a_parameter_that_is_an_output_is_fixed() -> None:
    def output_bias(net: Net, x: str) -> str:
        bias = net.bias(WIDTH)
        net.output(bias, [WIDTH])
        return net.op("Add", x, bias)

    spaces = program_of(transformer(LLAMA, output_bias)).spaces
    assert not any("table" in name for space in spaces for name in space.members)


@pytest.mark.parametrize("name", ["attention_op_3d", "attention_op_3d_gqa", "attention_rope_table",
                                  "attention_qkv_major", "attention_einsum", "mlp_identity", "pad_channels",
                                  "bert", "vit"])  # fmt: skip
def test_models_of_the_zoo(name: str) -> None:
    model, entry = zoo.build_or_skip(name), zoo.entry(name)
    program, inputs = program_of(model), zoo.feeds(name, model)
    elements = dense_elements(program)
    assert elements
    before = zoo.run(model, inputs, reference=entry.reference)
    after = zoo.run(turned(program, elements), inputs, reference=entry.reference)
    assert largest_change(before, after) < 1e-5


def test_rotary_embeddings_leave_nothing_to_queries() -> None:
    """Only V to O admits matrices; planes of Q and K turn with their angle."""
    program = program_of(zoo.build("attention_rope_table"))
    heads = sum(space.kind == "blocks" for space in program.spaces)
    assert heads and sum(space.dense == "GL" for space in program.spaces) == 3


@pytest.mark.parametrize("name", ["mlp_relu", "mlp_tanh", "batch_norm_relu", "lstm"])
def test_networks_with_nothing_linear(name: str) -> None:
    assert not any(space.dense for space in program_of(zoo.build_or_skip(name)).spaces)
