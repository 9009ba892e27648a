"""Statistics as ``.npz`` files: plain arrays and a header in JSON, nothing that is executed when it is read."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cipm_ir.errors import InputError, OutputError
from cipm_ir.runtime.moments import Cofiring, Marginals, Moments
from cipm_ir.runtime.moments_lagged import Lagged
from cipm_ir.runtime.sketch import Pairs, Sketch
from cipm_ir.runtime.statistics_rows import RowSample
from cipm_ir.runtime.statistics_store import SpaceStatistics, Statistics

_FORMAT = "cipm-ir statistics"
_VERSION = 1
_PARTS = {kind.__name__: kind for kind in (Moments, Marginals, Cofiring, Lagged, Sketch, Pairs, RowSample)}


def write(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write beside, then rename. Errors: `OutputError`; nothing is left behind."""
    header: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "samples": statistics.samples}
    header |= {"unseen": statistics.unseen, "spaces": []}
    arrays: dict[str, Any] = {}
    for k, (name, one) in enumerate(statistics.items()):
        parts = {}
        for j, (part_name, part) in enumerate(one.parts.items()):
            parts[part_name] = type(part).__name__
            arrays |= {f"{k}.{j}.{field}": array for field, array in part.state().items()}
        entry = {"name": name, "kind": one.kind, "size": one.size, "samples": one.samples}
        header["spaces"].append(entry | {"parts": parts, "readers": dict(one.readers)})
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    target = Path(path)
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise OutputError(f"The statistics could not be written to {os.fspath(path)!r}: {error.strerror}.") from error


def read(path: str | os.PathLike[str]) -> Statistics:
    """Read what `write` wrote. Errors: `InputError`."""
    shown = repr(os.fspath(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
        if header["format"] != _FORMAT:
            raise ValueError("another format")
        if header["version"] > _VERSION:
            raise InputError(f"{shown} was written by a newer version of cipm-ir; update this one to read it.")
        spaces = {entry["name"]: _space(entry, k, arrays) for k, entry in enumerate(header["spaces"])}
        return Statistics(spaces, int(header["samples"]), header["unseen"])
    except FileNotFoundError:
        raise InputError(f"There is no file {shown} with statistics.") from None
    except InputError:
        raise
    except Exception as error:  # zip, JSON and numpy each raise their own kinds on a damaged file
        raise InputError(f"{shown} is not a file of statistics, or is damaged; collect them again.") from error


def _space(entry: dict[str, Any], number: int, arrays: dict[str, Any]) -> SpaceStatistics:
    parts = {}
    for j, (name, kind) in enumerate(entry["parts"].items()):
        prefix = f"{number}.{j}."
        state = {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}
        parts[name] = _PARTS[kind].restore(state)
    return SpaceStatistics(entry["name"], entry["kind"], entry["size"], entry["samples"], parts, entry["readers"])
