"""Signs of units: what is chosen does not depend on the signs that came in, and changes no bit of any output."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tests import zoo
from tests.passes.exact.test_canonicalize import constants, same_bits
from tests.symmetry.test_soundness import program_of, run_plain
from tests.zoo.net import Net

from cipm_ir.algebra import Element
from cipm_ir.errors import OptionError
from cipm_ir.passes.exact.canonicalize.canonicalize_signs import CanonicalizeSigns
from cipm_ir.passes.exact.canonicalize.members import Members
from cipm_ir.passes.exact.canonicalize.sign_ranges import Ranges, Signs
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
SIGNED = [
    "mlp_tanh", "mlp_erf", "mlp_identity", "mlp_clip11", "mlp_softsign", "mlp_sin", "attention_separate",
    "attention_gqa", "batch_norm_linear", "rms_norm", "depthwise", "maxout_slices", "mlp_float16", "minilm", "vit",
]  # fmt: skip
FORMS = ("bias", "range")


def run(program: Program, by: str = "bias") -> PassResult:
    return CanonicalizeSigns(by=by).run(program, Context())


def flipped(program: Program, seed: int = 0) -> Program:
    """Random signs on all spaces."""
    rng = np.random.default_rng(seed)
    elements = {}
    for space in program.spaces:
        drawn = space.random(rng)
        elements[space] = Element(np.arange(space.size), np.ones_like(drawn.scale), drawn.sign)
    return program.act(elements)


@pytest.mark.parametrize("by", FORMS)
@pytest.mark.parametrize("name", SIGNED)
def test_no_bit_of_the_outputs_changes(name: str, by: str) -> None:
    model = zoo.build_or_skip(name)
    program, inputs, reference = program_of(model), zoo.feeds(name, model), zoo.entry(name).reference
    result = run(flipped(program), by)
    assert result.changed == bool(sum(s.group.signs for s in program.spaces))
    after = ir.to_proto(result.program.emit())
    before = zoo.run(model, inputs, reference=True) if reference else run_plain(model, inputs)
    now = zoo.run(after, inputs, reference=True) if reference else run_plain(after, inputs)
    for a, b in zip(before, now, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("by", FORMS)
@pytest.mark.parametrize("name", [*(n for n in SIGNED if n not in ("minilm",)), "resnet20"])
def test_the_result_does_not_depend_on_the_signs_that_came_in(name: str, by: str) -> None:
    program = program_of(zoo.build_or_skip(name))
    want = constants(run(program, by).program)
    for seed in range(2):
        assert same_bits(constants(run(flipped(program, seed), by).program), want)


def test_nothing_without_signs_and_nothing_twice() -> None:
    assert not run(program_of(zoo.build("mlp_relu"))).changed
    for by in FORMS:
        once = run(program_of(zoo.build("mlp_tanh")), by).program
        again = run(once, by)
        assert not again.changed and again.metrics["flipped"] == 0


def test_biases_become_positive() -> None:
    model = ir.to_proto(run(program_of(zoo.build("mlp_tanh"))).program.emit())
    hidden = [numpy_helper.to_array(t) for t in model.graph.initializer if list(t.dims) in ([8], [6])]
    assert len(hidden) == 2 and all((b > 0).all() for b in hidden)


def test_the_largest_weight_decides_where_there_is_no_bias(rng: np.random.Generator) -> None:
    net = Net("signs_without_bias")
    h = net.op("Tanh", net.op("MatMul", net.input("x", ["N", 5]), net.weight((5, 7), 5, "first")))
    net.output(net.op("MatMul", h, net.weight((7, 3), 7)), ["N", 3])
    model = ir.to_proto(run(flipped(program_of(net.model()), 3)).program.emit())
    first = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith("first"))
    largest = np.take_along_axis(first, np.abs(first).argmax(axis=0)[None], axis=0)
    assert (largest > 0).all()


# ---------------------------------------------------------------- ranges
def matrices(model: onnx.ModelProto) -> list[Array]:
    arrays = [numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer]
    return [a for a in arrays if a.ndim > 1 and a.size > 8 and a.std() > 0]


def asymmetric_error(array: Array, levels: int = 255) -> float:
    """Relative mean square error of per-tensor asymmetric int8, zero included in the range as onnxruntime does."""
    low, high = min(array.min(), 0.0), max(array.max(), 0.0)
    step = (high - low) / levels
    zero = np.round(-low / step)
    back = (np.clip(np.round(array / step) + zero, 0, levels) - zero) * step
    return float(((back - array) ** 2).mean() / (array**2).mean())


def total_error(program: Program) -> float:
    """Mean of the log errors: as many decibels in one tensor count as much as in another."""
    errors = [asymmetric_error(a) for a in matrices(ir.to_proto(program.emit()))]
    return float(np.mean(np.log([e for e in errors if e > 0])))


def skewed(name: str, op: str = "Tanh") -> onnx.ModelProto:
    """An MLP whose units have weights of mostly one sign, as heavy-tailed trained ones do."""
    net = Net(name)
    h, width = net.input("x", ["N", 12]), 12
    for k in range(3):
        draw = net.rng.exponential(0.3, (width, 16)) * net.rng.choice([-1.0, 1.0], (1, 16))
        h = net.op("Add", net.op("MatMul", h, net.const(draw + net.normal((width, 16), 0.05), f"w{k}")), net.bias(16))
        h, width = net.op(op, h), 16
    net.output(net.op("MatMul", h, net.weight((16, 3), 16)), ["N", 3])
    return net.model()


@pytest.mark.parametrize("seed", range(4))
def test_ranges_and_errors_shrink(seed: int) -> None:
    program = flipped(program_of(skewed(f"skewed_{seed}")), seed)
    result = run(program, "range")
    assert result.metrics["range_after"] < result.metrics["range_before"]
    assert total_error(result.program) < total_error(program)


@pytest.mark.parametrize("name", ["mlp_tanh", "attention_separate", "batch_norm_linear", "mlp_identity", "vit", "bert"])
def test_error_is_not_worse(name: str) -> None:
    program = program_of(zoo.build_or_skip(name))
    result = run(program, "range")
    assert result.metrics["range_after"] <= result.metrics["range_before"]
    assert total_error(result.program) <= total_error(program) + 0.02


def test_range_is_as_small_as_any_choice_of_signs_makes_it(rng: np.random.Generator) -> None:
    """All 2^10 choices of signs of one layer, by brute force."""
    net = Net("signs_brute")
    h = net.op("Tanh", net.op("MatMul", net.input("x", ["N", 4]), net.weight((4, 10), 4, "first")))
    net.output(net.op("MatMul", h, net.weight((10, 3), 10, "second")), ["N", 3])
    program = program_of(net.model())
    found = run(program, "range").metrics["range_after"]
    first, second = matrices(net.model())
    signs = 1 - 2 * ((np.arange(1024)[:, None] >> np.arange(10)) & 1)

    def spans(x: Array) -> Array:
        return np.asarray(np.maximum(x.max(axis=(1, 2)), 0) - np.minimum(x.min(axis=(1, 2)), 0))

    every = (np.log(spans(signs[:, None, :] * first)) + np.log(spans(signs[:, :, None] * second))) / 2
    assert found <= np.sort(every)[0] + 0.03
    assert found < np.median(every) - 0.05


def test_ranges_of_a_gauge_are_those_of_the_tensors() -> None:
    """Negative control: with the wrong signs the ranges are others."""
    program = program_of(skewed("skewed_control"))
    signs = Signs(Members(program, exact=True))
    signs.fix()
    inside = Ranges(signs).total()
    moved = matrices(ir.to_proto(run(program).program.emit()))
    assert inside == pytest.approx(np.mean([np.log(max(a.max(), 0) - min(a.min(), 0)) for a in moved]), abs=1e-6)
    signs.sign[:] = 1
    assert abs(Ranges(signs).total() - inside) > 1e-3


def test_text_form_and_refused_options() -> None:
    (made,) = parse_passes("canonicalize-signs{by=range}")
    assert made == CanonicalizeSigns(by="range")
    with pytest.raises(OptionError, match="by"):
        CanonicalizeSigns(by="taste")


def test_the_check_notices_a_sign_on_one_side_only() -> None:
    """Negative control of the comparison of bits."""
    model = zoo.build("mlp_tanh")
    inputs = zoo.feeds("mlp_tanh", model)
    before = run_plain(model, inputs)
    tensor = model.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array[0] *= -1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert not np.array_equal(before[0], run_plain(model, inputs)[0])
