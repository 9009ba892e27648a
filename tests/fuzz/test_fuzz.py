"""Random graphs: what the analysis claims of each is checked by running it in float64.

Every check either returns a sentence that says what is wrong, or "" where all is well; errors of the package
(`CipmError`) are refusals and fine, any other exception is a defect and comes through.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.fuzz.fuzz_graphs import random_feeds, random_model
from tests.models.dead_units import killed, random_keep, restricted
from tests.oracles.widening import NoKernelError, run_widened
from tests.symmetry.test_soundness import largest_change, program_of, random_elements
from tests.zoo.net import Net

from cipm_ir.errors import CipmError, SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.ops.events import Recorder
from cipm_ir.passes.exact.canonicalize.fingerprint import fingerprint_program
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.framework.registry import lookup
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.symmetry.program import Program

Outputs = list[NDArray[Any]]
Feeds = dict[str, NDArray[Any]]
TOLERANCE = 1e-9

# A unit whose weights are all zero is nothing to a sum over it, unless one of these makes it something again.
LIFTING = {
    "Sigmoid", "Softplus", "Exp", "Cos", "HardSigmoid", "Softmax", "LogSoftmax", "Log", "Reciprocal", "Where", "Div",
    "Less", "Greater", "Clip", "Pad", "Max", "Min", "Add", "Pow", "ReduceProd", "ReduceLogSumExp",
}  # fmt: skip
SUMMING = {"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMean", "Einsum", "GlobalAveragePool"}


def outputs_of(program: Program, feeds: Feeds) -> Outputs:
    return run_widened(ir.to_proto(program.emit()), feeds)


def finite(outputs: Outputs) -> bool:
    return all(np.isfinite(o).all() for o in outputs)


def differs(what: str, before: Outputs, program: Program, feeds: Feeds, tolerance: float = TOLERANCE) -> str:
    change = largest_change(before, outputs_of(program, feeds))
    return f"{what} changes an output by {change:.1e}" if change > tolerance else ""


def check_act(model: onnx.ModelProto, feeds: Feeds, seed: int) -> str:
    """A random element on all spaces at once changes nothing."""
    program, before = program_of(model), run_widened(model, feeds)
    return differs("act", before, program.act(random_elements(program, seed)), feeds)


def check_canonical(model: onnx.ModelProto, feeds: Feeds, seed: int) -> str:
    """The canonical form computes the same, and the fingerprint is one for the whole orbit."""
    program, before = program_of(model), run_widened(model, feeds)
    rng = np.random.default_rng(seed)
    moved = program.act({s: s.random(rng, power_of_two=True) for s in program.spaces})
    made = lookup("canonicalize")().run(program, Context()).program
    wrong = differs("canonicalize", before, made, feeds)
    if not wrong and fingerprint_program(moved) != fingerprint_program(program):
        return "the fingerprint depends on the gauge"
    return wrong


def check_restrict(model: onnx.ModelProto, feeds: Feeds, seed: int) -> str:
    """Without its zeroed units the model is valid, runs, and computes what it computed with them."""
    program, rng = program_of(model), np.random.default_rng(seed)
    keep = random_keep(program, rng, blocks=seed % 2 == 0)
    spaces = list(keep)
    if len(spaces) > 1 and seed % 3 == 0:
        keep = {s: keep[s] for s in spaces[:: max(1, len(spaces) // 2)]}
    if not keep:
        return ""
    dead = killed(program, keep)
    try:
        small = restricted(dead, keep)
    except SymmetryError:
        return ""
    wrong = invalid(small)
    if wrong:
        return f"restrict {wrong}"
    before, after = outputs_of(dead, feeds), outputs_of(small, feeds)
    if [o.shape for o in before] != [o.shape for o in after]:
        return "restrict changes the shape of an output"
    ops = {node.op_type for node in model.graph.node}
    products = sum(n.op_type in ("MatMul", "Gemm") and not set(n.input) & parameters(model) for n in model.graph.node)
    if not finite(before) or ((ops & LIFTING or lifting_bias(model)) and (ops & SUMMING or products)):
        return ""
    change = largest_change(before, after)
    return f"restrict changes an output by {change:.1e}" if change > 1e-7 else ""


def check_prune(model: onnx.ModelProto, feeds: Feeds, seed: int) -> str:
    """Whatever is pruned, what is left is valid and runs."""
    program = program_of(model)
    try:
        small = Prune(ratio=(0.3, 0.6)[seed % 2]).run(program, Context()).program
    except CipmError:
        return ""
    wrong = invalid(small)
    if wrong:
        return f"prune {wrong}"
    shapes = [[o.shape for o in outputs_of(p, feeds)] for p in (program, small)]
    return "" if shapes[0] == shapes[1] else "prune changes the shape of an output"


def check_dead(model: onnx.ModelProto, feeds: Feeds, seed: int) -> str:
    """Removing what is found dead, after some units are zeroed, changes nothing."""
    program = program_of(model)
    keep = random_keep(program, np.random.default_rng(seed + 1))
    dead = killed(program, keep)
    before = outputs_of(dead, feeds)
    if not finite(before):
        return ""
    try:
        small = lookup("remove-dead")().run(dead, Context()).program
    except CipmError:
        return ""
    return invalid(small) or differs("remove-dead", before, small, feeds, 1e-7)


def lifting_bias(model: onnx.ModelProto) -> bool:
    """Whether a Gemm adds one number to every unit."""
    single = {t.name for t in model.graph.initializer if math.prod(t.dims) == 1}
    return any(n.op_type == "Gemm" and single & set(n.input[2:]) for n in model.graph.node)


def parameters(model: onnx.ModelProto) -> set[str]:
    """Names of the parameters, and of what is computed from them alone."""
    known = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if set(node.input) <= known:
            known |= set(node.output)
    return known


def invalid(program: Program) -> str:
    """Why the emitted model is not one, or ""."""
    model = ir.to_proto(program.emit())
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"gives an invalid model: {str(error)[:200]}"
    return ""


CHECKS = {
    "act": check_act,
    "canonical": check_canonical,
    "restrict": check_restrict,
    "prune": check_prune,
    "dead": check_dead,
}


def failures(model: onnx.ModelProto, seed: int) -> dict[str, str]:
    """Check by check, what is wrong; nothing where the model gives infinities or no kernel runs it."""
    feeds = random_feeds(model, seed)
    try:
        if not finite(run_widened(model, feeds)):
            return {}
    except NoKernelError:
        return {}
    return {name: wrong for name, check in CHECKS.items() if (wrong := check(model, feeds, seed))}


# Seeds that found a defect once, and forty more.
SEEDS = (
    18,
    25,
    62,
    81,
    102,
    103,
    145,
    228,
    229,
    286,
    423,
    465,
    523,
    786,
    809,
    1002,
    1765,
    2340,
    2534,
    5932,
    10969,
    13578,
)
SPREAD = tuple(range(30000, 30038))


@pytest.mark.parametrize("seed", [*SEEDS, *SPREAD])
def test_random_graph(seed: int) -> None:
    found = failures(random_model(seed), seed)
    assert not found, found


def test_fuzzer_finds_what_a_missing_event_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without a third of the unifications, many graphs fail."""
    rng, unify = np.random.default_rng(0), Recorder.unify

    def forgetful(self: Recorder, a: Labels, b: Labels) -> None:
        if rng.random() > 1 / 3:
            unify(self, a, b)

    monkeypatch.setattr(Recorder, "unify", forgetful)
    caught = 0
    for seed in range(30000, 30020):
        model = random_model(seed)
        try:
            caught += bool(check_act(model, random_feeds(model, seed), seed))
        except (CipmError, NoKernelError, ValueError, IndexError):
            caught += 1
    assert caught >= 5


# ---------------------------------------------------------------- the smallest graphs of the defects found
def check_all(net: Net) -> None:
    model = net.model()
    onnx.checker.check_model(model, full_check=True)
    for seed in range(4):
        assert not failures(model, seed)


def test_a_single_unit_taken_out_keeps_its_scale() -> None:
    """Gather of one index, Split and Slice of width 1, lost the factor and with it all that held its scale."""
    for case in range(3):
        net = Net(f"single_{case}", dtype="float64")
        h = net.linear(net.input("x", [2, 5]), 5, 6)
        if case == 0:
            net.output(net.op("Gather", h, net.const(4), axis=1), [2])
        elif case == 1:
            net.output(net.multi("Split", [h, net.const([5, 1])], 2, axis=1)[1], [2, 1])
        else:
            net.output(net.op("Slice", h, net.const([0]), net.const([1]), net.const([1])), [2, 1])
        check_all(net)


def test_a_reshape_across_a_fixed_axis_tells_occurrences_apart() -> None:
    """(5, 4) to (2, 10): the third occurrence of a unit lies in the first row or in the second."""
    net = Net("across", dtype="float64")
    h = net.op("MatMul", net.input("x", [2, 5, 8]), net.weight((8, 4), 8))
    net.output(net.op("MatMul", net.op("Reshape", h, net.const([0, 2, 10])), net.weight((10, 3), 10)), [2, 2, 3])
    check_all(net)


def test_a_block_around_a_pinned_block_stays() -> None:
    """A product of two weights whose (5, 12) becomes (10, 6): the ten rows are outputs, two in each of the five."""
    net = Net("around", dtype="float64")
    product = net.op("MatMul", net.weight((5, 7), 5), net.weight((7, 12), 7))
    rows = net.op("MatMul", net.op("Reshape", product, net.const([10, 6])), net.weight((6, 3), 6))
    net.output(net.op("Add", rows, net.input("x", [10, 3])), [10, 3])
    check_all(net)


def test_concat_of_parts_labelled_over_other_axes() -> None:
    """A joint factor next to two plain ones ended without a pin on its other axis."""
    for joint in ([4, 20], [-1, 20]):
        net = Net("parts", dtype="float64")
        h = net.op("Reshape", net.op("MatMul", net.input("x", [10, 4]), net.weight((4, 8), 4)), net.const(joint))
        cat = net.op("Concat", net.weight((2, 20), 2), h, h, axis=0)
        net.output(net.op("MatMul", cat, net.weight((20, 3), 20)), [10, 3])
        check_all(net)


def test_grouped_convolution_of_labelled_samples() -> None:
    """Units on the batch axis were lost in a grouped convolution."""
    net = Net("samples", dtype="float64")
    h = net.op("Tanh", net.op("MatMul", net.input("x", [2, 5, 4]), net.weight((4, 12), 4)))
    turned = net.op("Transpose", h, perm=[2, 0, 1])
    conv = net.op("Conv", turned, net.weight((12, 1, 3), 3), group=2, pads=[1, 1], kernel_shape=[3])
    net.output(conv, [12, 12, 5])
    check_all(net)


def test_repeated_blocks_may_occur_unequally_often() -> None:
    """Twelve channels are three blocks four times over; a group of four holds one of them twice."""
    net = Net("unequal", dtype="float64")
    h = net.op("Conv", net.input("x", [2, 3, 4, 4]), net.weight((6, 3, 1, 1), 3))
    h = net.op("Tile", net.op("Reshape", h, net.const([0, 3, 2, 16])), net.const([1, 4, 1, 1]))
    conv = net.op("Conv", h, net.weight((24, 4, 3, 3), 36), group=3, pads=[1] * 4, kernel_shape=[3, 3])
    net.output(conv, [2, 24, 2, 16])
    check_all(net)


def test_a_uniform_axis_shrinks_with_what_it_meets() -> None:
    """An expanded axis stayed long where the weight that reads it, or the value added to it, lost units."""
    for case in range(3):
        net = Net(f"uniform_{case}", dtype="float64")
        wide = net.op("Expand", net.input("x", [2, 1, 5]), net.const([1, 6, 1]))
        if case == 0:
            net.output(net.op("Conv", wide, net.weight((4, 6, 1), 6)), [2, 4, 5])
        elif case == 1:
            flat = net.op("Transpose", wide, perm=[0, 2, 1])
            net.output(net.op("MatMul", flat, net.weight((6, 3), 6)), [2, 5, 3])
        else:
            h = net.op("Conv", net.input("y", [2, 3, 5]), net.weight((6, 3, 1), 3))
            net.output(net.op("Conv", net.op("Add", h, wide), net.weight((4, 6, 1), 6)), [2, 4, 5])
        check_all(net)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_loses_whole_channels_only(mode: str) -> None:
    net = Net("depth", dtype="float64")
    h = net.op("Conv", net.input("x", [2, 3, 4, 4]), net.weight((8, 3, 1, 1), 3))
    h = net.op("DepthToSpace", h, blocksize=2, mode=mode)
    net.output(net.op("MatMul", h, net.weight((8, 3), 8)), [2, 2, 8, 3])
    check_all(net)
