"""Which models keep every bit of their outputs under powers of two and signs, as a table.

    CIPM_TEST_DATA=... python -m tests.benchmarks.bit_exact_table [name ...]

Without names: every graph of the data folder, the light models of the onnx package (refilled), the CIFAR nets, MiniLM.
Each row: free scales and signs (units times directions), and the largest |Δ| of any output in onnxruntime

* gauge: a random power of two, 2^-3 to 2^3, and a random sign on every unit; without onnxruntime's optimizations
* fused: the same with all of its optimizations, which fold and fuse before they compute
* signs: the pass canonicalize-signs{by=range}
* equal: the pass equalize; behind it, how many units it scaled, and the largest log2 of a scale
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from tests import zoo
from tests.zoo.feeds import Feeds

from cipm_ir.algebra import Element
from cipm_ir.passes.exact.canonicalize.canonicalize_signs import CanonicalizeSigns
from cipm_ir.passes.exact.equalize.equalize import Equalize
from cipm_ir.passes.framework.base import Context, Pass
from cipm_ir.symmetry.program import Program

Outputs = list[NDArray[Any]]


def program_of(model: onnx.ModelProto) -> Program:
    """Program of a model in memory."""
    return Program.of(ir.from_proto(model))


def random_gauge(program: Program, seed: int = 0) -> Program:
    """Powers of two and signs on every unit, each in its place."""
    rng, chosen = np.random.default_rng(seed), {}
    for space in program.spaces:
        drawn = space.random(rng, power_of_two=True)
        chosen[space] = Element(np.arange(space.size), drawn.scale, drawn.sign)
    return program.act(chosen)


def run(model: onnx.ModelProto, inputs: Feeds, *, fused: bool = False, reference: bool = False) -> Outputs:
    """Outputs in onnxruntime on one thread; ``fused`` with all graph optimizations, else with none."""
    if reference:
        return zoo.run(model, inputs, reference=True)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if fused else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, inputs)]


def largest_delta(before: Outputs, after: Outputs) -> float:
    """Largest |Δ| of any entry; 0.0 only where every output has the same bits, up to the sign of a zero."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            continue
        x, y = (np.nan_to_num(v.astype(np.float64), nan=np.pi, posinf=np.e, neginf=-np.e) for v in (a, b))
        finite = np.isfinite(a) & np.isfinite(b)
        worst = max(worst, float(np.abs(x - y)[finite].max(initial=0.0)))
        if (x != y)[~finite].any():
            return float("inf")
    return worst


@dataclass
class Row:
    """One model of the table."""

    name: str
    scales: int = 0
    signs: int = 0
    delta: dict[str, float] = field(default_factory=dict)
    equalized: int = 0
    farthest: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        deltas = "".join(f"{self.delta.get(key, float('nan')):>10.2g}" for key in COLUMNS)
        rest = f"{self.equalized:>7}{self.farthest:>5.0f}{self.seconds:>8.1f} s"
        return f"{self.name:<24}{self.scales:>7}{self.signs:>7}{deltas}{rest}"


HEADER = (
    f"{'model':<24}{'scales':>7}{'signs':>7}{'gauge':>10}{'fused':>10}{'signs':>10}{'equal':>10}{'units':>7}{'log2':>5}"
)


COLUMNS = ("gauge", "fused", "signs", "equal")


def row(name: str, columns: tuple[str, ...] = COLUMNS) -> Row:
    """Measure one model of the zoo."""
    start = time.perf_counter()
    model, entry = zoo.build(name), zoo.entry(name)
    inputs, program = zoo.feeds(name, model), program_of(model)
    out = Row(name)
    out.scales = sum(space.size * sum(space.exact) for space in program.spaces)
    out.signs = sum(space.size * space.group.signs for space in program.spaces)
    before = run(model, inputs, reference=entry.reference)

    def delta(moved: Program, *, fused: bool = False) -> float:
        first = run(model, inputs, fused=True) if fused else before
        return largest_delta(first, run(ir.to_proto(moved.emit()), inputs, fused=fused, reference=entry.reference))

    if "gauge" in columns:
        out.delta["gauge"] = delta(random_gauge(program))
    if "fused" in columns and not entry.reference:
        out.delta["fused"] = delta(random_gauge(program), fused=True)
    if "signs" in columns:
        out.delta["signs"] = delta(changed(program, CanonicalizeSigns(by="range"))[0])
    if "equal" in columns:
        moved, witness = changed(program, Equalize())
        out.delta["equal"] = delta(moved)
        logs = [np.log2(np.asarray(chosen["scale"])) for chosen in witness.values()]
        out.equalized = sum(int((log != 0).any(axis=0).sum()) for log in logs)
        out.farthest = max((float(np.abs(log).max()) for log in logs), default=0.0)
    out.seconds = time.perf_counter() - start
    return out


def changed(program: Program, one: Pass) -> tuple[Program, Any]:
    """What a pass makes of a program, and its witness."""
    result = one.run(program, Context())
    return result.program, result.witness


NAMES = [
    *zoo.names("graphs"), *zoo.names("light"), *zoo.names("cifar"), *zoo.names("minilm"),
]  # fmt: skip


def main(names: list[str]) -> int:
    """Print the table; 1 where a bit has changed without onnxruntime's optimizations."""
    print(HEADER, flush=True)
    wrong = 0
    for name in names or NAMES:
        try:
            made = row(name)
        except zoo.UnavailableError as missing:
            print(f"{name:<24}{missing}", flush=True)
            continue
        print(made, flush=True)
        wrong += any(made.delta[key] for key in ("gauge", "signs", "equal"))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
