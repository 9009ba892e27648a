"""The models on which the soundness, completeness and pruning suites run: seeded, deterministic, built on demand.

`names(tag)` lists, `entry(name)` tells what is expected, `build(name)` makes the ModelProto, `feeds` and `run` execute.

Tags, by family: "light" (refilled) and "constant" (as shipped, weights made by ConstantOfShape), "graphs", "cifar",
"minilm", "synthetic". A synthetic model also has one of "mlp", "conv", "norm", "layout", "attention", "branch",
"reduce", "recurrent", "quantized", "control". By property: "pins" (something must not move), "opaque" (an operator
without a rule), "large" (about 100 MB of weights or more), "data" (needs CIPM_TEST_DATA), "torch" (needs torch and
transformers), "reference" (no kernels in onnxruntime: use the reference evaluator), "faint" (the output hardly
depends on the input, so a differential run proves nothing: use the model's "_revived" copy), "float64", "float16".
"""

from __future__ import annotations

import onnx
import pytest
from tests.zoo import (
    attention,
    branch,
    control,
    conv,
    exported,
    layout,
    light,
    minilm,
    mlp,
    norm,
    quantized,
    recurrent,
    reduce,
)
from tests.zoo.feeds import feeds, run, runs
from tests.zoo.registry import Entry, UnavailableError, entries

FAMILIES = (
    light,
    exported,
    minilm,
    mlp,
    conv,
    norm,
    layout,
    attention,
    branch,
    reduce,
    recurrent,
    quantized,
    control,
)


def names(tag: str | None = None, *, without: tuple[str, ...] = ()) -> list[str]:
    """Names of all models, or of those that carry `tag` and none of `without`."""
    chosen = [e for e in entries().values() if tag is None or tag in e.tags]
    return [e.name for e in chosen if not e.tags.intersection(without)]


def entry(name: str) -> Entry:
    """What is known about a model; KeyError for an unknown name."""
    return entries()[name]


def build(name: str) -> onnx.ModelProto:
    """A fresh copy of the model; UnavailableError where its data or packages are missing."""
    return entries()[name].builder()


def build_or_skip(name: str) -> onnx.ModelProto:
    """`build`, or skip the running test with the reason why the model is unavailable."""
    try:
        return build(name)
    except UnavailableError as error:
        pytest.skip(str(error))


__all__ = [
    "FAMILIES",
    "Entry",
    "UnavailableError",
    "build",
    "build_or_skip",
    "entries",
    "entry",
    "feeds",
    "names",
    "run",
    "runs",
]
