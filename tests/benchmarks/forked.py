"""Measurements in forks of one process: each limited in time, with a peak of memory of its own, and no second start."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from cipm_ir.errors import CipmError

Row: TypeAlias = dict[str, Any]

_CONTEXT = multiprocessing.get_context("fork")


def forked(measure: Callable[[], Row], seconds: float) -> Row:
    """Return what a function gives in a fork of this process; every error becomes a row.

    Rows of trouble have the key "refused" (an error of ours) or "crash" (any other, no result in time, a death).

    Args:
        measure: what to run.
        seconds: after so many the fork is killed.
    """
    mine, other = _CONTEXT.Pipe(duplex=False)
    child = _CONTEXT.Process(target=_child, args=(measure, other), daemon=True)
    child.start()
    other.close()
    try:
        row: Row = mine.recv() if mine.poll(seconds) else {"crash": f"no result after {seconds:g} s"}
    except EOFError:
        child.join()
        row = {"crash": f"the process ended with status {child.exitcode}"}
    child.kill()
    child.join()
    return row


def _child(measure: Callable[[], Row], out: Connection) -> None:
    global _START
    # What a fork begins with; the kernel sets its peak to that.
    _START = _status("VmRSS")
    row: Row
    try:
        row = measure()
    except CipmError as error:
        row = {"refused": f"{type(error).__name__}: {str(error)[:200]}"}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row = {"crash": f"{type(error).__name__}: {str(error)[:160]} ({Path(place.filename).name}:{place.lineno})"}
    out.send(row)
    out.close()
    os._exit(0)  # threads that the parent had are gone, and nothing is to be cleaned up


def lines_of(command: Sequence[str], seconds: float, gigabytes: int) -> Iterator[Row]:
    """Yield the rows that a command prints, one JSON object a line, as they come; "crash" where it did not end well.

    Args:
        command: what to run.
        seconds: after so many it is killed.
        gigabytes: of address space that it may have.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))

    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=limit)
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        assert child.stdout is not None
        with child:
            yield from (json.loads(line) for line in child.stdout if line.startswith("{"))
        late = not timer.is_alive()
        timer.cancel()
        if child.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1][:160]
            yield {"crash": f"no end after {seconds:g} s" if late else f"status {child.returncode} {last}"}


def growth() -> float:
    """Return how far the memory of this fork rose above what it was forked with, at most, in MB."""
    return max(_status("VmHWM") - _START, 0.0)


_START = 0.0


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
