"""What verification costs beside a pass, in seconds and in runs of the original. Prints; asserts that it ran."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import pytest
from tests import zoo
from tests.oracles.double_precision import Single, probes

import cipm_ir
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verification.verify import verify_models

GOAL = 5
SMALL = ["mlp_relu", "conv_pool", "residual_blocks", "attention_gqa", "layer_norm", "lstm", "bert", "resnet20"]
LIGHT = ["squeezenet", "shufflenet", "inception_v1", "densenet121"]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count sessions that are opened and runs that are made while the block runs."""
    counts: Counter[str] = Counter()
    opened, run = Runner.__init__, Runner.run

    def open_counted(self: Runner, *args: Any, **options: Any) -> None:
        counts["sessions"] += 1
        opened(self, *args, **options)

    def run_counted(self: Runner, *args: Any, **options: Any) -> Any:
        counts["runs"] += 1
        return run(self, *args, **options)

    Runner.__init__, Runner.run = open_counted, run_counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Runner.__init__, Runner.run = opened, run  # type: ignore[method-assign]


def best_of(times: int, what: Any) -> float:
    """Shortest of several calls, in seconds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("name", [*SMALL, *LIGHT])
def test_share_of_verification(name: str) -> None:
    original = ir.from_proto(zoo.build_or_skip(name))
    result = cipm_ir.optimize(original, ["canonicalize"], verify=False)
    seconds = sum(step.seconds for step in result.report.steps)
    before, after = cipm_ir.load(original).emit(), result.program.emit()
    feeds = dict(probes(original))["normal"]
    runner = Single(original)
    opening, one = best_of(3, lambda: Single(original)), best_of(5, lambda: runner.run(feeds))
    with counted() as counts:
        assert verify_models(before, after).verified
    took = best_of(3, lambda: verify_models(before, after))
    print(
        f"\n{name}: pass {seconds * 1e3:.1f} ms, verification {took * 1e3:.1f} ms "
        f"(share {took / (took + seconds):.0%}); {counts['sessions']} sessions, {counts['runs']} runs of both models; "
        f"one session of the original {opening * 1e3:.1f} ms, one run {one * 1e3:.2f} ms: "
        f"{took / (opening + one):.1f} times one of each, {took / one:.0f} runs (goal {GOAL} runs on the original)"
    )
    assert counts["runs"] > 1
