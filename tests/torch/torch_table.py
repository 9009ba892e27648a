"""A markdown table over the torch test models: ``python -m tests.torch.torch_table [names]``."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from tests.torch import torch_zoo

import cipm_ir
from cipm_ir.errors import CipmError

ISSUE = (
    "mlp_relu",
    "mlp_gelu",
    "mlp_tanh",
    "mlp_prelu",
    "mlp_gated",
    "cifar_resnet20",
    "resnet20_random",
    "resnet_bottleneck",
    "mobilenet_v2",
    "mobilenet_v3",
    "densenet",
    "shufflenet",
    "unet",
    "yolo_c2f",
    "squeeze_excitation",
    "convnext",
    "lstm_tagger",
    "gru_tagger",
    "encoder_qkv_3hd",
    "encoder_qkv_head_major",
    "multihead_attention",
    "torch_transformer_encoder",
    "bert",
    "vit",
    "gpt2",
    "llama",
    "llama_cache",
    "qwen2",
    "t5_encoder",
    "swin",
    "hf_convnext",
    "whisper_encoder",
    "mixtral",
    "mixtral_batched",
    "gpt_neox",
)
"""The models that the issue asks for."""

HEADER = (
    "model",
    "read by",
    "spaces",
    "free units",
    "opaque",
    "MACs before",
    "after",
    "emitted as",
    "max relative change",
    "seconds",
)


@dataclass
class Row:
    """One model; the fields that a failure leaves out stay empty, and ``error`` says why."""

    name: str
    read: str = ""
    spaces: str = ""
    units: str = ""
    opaque: str = ""
    before: str = ""
    after: str = ""
    emitted: str = ""
    change: str = ""
    seconds: float = 0.0
    error: str = ""

    def cells(self) -> list[str]:
        """The cells of the row, in the order of `HEADER`."""
        emitted = self.emitted + (f"; {self.error}" if self.emitted and self.error else self.error)
        counts = [self.read, self.spaces, self.units, self.opaque, self.before, self.after]
        return [self.name, *counts, emitted, self.change, f"{self.seconds:.1f}"]


def measure(name: str, macs: float = 0.5) -> Row:
    """Read a model of the zoo, act on it, prune it; an error of any step ends the row."""
    row, start = Row(name), time.perf_counter()
    try:
        _fill(row, macs)
    except CipmError as error:
        row.error = f"{type(error).__name__}: {shortened(str(error), 110)}"
    row.seconds = time.perf_counter() - start
    return row


def _fill(row: Row, macs: float) -> None:
    found = torch_zoo.case(row.name)
    module, (args, kwargs) = found.build(), found.inputs()
    program = cipm_ir.load(module, args, kwargs)
    origin: Any = program.origin
    row.read = origin.capture.method
    row.spaces = str(len(program.spaces))
    row.units = str(sum(space.size for space in program.spaces if space.kind == "units"))
    kinds = sorted({node.op for node in program.opaque})
    row.opaque = f"{len(program.opaque)} ({', '.join(kinds)})" if kinds else "0"
    row.before = f"{program.macs:,}"
    rng = np.random.default_rng(0)
    acted = program.act({space: space.random(rng) for space in program.spaces})
    row.change = f"{origin.compare(program.emit(), acted.emit()).max_rel:.1e}"
    result = cipm_ir.optimize(program, [f"prune{{macs={macs}}}"])
    row.after = f"{result.report.after.macs:,} ({result.report.after.macs / max(program.macs, 1):.0%})"
    made = result.emitted
    assert made is not None
    row.emitted = f"{made.form}: {shortened(made.reason, 70)}" if made.reason else made.form


def shortened(text: str, width: int) -> str:
    """On one line that fits a table cell, cut to ``width``; where brackets hold the cause, only that."""
    line = " ".join(text.split()).replace("|", "/")
    inner = line.partition("(")[2].rstrip(").")
    line = inner or line
    return line if len(line) <= width else line[: width - 1] + "…"


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models of tests/torch/torch_zoo.py; without: those of the issue")
    names = parser.parse_args().names or ISSUE
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [measure(name) for name in names]
    print(table(rows))


if __name__ == "__main__":
    main()
