"""Units that are dead by construction go, what the model computes stays, and what only looks dead stays too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tests import zoo
from tests.models.edited_model import Edited
from tests.zoo.net import Net

from cipm_ir.errors import OptionError
from cipm_ir.passes import Context, Kind, PassResult, parse_passes, run_passes
from cipm_ir.passes.exact.dead.contributions import find_sums
from cipm_ir.passes.exact.dead.liveness import Liveness
from cipm_ir.passes.exact.dead.remove_dead import RemoveDead
from cipm_ir.runtime.intervals.bounds import find_intervals
from cipm_ir.symmetry.program import Program

TOLERANCE = 1e-6


def removed(edited: Edited, one: RemoveDead | None = None, **context: Any) -> PassResult:
    """Run the pass; outputs must be as before."""
    result = (one or RemoveDead()).run(edited.program(), Context(**context))
    assert edited.change_of_outputs(result) <= TOLERANCE
    return result


def lost(result: PassResult) -> int:
    """How many units and blocks went."""
    return sum(a - b for a, b in result.metrics["widths"].values())


# ---------------------------------------------------------------- dead by construction
def conv_flatten() -> Edited:
    model = Edited("conv_flatten_gemm")
    return model.no_producer(model.nodes("Conv")[0], [1, 4]).no_producer(model.nodes("Gemm")[0], [0])


def mlp_readers() -> Edited:
    """The bias keeps the next layer open, whatever signs are left."""
    model = Edited("mlp_relu")
    model.silence(model.nodes("Add")[0].input[1], slice(None), value=1.0)
    return model.silence(model.nodes("MatMul")[0].input[1], [2, 5, 6])


def residual_inner() -> Edited:
    model = Edited("residual_blocks")
    first, second = model.nodes("BatchNormalization")
    model.silence(first.input[1], [3]).silence(first.input[2], [3], value=-0.5)
    return model.silence(second.input[1], [0, 6]).silence(second.input[2], [0, 6], value=0.0)


def residual_stream() -> Edited:
    """All writers of one channel of the stream."""
    model = Edited("residual_blocks")
    convs = model.nodes("Conv")
    for k in (0, 2, 4):
        model.no_producer(convs[k], [5])
    return model


def concat_parts() -> Edited:
    model = Edited("unet_concat_skip")
    return model.no_producer(model.nodes("Conv")[0], [2]).no_producer(model.nodes("Conv")[1], [7])


def grouped_rows() -> Edited:
    """One input channel of each group, at different places; two outputs of each group."""
    model = Edited("grouped_conv")
    first, second = model.nodes("Conv")
    return model.no_producer(first, [0, 3, 4]).no_producer(second, [0, 1, 5, 6, 8, 11])


def depthwise_chain() -> Edited:
    """The readers of the depthwise result."""
    model = Edited("depthwise")
    return model.silence(model.nodes("Conv")[2].input[1], [0, 3], axis=1)


def whole_head() -> Edited:
    """The rows of the output projection that read head 1: its queries, keys and values go too."""
    model = Edited("attention_separate")
    return model.silence(model.nodes("MatMul")[6].input[1], slice(4, 8))


def in_each_head() -> Edited:
    """One value unit in each head, and one product of query and key."""
    model = Edited("attention_separate")
    model.silence(model.nodes("MatMul")[6].input[1], [1, 6, 8])
    query, bias = model.nodes("MatMul")[1].input[1], model.nodes("Add")[1].input[1]
    return model.silence(query, [3, 4, 9], axis=1).silence(bias, [3, 4, 9])


def chain() -> Edited:
    """Units that only feed a dead unit."""
    model = Edited("mlp_relu")
    reader = model.nodes("MatMul")[0].input[1]
    model.silence(model.nodes("Gemm")[1].input[1], [4], axis=1)
    return model.change(reader, lambda a: a[1].__setitem__([0, 1, 2, 3, 5], 0))


def bounded_relu() -> Edited:
    """Shut for whatever comes out of a sigmoid."""
    net = Net("bounded_relu")
    h = net.op("Sigmoid", net.gemm(net.input("x", ["N", 5]), 5, 8))
    gemm = net.gemm(h, 8, 6)
    net.output(net.gemm(net.relu(gemm), 6, 3), ["N", 3])
    model = Edited(net)
    return model.silence(model.nodes("Gemm")[1].input[2], [1, 2], value=-100.0)


CASES = [
    (conv_flatten, 3, 0),
    (mlp_readers, 3, 0),
    (residual_inner, 3, 0),
    (residual_stream, 1, 0),
    (concat_parts, 2, 0),
    (grouped_rows, 9, 0),
    (depthwise_chain, 2, 0),
    (whole_head, 1, 1),
    (in_each_head, 6, 0),
    (chain, 2, 0),
    (bounded_relu, 2, 0),
]


@pytest.mark.parametrize(("make", "number", "blocks"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_dead_units_go_and_outputs_stay(make: Callable[[], Edited], number: int, blocks: int) -> None:
    result = removed(make())
    assert (lost(result), result.metrics["blocks"]) == (number, blocks)
    assert result.changed
    assert result.kind is None
    assert "removed" in result.summary


@pytest.mark.parametrize(
    "name",
    [
        "mlp_relu",
        "conv_flatten_gemm",
        "residual_blocks",
        "grouped_conv",
        "attention_separate",
        "depthwise",
        "layer_norm",
    ],
)
def test_nothing_is_dead_in_models_as_they_are(name: str) -> None:
    program = Edited(name).program()
    result = RemoveDead().run(program, Context())
    assert not result.changed
    assert result.program is program


LAYOUTS = [
    "roll_channels", "roll_add", "split_two_roles", "split_sizes", "gather_permutation", "gather_repeated",
    "concat_self", "tile_hidden", "reshape_computed_channels", "flatten_channels_last", "unsqueeze_expand",
    "pixel_shuffle_dcr", "pixel_shuffle_crd", "space_to_depth", "zero_pad_shortcut", "squeeze_excitation",
    "broadcast_mask_input", "mlp_weight_norm", "einsum_layers", "siamese", "gated_by_input", "channel_reducesum",
    "attention_qkv_major", "attention_op_3d", "attention_op_4d", "conv_pool", "batch_norm_relu", "tied_embedding",
]  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_random_zeros_never_change_a_model(name: str, seed: int) -> None:
    """Rows, columns and biases of zeros anywhere, and biases that shut: whatever goes, outputs stay."""
    model, rng = Edited(name), np.random.default_rng(seed)
    for tensor in model.tensors.values():
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind != "f" or array.size < 2 or tensor.name.split("_")[0] in ("var", "c", "s"):
            continue
        for axis in range(array.ndim):
            some = np.flatnonzero(rng.random(array.shape[axis]) < 0.4)
            if array.shape[axis] > 1 and rng.random() < 0.6:
                model.silence(tensor.name, some, axis, 0.0 if array.ndim > 1 else float(rng.choice([0, 0, -1e3, 0.5])))
    result = RemoveDead().run(model.program(), Context())
    assert model.change_of_outputs(result) <= 1e-5


# ---------------------------------------------------------------- what must stay
def test_a_tiny_weight_keeps_its_unit() -> None:
    model = conv_flatten()
    model.change(model.nodes("Conv")[0].input[1], lambda a: a.__setitem__((4, 0, 1, 1), 1e-30))
    result = removed(model)
    assert lost(result) == 2


def test_normalized_units_stay() -> None:
    """Negative control of the same zeros without the normalization: there they go."""
    found = {}
    for op in ("LayerNormalization", "Identity"):
        net = Net("normalized")
        h = net.gemm(net.input("x", ["N", 5]), 5, 8)
        h = net.op(op, h, net.positive((8,))) if op != "Identity" else net.op(op, h)
        net.output(net.gemm(h, 8, 3), ["N", 3])
        model = Edited(net)
        model.no_producer(model.nodes("Gemm")[0], [2, 3]).silence(model.nodes("Gemm")[1].input[1], [2, 3], axis=1)
        found[op] = lost(removed(model))
    assert found == {"LayerNormalization": 0, "Identity": 2}


def test_one_writer_of_a_stream_is_not_enough() -> None:
    model = Edited("residual_blocks")
    model.no_producer(model.nodes("Conv")[2], [5])
    assert lost(removed(model)) == 0


def test_sibling_heads_lose_equally_many() -> None:
    """Two value units of head 0, one of head 1, none of head 2: all stay. With one of head 2, one of each goes."""
    model = Edited("attention_separate")
    projection = model.nodes("MatMul")[6].input[1]
    assert lost(removed(model.silence(projection, [0, 1, 5]))) == 0
    assert lost(removed(model.silence(projection, [11]))) == 3


def test_groups_lose_equally_many() -> None:
    model = Edited("grouped_conv")
    first = model.nodes("Conv")[0]
    assert lost(removed(model.no_producer(first, [0, 1, 3]))) == 0
    assert lost(removed(model.no_producer(first, [4]))) == 3


def test_control_a_live_unit_changes_the_outputs() -> None:
    """Negative control of `change_of_outputs`."""
    model = Edited("mlp_relu")
    program = model.program()
    dropped = program.restrict({program.spaces[0]: np.arange(1, program.spaces[0].size)})
    assert model.change_of_outputs(PassResult(dropped)) > 1e-3


def test_a_space_keeps_one_unit() -> None:
    model = Edited("mlp_relu")
    result = removed(model.silence(model.nodes("MatMul")[0].input[1], slice(None)))
    assert result.metrics["widths"] == {"w_1": [8, 1], "w_5": [6, 1]}  # the second layer is constant then


def test_units_that_stay_do_not_lean_on_units_that_go() -> None:
    """Unit 1 is shut only by unit 0, which nothing else reads. Were unit 1 to stay alone, it would open."""
    net = Net("leaning")
    x = net.op("Sigmoid", net.gemm(net.input("x", ["N", 4]), 4, 3))
    middle = net.relu(net.gemm(x, 3, 4))
    net.output(net.gemm(middle, 4, 2), ["N", 2])
    model = Edited(net)
    first, second, _ = model.nodes("Gemm")
    model.silence(first.input[1], [0]).silence(first.input[2], [0], value=9.0)  # sigmoid(9), nearly one, always
    model.change(second.input[1], lambda a: a[0].__setitem__(slice(None), [-50, 1, 1]))
    model.silence(second.input[2], [0])
    model.change(second.input[1], lambda a: a[1:, 0].__setitem__(slice(None), 0))
    program = model.program()
    found = find_intervals(program.model, program.analysis)
    sums = find_sums(found)
    liveness = Liveness(program.analysis)
    liveness.read(found, sums)
    classes = [program.analysis.spaces[k].table[:, 0] for k in range(2)]
    forced = np.zeros(program.analysis.classes.count, bool)
    alive = liveness.alive(sums, forced)
    assert (alive[classes[0]].tolist(), alive[classes[1]].tolist()) == ([False, True, True], [False, True, True, True])
    forced[classes[1][0]] = True
    assert liveness.alive(sums, forced)[classes[0]].all()
    assert lost(removed(model)) == 2


# ---------------------------------------------------------------- constants
def constant(kernel: int, pads: int, beta: float) -> Edited:
    """Units 1 and 4 behind a batch normalization with gamma zero, before a convolution."""
    net = Net("constant")
    h = net.relu(net.batch_norm(net.conv(net.image(), 3, 6), 6))
    weight = net.weight((5, 6, kernel, kernel), 6)
    h = net.relu(net.op("Conv", h, weight, kernel_shape=[kernel] * 2, pads=[pads] * 4))
    net.classify(h, 5)
    model = Edited(net)
    norm = model.nodes("BatchNormalization")[0]
    return model.silence(norm.input[1], [1, 4]).silence(norm.input[2], [1, 4], value=beta)


def test_constant_units_go_into_biases() -> None:
    result = removed(constant(kernel=3, pads=0, beta=0.7))
    assert (result.metrics["constant"], result.metrics["dead"]) == (2, 0)
    (shift,) = result.witness["shift"].values()
    np.testing.assert_allclose(shift, [0, 0.7, 0, 0, 0.7, 0], rtol=1e-6)


def test_constant_units_stay_before_zero_padding() -> None:
    result = removed(constant(kernel=3, pads=1, beta=0.7))
    assert not result.changed
    assert any("border" in text for text in result.metrics["refused"].values())


def test_shut_units_go_before_zero_padding_too() -> None:
    assert lost(removed(constant(kernel=3, pads=1, beta=-0.7))) == 2


def test_constants_can_be_left_alone() -> None:
    assert not removed(constant(kernel=3, pads=0, beta=0.7), RemoveDead(constants=False)).changed


def test_constants_of_dense_layers() -> None:
    model = Edited("mlp_sigmoid")
    model.silence(model.nodes("Gemm")[0].input[1], [0, 3])
    result = removed(model)
    assert result.metrics["constant"] == 2


# ---------------------------------------------------------------- data
def test_units_that_never_fire_on_data_go_on_request() -> None:
    """A bias of -6 shuts the unit on data near zero, but not for all inputs."""
    model = Edited("mlp_relu")
    for bias, value in ((model.nodes("Gemm")[0].input[2], 3.0), (model.nodes("Add")[0].input[1], 99.0)):
        model.silence(bias, slice(None), value=value)
    model.silence(model.nodes("Gemm")[0].input[2], [2, 7], value=-6.0)
    x = np.random.default_rng(0).uniform(-0.1, 0.1, (50, 5)).astype(np.float32)
    program = model.program()
    assert not RemoveDead().run(program, Context(data={"x": x})).changed
    result = RemoveDead(never_firing=True).run(program, Context(data={"x": x}))
    assert (result.metrics["never_firing"], result.metrics["dead"], result.kind) == (2, 0, Kind.APPROXIMATE)
    before, after = (zoo.run(ir.to_proto(p.emit()), {"x": x})[0] for p in (program, result.program))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    firing = np.random.default_rng(0).uniform(-30, 30, (50, 5)).astype(np.float32)
    assert not RemoveDead(never_firing=True).run(program, Context(data={"x": firing})).changed


def test_a_head_that_never_fires_makes_the_result_approximate() -> None:
    """Rows of a grid, which go as wholes: one is silent on the data."""
    net = Net("silent_head")
    x = net.input("x", ["N", 4, 6])
    gate = net.gemm(net.op("Flatten", x), 24, 12)
    h = net.op("Reshape", net.relu(gate), net.const([0, 3, 4]))
    h = net.op("Reshape", net.op("MatMul", h, net.weight((4, 5), 4)), net.const([0, 15]))
    net.output(net.gemm(h, 15, 2), ["N", 2])
    model = Edited(net)
    bias = model.nodes("Gemm")[0].input[2]
    model.silence(bias, slice(None), value=9.0).silence(bias, slice(4, 8), value=-9.0)
    data = {"x": np.random.default_rng(0).uniform(-0.1, 0.1, (20, 4, 6)).astype(np.float32)}
    program = model.program()
    assert not RemoveDead().run(program, Context(data=data)).changed
    result = RemoveDead(never_firing=True).run(program, Context(data=data))
    assert (lost(result), result.kind) == (1, Kind.APPROXIMATE)
    before, after = (zoo.run(ir.to_proto(p.emit()), data)[0] for p in (program, result.program))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_never_firing_needs_data() -> None:
    with pytest.raises(OptionError, match="never_firing"):
        RemoveDead(never_firing=True).run(Edited("mlp_relu").program(), Context())


def test_never_firing_stays_exact_where_bounds_suffice() -> None:
    model = conv_flatten()
    data = {"x": np.random.default_rng(0).standard_normal((16, 3, 4, 4)).astype(np.float32) * 10}
    assert removed(model, RemoveDead(never_firing=True), data=data).kind is None


# ---------------------------------------------------------------- the pass as a pass
def test_witness_repeats_the_removal() -> None:
    model = whole_head()
    program = model.program()
    result = RemoveDead().run(program, Context())
    again = program.restrict({program.space(name): index for name, index in result.witness["kept"].items()})
    assert str(again) == str(result.program)


def test_in_a_pipeline() -> None:
    model = residual_inner()
    outcome = run_passes(model.program(), parse_passes("fold-batch-norm, remove-dead{constants=false}"))
    last = outcome.report.steps[-1]
    assert last.changed
    assert last.kind == "exact"
    assert last.after.parameters < last.before.parameters


@pytest.mark.parametrize(("name", "expected"), [("resnet20", 13)])
def test_trained_network(name: str, expected: int) -> None:
    """ResNet-20: of 336 inner channels, 13 never fire on training images; weights alone prove none of them dead."""
    model = zoo.build_or_skip(name)
    program = Program.of(ir.from_proto(model))
    assert sum(s.size for s in program.spaces if "layer" in s.name and s.name.endswith("conv1")) == 336
    start = time.perf_counter()
    assert not RemoveDead().run(program, Context()).changed
    assert time.perf_counter() - start < 1.0
    with np.load(zoo.exported.data_file("cifar10/calib.npz")) as archive:
        images = archive["images"][:256].astype(np.float32) / 255
    images = (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    data = {model.graph.input[0].name: images.transpose(0, 3, 1, 2).astype(np.float32)}
    result = RemoveDead(never_firing=True).run(program, Context(data=data))
    assert (result.metrics["never_firing"], result.kind) == (expected, Kind.APPROXIMATE)
    before, after = (zoo.run(ir.to_proto(p.emit()), data)[0] for p in (program, result.program))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
