"""What `compress` makes of trained models, beside pruning: error on inputs left out, seconds, peak memory, latency.

    python -m tests.benchmarks.compress_corpus FOLDER [--models NAME,...] [--macs 0.7] [--samples 128] [--limit 300]

Each model of the folder (`NAME.onnx`, inputs from `tests.corpus.inputs`) is compressed in a process of its own, which
is ended when its time is over. The error is that of the outputs on 16 inputs left out: the root of the relative squared
error, and the cosine. ``prune`` and ``prune+`` are pruning by magnitude without and with compensation. Memory is the
peak of anonymous memory above what the process held once its libraries were imported and the inputs were made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.big_weights import _anonymous, _cpu

HELD_OUT = 16
CHILD = """
import json, sys, time
import numpy as np, onnxruntime, scipy.linalg, scipy.stats
import cipm_ir
from cipm_ir.passes.framework import registry
from tests.corpus.inputs import samples
registry.listing()
source, recipe, count, target = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
name = source.rpartition("/")[2].removesuffix(".onnx")
feeds = samples(name, count + 16)
data, held = feeds[:count], feeds[count:]
print("ready", flush=True)
sys.stdin.readline()
said, extra = "", {}
try:
    made = cipm_ir.optimize(source, [recipe], data=data, output=target, verify=True)
    said = made.report.steps[0].summary
except Exception as error:
    print(json.dumps({"refused": f"{type(error).__name__}: {error}"[:300]}))
    sys.exit(0)
print("done", flush=True)
def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
one, two = session(source), session(target)
def runs(s, f):
    begin = time.perf_counter()
    return s.run(None, f), time.perf_counter() - begin
far = whole = 0.0
cosines, seconds, agree = [], [[], []], []
for f in held:
    (a, t), (b, u) = runs(one, f), runs(two, f)
    seconds[0].append(t); seconds[1].append(u)
    for x, y in zip(a, b):
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            continue
        x, y = x.astype(float).ravel(), y.astype(float).ravel()
        far += np.square(x - y).sum() / max(np.square(x).sum(), 1e-30)
        whole += 1
        cosines.append(float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30)))
    if a[0].ndim and a[0].shape[-1] > 1 and a[0].dtype.kind == "f":
        agree.append(float((a[0].argmax(-1) == b[0].argmax(-1)).mean()))
print(json.dumps({
    "error": float(np.sqrt(far / max(whole, 1))), "cosine": float(np.mean(cosines)),
    "agree": float(np.mean(agree)) if agree else None,
    "latency": float(np.median(seconds[1]) / np.median(seconds[0])), "said": said[:200],
}))
"""


def measure(path: Path, recipe: str, samples: int, limit: float) -> dict[str, Any]:
    """Run one recipe on one model; ``limit``: seconds of processor time."""
    target = Path(f"/tmp/compress_corpus_{path.stem}.onnx")
    command = [sys.executable, "-c", CHILD, str(path), recipe, str(samples), str(target)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        base, busy, peak, cpu, start = _anonymous(child.pid), _cpu(child.pid), 0, 0.0, time.perf_counter()
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak, cpu = max(peak, _anonymous(child.pid)), max(cpu, _cpu(child.pid))
            if cpu - busy > limit or peak - base > 12e9:
                child.kill()
                child.wait()
                break
            time.sleep(0.01)
        lines, errors = child.stdout.read().strip().splitlines(), child.stderr.read()
        wall = time.perf_counter() - start
    target.unlink(missing_ok=True)
    found: dict[str, Any] = {"cpu": round(cpu - busy, 1), "wall": round(wall, 1), "mb": round((peak - base) / 1e6)}
    if child.returncode:
        return {**found, "ended": "killed" if child.returncode < 0 else errors[-300:]}
    return {**found, **json.loads(lines[-1])}


def main() -> None:
    """Print a line of JSON per model and recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="")
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--recipes", default="compress,prune,prune+")
    given = parser.parse_args()
    recipes = {
        "compress": f"compress{{macs={given.macs}}}",
        "prune": f"prune{{macs={given.macs}}}",
        "prune+": f"prune{{macs={given.macs}, compensate=true}}",
    }
    names = given.models.split(",") if given.models else sorted(p.stem for p in given.folder.glob("*.onnx"))
    for name in names:
        for recipe in given.recipes.split(","):
            found = measure(given.folder / f"{name}.onnx", recipes[recipe], given.samples, given.limit)
            print(json.dumps({"model": name, "recipe": recipe, **found}), flush=True)


if __name__ == "__main__":
    main()
