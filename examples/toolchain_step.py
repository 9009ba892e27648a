"""A step of a deployment toolchain: take a model, make it smaller, check it, and hand on a file that a runtime loads.

    python examples/toolchain_step.py [model.onnx [result.onnx [passes]]]

Exit codes, for the tool that calls this: 0 done, 1 the result is wrong or breaks the budget, 2 the input is bad.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

import cipm_ir

DIGITS = Path(__file__).parent / "digits" / "digits.onnx"
PASSES = "clean-up, prune{macs=0.8, round_to=8}, fold-batch-norm, remove-dead"
RUNS = 50
BATCH = 16


def latency(path: str | Path) -> float:
    """Median milliseconds of a run on random input; free sizes are set to `BATCH`."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else BATCH for size in value.shape]
        feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) * 1e3


def deploy(source: str | Path, target: str | Path, passes: str) -> int:
    """Optimize, save, open in onnxruntime, compare: the exit code of this step."""
    try:
        result = cipm_ir.optimize(source, passes=passes, output=target, on_failure="raise")
    except cipm_ir.VerificationError as error:
        print(f"rejected: {error}", file=sys.stderr)
        return 1
    except cipm_ir.CipmError as error:
        print(f"bad input: {error}", file=sys.stderr)
        return 2
    print(result.report)
    before, after = latency(source), latency(target)
    print(f"latency of a batch of {BATCH}: {before:.2f} ms before, {after:.2f} ms after ({after / before:.0%})")
    if result.report.after.macs > result.report.before.macs:
        print("rejected: the result needs more arithmetic than the original", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Read the command line; without arguments, deploy the digit classifier to a temporary folder."""
    given = dict(enumerate(sys.argv))
    with tempfile.TemporaryDirectory() as folder:
        target = given.get(2, str(Path(folder) / "deployed.onnx"))
        return deploy(given.get(1, DIGITS), target, given.get(3, PASSES))


if __name__ == "__main__":
    sys.exit(main())
