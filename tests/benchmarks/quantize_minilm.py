"""MiniLM-L6 in eight bits by onnxruntime, with and without `expose` and `equalize`, as markdown.

    python -m tests.benchmarks.quantize_minilm [--test 8] [--expose expose]

Rows: how the weights are prepared. Columns: the mean cosine (and the worst) of the sentence embeddings to the float
model's. Dynamic: quantize_dynamic of every MatMul, as is usual for encoders, with a step per tensor or per channel of
the weights. Static: QDQ around every MatMul, calibrated. Last, weights alone rounded to eight and four bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from tests.benchmarks.compress_minilm import Bench, embeddings
from tests.benchmarks.quantizers import quiet, static, weights_rounded

import cipm_ir

Quantizer = Callable[[onnx.ModelProto], onnx.ModelProto]
LAYERS = ("MatMul", "Gemm")


def dynamic(model: onnx.ModelProto, *, per_channel: bool) -> onnx.ModelProto:
    """Signed weights; activations are quantized when the model runs."""
    given = onnx.ModelProto()
    given.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            given, path, op_types_to_quantize=list(LAYERS), per_channel=per_channel, weight_type=QuantType.QInt8
        )
        return onnx.load(path)


def quantizers(bench: Bench) -> dict[str, Quantizer]:
    """All columns."""
    feeds = bench.calibration

    def fixed(per_channel: bool) -> Quantizer:
        return lambda model: static(model, feeds, per_channel=per_channel, op_types_to_quantize=list(LAYERS))

    def alone(bits: int, per_channel: bool) -> Quantizer:
        return lambda model: weights_rounded(model, bits, per_channel=per_channel)[0]

    return {
        "float": lambda model: model,
        "dynamic per tensor": lambda model: dynamic(model, per_channel=False),
        "dynamic per channel": lambda model: dynamic(model, per_channel=True),
        "static per tensor": fixed(False),
        "static per channel": fixed(True),
        "W8 per tensor": alone(8, False),
        "W4 per channel": alone(4, True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=int, default=8, help="test sentences of each kind, at most")
    parser.add_argument("--calibration", type=int, default=4, help="calibration sentences of each kind, at most")
    parser.add_argument("--expose", default="expose", help="what comes before equalize; empty: nothing")
    parser.add_argument("--columns", nargs="*", help="which ways to quantize, by name")
    given = parser.parse_args(arguments)
    bench = Bench.load(given.test, given.calibration)
    before = [given.expose] if given.expose else []
    rows = {
        "none": ([], None),
        "expose": (before, None),
        "equalize": ([*before, "equalize"], None),
        "equalize, real": ([*before, "equalize{exact=false}"], None),
        "equalize with data": ([*before, "equalize"], bench.calibration),
        "equalize with data, real": ([*before, "equalize{exact=false}"], bench.calibration),
    }
    columns = {k: v for k, v in quantizers(bench).items() if not given.columns or k in given.columns}
    print(f"{len(bench.ids)} test sentences, {sum(len(f['input_ids']) for f in bench.calibration)} for calibration\n")
    print(f"| | s | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for name, (steps, data) in rows.items():
        start = time.perf_counter()
        program = cipm_ir.optimize(bench.dense, steps, data=data, verify=False).program if steps else bench.dense
        cells = [f"{time.perf_counter() - start:.1f}"]
        model = ir.to_proto(program.emit())
        for quantize in columns.values():
            got = (embeddings(ir.from_proto(quantize(model)), bench.ids) * bench.wanted).sum(axis=1)
            cells.append(f"{np.mean(got):.5f} ({got.min():.4f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
