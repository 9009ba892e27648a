"""Statistics as ``.npz`` files: plain arrays and a header in JSON, nothing that is executed when it is read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cipm_ir.errors import InputError, OutputError
from cipm_ir.runtime.statistics.lagged import Lagged
from cipm_ir.runtime.statistics.moments import Cofiring, Marginals, MergeableStatistic, Moments
from cipm_ir.runtime.statistics.rows import RowSample
from cipm_ir.runtime.statistics.sketch import Pairs, Sketch

_Built = TypeVar("_Built")

_FORMAT = "cipm-ir statistics"
_VERSION = 1
_PARTS = {kind.__name__: kind for kind in (Moments, Marginals, Cofiring, Lagged, Sketch, Pairs, RowSample)}


def write(
    path: str | os.PathLike[str], facts: Mapping[str, Any], parts: Sequence[Mapping[str, MergeableStatistic]]
) -> None:
    """Write beside, then rename.

    Args:
        path: of the file.
        facts: what JSON can hold.
        parts: of each space, by name.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    arrays: dict[str, Any] = {}
    kinds = []
    for k, own in enumerate(parts):
        kinds.append({name: type(part).__name__ for name, part in own.items()})
        for j, part in enumerate(own.values()):
            arrays |= {f"{k}.{j}.{field}": array for field, array in part.state().items()}
    header = {"format": _FORMAT, "version": _VERSION, "parts": kinds, **facts}
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


def read(
    path: str | os.PathLike[str],
    build: Callable[[Mapping[str, Any], Sequence[Mapping[str, MergeableStatistic]]], _Built],
) -> _Built:
    """Read what `write` wrote; ``build`` makes the result of facts and parts.

    Raises:
        InputError: the model or the data cannot be used.
    """
    shown = repr(os.fspath(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
        if header["format"] != _FORMAT:
            raise ValueError("another format")
        if header["version"] > _VERSION:
            raise InputError(f"{shown} was written by a newer version of cipm-ir; update this one to read it.")
        return build(header, [_parts(kinds, k, arrays) for k, kinds in enumerate(header["parts"])])
    except FileNotFoundError:
        raise InputError(f"There is no file {shown} with statistics.") from None
    except InputError:
        raise
    except Exception as error:  # zip, JSON and numpy each raise their own kinds on a damaged file
        raise InputError(f"{shown} is not a file of statistics, or is damaged; collect them again.") from error


def _parts(kinds: Mapping[str, str], number: int, arrays: Mapping[str, Any]) -> dict[str, MergeableStatistic]:
    parts: dict[str, MergeableStatistic] = {}
    for j, (name, kind) in enumerate(kinds.items()):
        prefix = f"{number}.{j}."
        state = {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}
        parts[name] = _PARTS[kind].restore(state)
    return parts
