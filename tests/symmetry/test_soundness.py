"""A random element of the full group, on all spaces at once, leaves what every model of the zoo computes unchanged.

Three oracles of rising strength: rounding in the model's own type, rounding in float64 (1e-10: a wrong equation cannot
hide behind float32), and powers of two with signs, which must not change a single bit. What these oracles would miss is
the subject of test_soundness_controls.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.oracles.widening import NoKernelError, run_widened, widened, widened_feeds
from tests.zoo.feeds import Feeds

from cipm_ir.algebra import Element
from cipm_ir.symmetry.program import Program

Outputs = list[NDArray[Any]]

TOLERANCE = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-10}
# In float32 this net without batch norm amplifies rounding some 600 times: permutations alone, which round nothing but
# the order of sums, move its output as much. In float64 (below) the change is 1e-13.
ILL_CONDITIONED = {"mobilenetv2_revived": 5e-4}
LARGE = set(zoo.names("large"))
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in zoo.names(without=("constant",))
]

# Models that neither onnxruntime nor the reference evaluator runs in float64, and why.
NO_FLOAT64 = {
    "contrib_op": "BiasGelu is known to onnxruntime only, and in float32",
    "grouped_conv_transpose": "no double ConvTranspose in onnxruntime; that of the reference evaluator ignores groups",
    "bert": "no double Erf in onnxruntime; the reference evaluator fails on the export's GatherND",
    "bert_shared_bias": "as bert",
}
WIDENED = [
    name
    for name in zoo.names(without=("constant", "light", "minilm", "float64", "float16"))
    # The first two are faint, the third takes the reference evaluator half a minute for what mobilenetv2_revived shows.
    if name not in ("mobilenetv2", "efficientnet", "efficientnet_revived")
]


def program_of(model: onnx.ModelProto) -> Program:
    return Program.of(ir.from_proto(model))


def random_elements(program: Program, seed: int = 0) -> dict[Any, Element]:
    rng = np.random.default_rng(seed)
    return {space: space.random(rng) for space in program.spaces}


def acted(program: Program, elements: dict[Any, Element]) -> onnx.ModelProto:
    return ir.to_proto(program.act(elements).emit())


def largest_change(before: Outputs, after: Outputs) -> float:
    """Over all outputs, the largest |Δ| relative to the largest entry; infinite where shapes differ or NaNs appear."""
    worst = 0.0
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not np.isfinite(b).all():
            return float("inf")
        if a.size:
            wide = a.astype(np.float64)
            worst = max(worst, float(np.abs(wide - b.astype(np.float64)).max() / max(np.abs(wide).max(), 1e-30)))
    return worst


def some_parameter_moved(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    old = {tensor.name: tensor for tensor in before.graph.initializer}
    return any(t.name not in old or old[t.name].raw_data != t.raw_data for t in after.graph.initializer)


@pytest.mark.parametrize("name", NAMES)
def test_random_element_changes_nothing(name: str) -> None:
    model, entry = zoo.build_or_skip(name), zoo.entry(name)
    program, inputs = program_of(model), zoo.feeds(name, model)
    moved = acted(program, random_elements(program))
    assert not program.spaces or some_parameter_moved(model, moved), "the element moved no parameter"
    before = zoo.run(model, inputs, reference=entry.reference)
    after = zoo.run(moved, inputs, reference=entry.reference)
    tolerance = ILL_CONDITIONED.get(name, TOLERANCE[next((t for t in TOLERANCE if t in entry.tags), "float32")])
    assert largest_change(before, after) <= tolerance


@pytest.mark.parametrize("name", WIDENED)
def test_exact_up_to_float64_rounding(name: str) -> None:
    model = zoo.build_or_skip(name)
    wide, inputs = widened(model), widened_feeds(zoo.feeds(name, model))
    program = program_of(wide)
    assert [s.size for s in program.spaces] == [s.size for s in program_of(model).spaces]
    try:
        before = run_widened(wide, inputs)
        after = run_widened(acted(program, random_elements(program, seed=1)), inputs)
    except NoKernelError as error:
        if name in NO_FLOAT64:
            pytest.skip(f"{NO_FLOAT64[name]}: {str(error)[:80]}")
        raise
    assert name not in NO_FLOAT64, "it runs in float64 now; take it off the list"
    assert largest_change(before, after) <= 1e-10


def run_plain(model: onnx.ModelProto, inputs: Feeds) -> Outputs:
    """onnxruntime without graph optimizations: fusions may round differently for different weights."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, inputs)]


def power_of_two_gauge(program: Program, seed: int = 0) -> dict[Any, Element]:
    rng, chosen = np.random.default_rng(seed), {}
    for space in program.spaces:
        element = space.random(rng, power_of_two=True)
        chosen[space] = Element(np.arange(space.size), element.scale, element.sign)
    return chosen


@pytest.mark.parametrize("name", zoo.names(without=("constant", "large", "float16")))
def test_powers_of_two_and_signs_change_no_bit(name: str) -> None:
    model, entry = zoo.build_or_skip(name), zoo.entry(name)
    program, inputs = program_of(model), zoo.feeds(name, model)
    moved = acted(program, power_of_two_gauge(program))
    if entry.reference:
        before, after = (zoo.run(m, inputs, reference=True) for m in (model, moved))
    else:
        before, after = run_plain(model, inputs), run_plain(moved, inputs)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a, b)


def test_largest_change_sees_small_and_large_changes() -> None:
    """Negative control of the measure itself."""
    a = [np.array([1.0, -4.0], np.float32)]
    assert largest_change(a, [a[0].copy()]) == 0.0
    assert largest_change(a, [a[0] + np.float32(1e-4)]) == pytest.approx(2.5e-5, rel=0.05)
    assert largest_change(a, [a[0] * np.nan]) == float("inf")
    assert largest_change(a, [a[0][:1]]) == float("inf")
