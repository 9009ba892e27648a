"""How the time and the memory of `compress` grow with the width of a network and with the number of samples.

    python -m tests.benchmarks.compress_scaling [--widths 256,512,1024,2048] [--samples 100,1000,10000,100000]

A multi-layer perceptron of three products with random weights, on random inputs. Each case runs in a process of its
own; time is that of the processor, memory the peak over what the process held before.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import onnx

import cipm_ir
from cipm_ir.passes import Compress

_INPUTS, _OUTPUTS = 64, 10
_WIDTH, _SAMPLES = 256, 1000
"""What stays fixed while the other one varies."""


def perceptron(width: int) -> onnx.ModelProto:
    """Three products, of ``width`` hidden units each, with a Relu between them."""
    rng = np.random.default_rng(0)
    sizes = [_INPUTS, width, width, _OUTPUTS]
    lines, arrays, value = [], [], "x"
    for k, (a, b) in enumerate(pairwise(sizes)):
        weight = rng.standard_normal((a, b)) * np.sqrt(2 / a) * rng.uniform(0.2, 1.8, b)
        arrays += [(f"w{k}", weight), (f"b{k}", 0.1 * rng.standard_normal(b))]
        lines.append(f"h{k} = Gemm({value}, w{k}, b{k})")
        value = f"h{k}"
        if k < 2:
            lines.append(f"r{k} = Relu(h{k})")
            value = f"r{k}"
    text = f'<ir_version: 10, opset_import: ["" : 20]> mlp (float[N,{_INPUTS}] x) => (float[N,{_OUTPUTS}] {value})'
    model = onnx.parser.parse_model(text + " {" + "\n".join(lines) + "}")
    tensors = [onnx.numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays]
    model.graph.initializer.extend(tensors)
    return model


def measure(width: int, samples: int) -> tuple[float, float]:
    """Seconds of the processor and MiB of one compress."""
    model = perceptron(width)
    data = {"x": np.random.default_rng(1).standard_normal((samples, _INPUTS)).astype(np.float32)}
    program = cipm_ir.load(model)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    cipm_ir.optimize(program, [Compress(params=0.5, samples=samples)], data=data)
    seconds = time.process_time() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def apart(width: int, samples: int) -> tuple[float, float]:
    """The same in a process of its own."""
    code = f"from tests.benchmarks.compress_scaling import measure; print(*measure({width}, {samples}))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, memory = map(float, found.split())
    return seconds, memory


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-3)), 1)[0])


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", default="256,512,1024,2048")
    parser.add_argument("--samples", default="100,1000,10000,100000")
    given = parser.parse_args()
    for what, asked in (("width", given.widths), ("samples", given.samples)):
        sizes = [int(text) for text in asked.split(",")]
        print(f"| {what} | CPU s | MiB |\n|---|---|---|", flush=True)
        found = []
        for size in sizes:
            found.append(apart(size, _SAMPLES) if what == "width" else apart(_WIDTH, size))
            print(f"| {size} | {found[-1][0]:.1f} | {found[-1][1]:.0f} |", flush=True)
        if len(sizes) < 2:
            continue
        last = slice(-3, None)  # the small ones are all start
        times, memories = zip(*found, strict=True)
        ends = [exponent(sizes[last], list(column[last])) for column in (times, memories)]
        print(f"| exponent of the last three | {ends[0]:.2f} | {ends[1]:.2f} |\n", flush=True)


if __name__ == "__main__":
    main()
