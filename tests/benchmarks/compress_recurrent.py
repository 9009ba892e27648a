"""Accuracy of compressed taggers of digit sequences with LSTM and GRU, as a markdown table.

    python -m tests.benchmarks.compress_recurrent [--keep 0.5] [--hidden 64]

The images of scikit-learn's digits are read row by row, four images in a row; at each row the tagger says which digit
it is in. Trained here in about a minute; calibrated on 256 training sequences without labels, measured on sequences of
images that neither training nor calibration saw. The share ``keep`` of the hidden units remains.
"""

from __future__ import annotations

import argparse
import io
import time
from typing import Any

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from torch import nn

import cipm_ir
from cipm_ir.passes import Compress, Prune
from cipm_ir.runtime.session import Runner

IMAGES = 4


class Tagger(nn.Module):
    """A recurrent layer over rows of pixels, and a linear one."""

    def __init__(self, kind: str, hidden: int, both: bool) -> None:
        super().__init__()
        layer: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}[kind]
        self.front = nn.Linear(8, 32)
        self.recurrent = layer(32, hidden, bidirectional=both)
        self.head = nn.Linear(hidden * (1 + both), 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (steps, samples, 10) of rows (steps, samples, 8)."""
        out: torch.Tensor = self.head(self.recurrent(torch.relu(self.front(x)))[0])
        return out


def sequences(rng: np.random.Generator, images: Any, labels: Any, count: int) -> tuple[Any, Any]:
    """Rows (steps, samples, 8) and the digit at each row."""
    chosen = rng.integers(0, len(images), (count, IMAGES))
    rows = images[chosen].reshape(count, IMAGES * 8, 8).transpose(1, 0, 2)
    return rows.astype(np.float32), labels[chosen].repeat(8, axis=1).T


def trained(kind: str, hidden: int, both: bool, images: Any, labels: Any) -> bytes:
    """Train and export."""
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), Tagger(kind, hidden, both)
    steps = 500
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for _ in range(steps):
        x, y = sequences(rng, images, labels, 64)
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x)).flatten(0, 1), torch.from_numpy(y).flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    file: Any = io.BytesIO()
    example = torch.zeros(IMAGES * 8, 3, 8)
    torch.onnx.export(model.eval(), (example,), file, input_names=["x"], dynamic_axes={"x": {1: "N"}}, dynamo=False)
    return bytes(file.getvalue())


def accuracy(program: cipm_ir.Program, x: Any, y: Any) -> float:
    """Part of the rows whose digit is right."""
    with Runner(program.model, fast=True) as runner:
        (out,) = runner.run({"x": x}).values()
    return float((out.argmax(-1) == y).mean())


def main() -> None:
    """Train, compress, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=64)
    given = parser.parse_args()
    digits = load_digits()
    images, labels = digits.images / 16.0, digits.target
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1300], order[1300:]
    data = sequences(np.random.default_rng(1), images[train], labels[train], 256)[0]
    x, y = sequences(np.random.default_rng(2), images[test], labels[test], 500)
    batches = [{"x": data[:, k : k + 32]} for k in range(0, 256, 32)]
    print("| model | dense | compress | prune | seconds |\n| --- | --- | --- | --- | --- |")
    for kind, both in (("LSTM", False), ("GRU", False), ("LSTM", True), ("GRU", True)):
        program = cipm_ir.load(onnx.load_from_string(trained(kind, given.hidden, both, images[train], labels[train])))
        spaces = [s for s in program.spaces if s.size == given.hidden]
        half = {s: np.arange(int(given.keep * given.hidden)) for s in spaces}
        budget = program.restrict(half).parameters / program.parameters
        names = tuple(s.name for s in spaces)
        start = time.perf_counter()
        options: dict[str, Any] = {"params": budget, "include": names, "min_keep": 0.2}
        made = cipm_ir.optimize(program, [Compress(**options)], data=batches).program
        seconds = time.perf_counter() - start
        pruned = cipm_ir.optimize(program, [Prune(**options)], data=batches).program
        scores = (accuracy(p, x, y) for p in (program, made, pruned))
        widths = f"{kind}{' both ways' if both else ''}, {given.hidden} units"
        print(f"| {widths} | {' | '.join(f'{s:.4f}' for s in scores)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
