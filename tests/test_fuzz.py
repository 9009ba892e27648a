"""Random graphs: what the analysis claims of each is checked by running it in float64.

Every check either returns a sentence that says what is wrong, or "" where all is well; errors of the package
(`CipmError`) are refusals and fine, any other exception is a defect and comes through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.dead_units import killed, random_keep, restricted
from tests.fuzz_graphs import random_feeds, random_model
from tests.test_soundness import largest_change, program_of, random_elements
from tests.widening import NoKernelError, run_widened

from cipm_ir.errors import CipmError, SymmetryError
from cipm_ir.passes.registry import lookup
from cipm_ir.passes.base import Context
from cipm_ir.passes.fingerprint import fingerprint_program
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
    if not finite(before) or (ops & LIFTING and (ops & SUMMING or products)):
        return ""
    change = largest_change(before, after)
    return f"restrict changes an output by {change:.1e}" if change > 1e-7 else ""


def check_prune(model: onnx.ModelProto, feeds: Feeds, seed: int) -> str:
    """Whatever is pruned, what is left is valid and runs."""
    program = program_of(model)
    try:
        small = lookup("prune")(ratio=(0.3, 0.6)[seed % 2]).run(program, Context()).program
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
