"""CPU seconds and nodes of ``cipm optimize m.onnx -o out.onnx`` beside onnxslim, taken in turns.

    python tests/benchmarks/command_cost.py --slim /path/to/onnxslim [--repeat 3] model.onnx ...

For each model: the least CPU seconds of the whole command, with verification and without, those of onnxslim, their
ratios, and the nodes (Constants not counted) that are left. Both commands find their compiled modules, as they do where
they are installed, whatever this process does with those that it imports.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx


def cpu_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    silent = subprocess.DEVNULL
    subprocess.run(command, stdout=silent, stderr=silent, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def nodes(graph: onnx.GraphProto) -> int:
    """All nodes but Constants, those of bodies too."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return sum(1 for node in graph.node if node.op_type != "Constant") + sum(map(nodes, inner))


def main() -> None:
    """Print one line per model, and the sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--slim", required=True, help="the command of onnxslim")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    sums = [0.0, 0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(folder, "compiled"))
        ours, theirs = str(Path(folder, "ours.onnx")), str(Path(folder, "slim.onnx"))
        for model in given.models:
            plain = [sys.executable, "-m", "cipm_ir.cli", "optimize", model, "-o", ours]
            commands = [plain, [*plain, "--no-verify"], [given.slim, model, theirs]]
            if not sums[0]:  # so that all modules are compiled
                for command in commands:
                    cpu_seconds(command, environment)
            turns = [[cpu_seconds(command, environment) for command in commands] for _ in range(given.repeat)]
            best = [min(column) for column in zip(*turns, strict=True)]
            sums = [a + b for a, b in zip(sums, best, strict=True)]
            left = [nodes(onnx.load(path, load_external_data=False).graph) for path in (model, ours, theirs)]
            print(f"{Path(model).name:28} {line(best)}  nodes {left[0]} to {left[1]}, onnxslim {left[2]}", flush=True)
    print(f"{'in all':28} {line(sums)}")


def line(seconds: Sequence[float]) -> str:
    """Seconds with verification, without, of onnxslim; and the first two as multiples of it."""
    whole, bare, slim = seconds
    return f"{whole:6.2f} s {bare:6.2f} s {slim:6.2f} s  {whole / slim:5.2f} {bare / slim:5.2f}"


if __name__ == "__main__":
    main()
