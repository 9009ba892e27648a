"""Removing units that contribute nothing changes nothing, and every literal that depends on a size follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tests import zoo
from tests.symmetry.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]

# Models in which a statistic runs over some space, so that even a unit of zeros is seen: it is counted.
COUNTED = {
    "softmax_hidden",
    "layer_norm",
    "layer_norm_spelled_out",
    "layer_norm_channels",
    "rms_norm",
    "rms_norm_spelled_out",
    "group_norm",
    "group_norm_reshape",
    "lp_normalization",
    "tied_embedding",
    "gated_mlp",
    "maxout_reshape",
    "spatial_attention",
    "channel_reducemean",
    "channel_reducemax",
    "channel_reducemin",
    "channel_reducelogsumexp",
    *zoo.names("attention"),
}


def counted(program: Program) -> set[Space]:
    """Spaces over which a normalization, a softmax, a mean or a maximum runs."""
    of = program.analysis.classes.of
    hit = {int(c) for labels in program.analysis.walk.rec.normalized for c in of[labels]}
    return {
        s for s, raw in zip(program.spaces, program.analysis.spaces, strict=True) if hit & set(raw.table[:, 0].tolist())
    }


def thinned(program: Program) -> dict[Space, Array]:
    """Every third unit of every uncounted space goes, the same in all blocks of one layer."""
    keep = {}
    for space in set(program.spaces) - counted(program):
        if space.kind == "units" and space.size > 1 and space.group.permutes:
            keep[space] = np.flatnonzero(np.arange(space.size) % 3 != 2) if space.size > 2 else np.array([0])
    return keep


def silenced(program: Program, keep: dict[Space, Any]) -> onnx.ModelProto:
    """The model with zeros in every position of the units that ``restrict`` is about to drop."""
    analysis, proto = program.analysis, ir.to_proto(program.model)
    stays = program.kept_classes(keep)[analysis.classes.of]
    tensors = {t.name: t for t in proto.graph.initializer}
    for f in analysis.walk.leaf_factors:
        leaf = analysis.walk.leaves[f.leaf]
        if not f.active or leaf.name not in tensors or not leaf.dtype.is_floating_point():
            continue
        array = numpy_helper.to_array(tensors[leaf.name]).copy()
        mask = stays[f.base : f.base + f.size]
        if f.groups:
            rows = mask.reshape(f.shape)[np.arange(leaf.shape[0]) * f.groups // leaf.shape[0]]
            array *= rows.reshape(
                rows.shape[:1] + tuple(rows.shape[1] if a == f.axes[1] else 1 for a in range(1, array.ndim))
            )
        else:
            array *= mask.reshape([-1 if a == f.axes[0] else 1 for a in range(array.ndim)]).astype(array.dtype)
        tensors[leaf.name].CopyFrom(numpy_helper.from_array(array, leaf.name))
    return proto


def restricted(program: Program, keep: dict[Space, Any]) -> onnx.ModelProto:
    proto = ir.to_proto(program.restrict(keep).emit())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check(
    name: str, program: Program, keep: dict[Space, Any], run: Callable[[onnx.ModelProto, int], Any]
) -> onnx.ModelProto:
    """The model without dead units is valid, is smaller, and computes the same, at several batch sizes."""
    dead = silenced(program, keep)
    small = restricted(program_of(dead), {program_of(dead).space(s.name): k for s, k in keep.items()})
    assert sum(np.prod(t.dims) for t in small.graph.initializer) < sum(np.prod(t.dims) for t in dead.graph.initializer)
    for batch in (2, 3):
        assert largest_change(run(dead, batch), run(small, batch)) <= 1e-5, name
    return small


@pytest.mark.parametrize("name", zoo.names("synthetic", without=("float16", "quantized")))
def test_dead_units_leave_no_trace(name: str) -> None:
    model, entry = zoo.build(name), zoo.entry(name)
    program = program_of(model)
    keep = thinned(program)
    assert bool(counted(program)) == (name in COUNTED)
    if not keep:
        pytest.skip("no space of two units that is not counted")

    def run(proto: onnx.ModelProto, batch: int) -> Any:
        return zoo.run(proto, zoo.feeds(name, model, dims={"N": batch}), reference=entry.reference)

    check(name, program, keep, run)


# ---------------------------------------------------------------- literals, kind by kind
Write = Callable[[Net], None]
CASES: dict[str, tuple[Write, dict[str, Any]]] = {}


def case(**expected: Any) -> Callable[[Write], Write]:
    """A model with one kind of literal; ``expected``: op type -> attributes or constant inputs afterwards."""

    def add(write: Write) -> Write:
        CASES[write.__name__] = (write, expected)
        return write

    return add


def conv_head(net: Net, channels: int = 6) -> str:
    return net.relu(net.conv(net.image(size=4), 3, channels))


def dense_head(net: Net, width: int = 6) -> str:
    return net.relu(net.gemm(net.input("x", ["N", 5]), 5, width))


def finish(net: Net, h: str, width: int) -> None:
    net.output(net.gemm(h, width, 3), ["N", 3])


@case(Reshape={1: [0, 64]})
def reshape_constant(net: Net) -> None:
    finish(net, net.op("Reshape", conv_head(net), net.const([0, 96])), 96)


@case(Reshape={1: [-1, 64]})
def reshape_free_batch(net: Net) -> None:
    finish(net, net.op("Reshape", conv_head(net), net.const([-1, 96])), 96)


@case(Reshape={1: [0, -1]})
def reshape_inferred(net: Net) -> None:
    finish(net, net.op("Reshape", conv_head(net), net.const([0, -1])), 96)


@case()
def reshape_computed(net: Net) -> None:
    h = conv_head(net)
    n = net.op("Gather", net.op("Shape", h), net.const([0]), axis=0)
    finish(net, net.op("Reshape", h, net.op("Concat", n, net.const([96]), axis=0)), 96)


@case()
def reshape_computed_from_channels(net: Net) -> None:
    h = conv_head(net)
    size = net.op("Shape", h)
    n, c = (net.op("Gather", size, net.const([k]), axis=0) for k in range(2))
    finish(net, net.op("Reshape", h, net.op("Concat", n, net.op("Mul", c, net.const([16])), axis=0)), 96)


@case()
def reshape_target_shared_by_layers(net: Net) -> None:
    """(0, 2, 3) cuts the hidden layer into rows, and the output, which is fixed: the literal is forked."""
    target = net.const([0, 2, 3])
    h = net.op("Reshape", net.relu(net.op("Reshape", dense_head(net), target)), net.const([0, 6]))
    net.output(net.op("Reshape", net.gemm(h, 6, 6), target), ["N", 2, 3])


@case(Split={1: [3, 6]})
def split_input(net: Net) -> None:
    left, right = net.multi("Split", [dense_head(net, 12), net.const([4, 8])], 2, axis=1)
    net.output(net.op("Add", net.gemm(left, 4, 3), net.gemm(right, 8, 3)), ["N", 3])


@case()
def split_equal(net: Net) -> None:
    left, right = net.multi("Split", [dense_head(net, 12)], 2, axis=-1, num_outputs=2)
    net.output(net.op("Add", net.gemm(left, 6, 3), net.gemm(right, 6, 3)), ["N", 3])


@case(Split={"split": [3, 6]})
def split_attribute(net: Net) -> None:
    net.domains[""] = 11
    left, right = net.multi("Split", [dense_head(net, 12)], 2, axis=1, split=[4, 8])
    net.output(net.op("Add", net.gemm(left, 4, 3), net.gemm(right, 8, 3)), ["N", 3])


@case(Expand={1: [1, 4, 4, 4]})
def expand_target(net: Net) -> None:
    code = net.op("Unsqueeze", dense_head(net), net.const([2, 3]))
    net.classify(net.op("Expand", code, net.const([1, 6, 4, 4])), 6)


@case(Slice={1: [0], 2: [2]})
def slice_inputs(net: Net) -> None:
    h = dense_head(net)
    parts = [net.op("Slice", h, *(net.const([v]) for v in (lo, hi, 1))) for lo, hi in ((0, 3), (3, 6))]
    finish(net, net.op("Concat", *reversed(parts), axis=1), 6)


@case()
def slice_negative_bounds(net: Net) -> None:
    h = dense_head(net)
    parts = [net.op("Slice", h, *(net.const([v]) for v in (lo, hi, -1))) for lo, hi in ((-6, -2), (-2, 2**40))]
    finish(net, net.op("Concat", *parts, axis=1), 6)


@case()
def slice_strided(net: Net) -> None:
    h = dense_head(net)
    parts = [net.op("Slice", h, *(net.const([v]) for v in (lo, 6, 1, 2))) for lo in (0, 1)]
    finish(net, net.op("Tanh", net.op("Concat", *parts, axis=1)), 6)


@case()
def slice_backwards(net: Net) -> None:
    finish(net, net.op("Slice", dense_head(net), *(net.const([v]) for v in (-1, -(2**40), 1, -1))), 6)


@case(Slice={"starts": [0], "ends": [2]})
def slice_attributes(net: Net) -> None:
    net.domains[""] = 9
    h = dense_head(net)
    parts = [net.op("Slice", h, starts=[lo], ends=[hi], axes=[1]) for lo, hi in ((0, 3), (3, 1000))]
    finish(net, net.op("Concat", *reversed(parts), axis=1), 6)


@case(Gather={1: [3, 1, 0, 2]})
def gather_indices(net: Net) -> None:
    finish(net, net.op("Gather", dense_head(net), net.const([4, 1, 5, 0, 3, 2]), axis=1), 6)


@case()
def pad_channels_and_space(net: Net) -> None:
    h = net.op("Pad", conv_head(net), net.const([0, 0, 1, 1, 0, 0, 1, 1]), net.const(0.0))
    net.classify(net.relu(net.op("Conv", h, net.weight((5, 6, 3, 3), 54), kernel_shape=[3, 3])), 5)


@case()
def resize_sizes(net: Net) -> None:
    h = net.op("Resize", conv_head(net), "", "", net.const([2, 6, 8, 8]), mode="nearest")
    net.output(net.op("ReduceSum", net.relu(net.conv(h, 6, 3)), net.const([2, 3])), ["N", 3, 1, 1])


@case()
def weights_of_equal_entries(net: Net) -> None:
    value = onnx.helper.make_tensor("value", net.elem, [1], [0.2])
    w = net.op("ConstantOfShape", net.const([5, 6]), value=value)
    h = net.relu(net.op("Add", net.op("MatMul", net.input("x", ["N", 5]), w), net.bias(6)))
    finish(net, h, 6)


@case(Conv={"group": 6})
def depthwise_group(net: Net) -> None:
    h = net.conv(conv_head(net, 9), 9, 9, group=9)
    net.classify(net.relu(h), 9)


@case()
def size_used_as_a_number(net: Net) -> None:
    """h / sqrt(width): the width that the scale was trained with, whatever remains."""
    h = dense_head(net)
    width = net.op("Cast", net.op("Gather", net.op("Shape", h), net.const(1), axis=0), to=onnx.TensorProto.FLOAT)
    finish(net, net.op("Div", h, net.op("Sqrt", width)), 6)


def literal_of(model: onnx.ModelProto, node: onnx.NodeProto, key: int | str) -> list[int] | int | None:
    if isinstance(key, str):
        value = next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == key)
        return value if isinstance(value, int) else list(value)
    return next((numpy_helper.to_array(t).tolist() for t in model.graph.initializer if t.name == node.input[key]), None)


@pytest.mark.parametrize("name", CASES)
def test_literals_follow(name: str) -> None:
    write, expected = CASES[name]
    net = Net(name)
    write(net)
    model = net.model()
    program = program_of(model)

    def run(proto: onnx.ModelProto, batch: int) -> Any:
        (value,) = proto.graph.input
        shape = [d.dim_value or (2 if name == "resize_sizes" else batch) for d in value.type.tensor_type.shape.dim]
        return zoo.run(proto, {value.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)})

    keep = thinned(program)
    assert keep
    small = check(name, program, keep, run)
    for op, wanted in expected.items():
        nodes = [n for n in small.graph.node if n.op_type == op]
        for key, value in wanted.items():
            assert value in [literal_of(small, n, key) for n in nodes], f"{key} of {op}"


# ---------------------------------------------------------------- heads, groups, and what is refused
@pytest.mark.parametrize(
    "name",
    [
        "attention_separate",
        "attention_qkv_major",
        "attention_head_major",
        "attention_flat_split",
        "attention_op_3d",
        "attention_op_4d",
        "attention_gqa",
        "attention_op_3d_gqa",
        "grouped_conv",
        "channel_shuffle",
    ],
)
def test_whole_blocks_go(name: str) -> None:
    """Head pruning: a block of zeros, dropped with all that it holds."""
    model = zoo.build(name)
    program = program_of(model)
    space = next(s for s in program.spaces if s.kind == "blocks" and s.size > 1 and s.parent is None)

    def run(proto: onnx.ModelProto, batch: int) -> Any:
        return zoo.run(proto, zoo.feeds(name, model, dims={"N": batch}), reference=zoo.entry(name).reference)

    small = check(name, program, {space: np.arange(space.size - 1)}, run)
    heads = [a.i for n in small.graph.node for a in n.attribute if a.name in ("q_num_heads", "kv_num_heads")]
    assert all(h >= 1 for h in heads)


def test_uneven_heads_are_refused() -> None:
    program = program_of(zoo.build("attention_separate"))
    inner = next(s for s in program.spaces if s.parent is not None)
    with pytest.raises(SymmetryError, match=r"ragged.*equally many.*every block"):
        program.restrict({inner: np.arange(inner.size - 1)})
    program = program_of(zoo.build("grouped_conv"))
    inner = next(s for s in program.spaces if s.parent is not None)
    with pytest.raises(SymmetryError, match="equally many"):
        program.restrict({inner: np.arange(inner.size - 1)})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "keep at least one unit"),
        ([1, 0], "sorted"),
        ([0, 0], "sorted"),
        ([0, 99], "within 0..7"),
        ([-1], "within"),
        ([[0]], "sorted"),
    ],
)
def test_bad_keeps_are_refused(keep: Any, message: str) -> None:
    program = program_of(zoo.build("mlp_relu"))
    with pytest.raises(SymmetryError, match=message):
        program.restrict({program.spaces[0]: keep})


def test_a_living_unit_is_missed() -> None:
    """Negative control: without silencing the units first, the output changes."""
    model = zoo.build("conv_flatten_gemm")
    program = program_of(model)
    small = restricted(program, thinned(program))
    inputs = zoo.feeds("conv_flatten_gemm", model)
    assert largest_change(zoo.run(model, inputs), zoo.run(small, inputs)) > 1e-2
