"""A table of models and exact passes: how far the outputs move, what the verification says, and what both cost.

    python -m tests.benchmarks.exact_table FOLDER [FOLDER...] [--passes NAME,...] [--data FOLDER] [--timeout 600]

Each model runs in a process of its own, limited in time and memory. Every exact pass of the registry with its default
options, and the default passes one after the other. `--data` holds realistic inputs, `MODEL.npz` for some of the
models; the verification gets them too.

The last columns are a measure of their own: the largest difference on random inputs of several sizes, zeros, ones and
waves, and the same as a multiple of the model's own rounding per channel. Above 16 times that, a run in double
precision decides: "WRONG" where the difference stays, "rounding" where it goes. "REFUSED": the verification says that
a result differs, and this measure says that it does not.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tests.benchmarks.rounding import Reference
from tests.double_precision import NEAR, Double, Feeds, NoDoubleError, by_channel, probes

import cipm_ir
from cipm_ir.api import DEFAULT_PASSES
from cipm_ir.errors import CipmError
from cipm_ir.passes import registry
from cipm_ir.runtime.inputs import batches
from cipm_ir.runtime.verify import verify_models

_MEASURED = "model", "pass", "changed", "pass s", "verification s", "max abs", "relative", "verdict"
_COLUMNS = (*_MEASURED, "own max abs", "times rounding", "peak MB", "")
_INPUTS = ("normal", "normal x 0.1", "normal x 10", "all 0", "all 1", "waves")
_ULP = 2.0**-23
DEFAULT = "+".join(DEFAULT_PASSES)


def exact_passes() -> list[str]:
    """Names of the exact passes, and the default ones together."""
    return [one.name for one in registry.listing() if one.kind == "exact"] + [DEFAULT]


def inputs(model: ir.Model, data: Path | None) -> list[tuple[str, Feeds]]:
    """One input of each sort, and one batch of the given ones."""
    found: dict[str, Feeds] = {}
    if data is not None:
        found["given"] = next(batches(data, model))
    try:
        for name, feeds in probes(model):
            if name in _INPUTS:
                found.setdefault(name, feeds)
    except Exception:
        if data is None:
            raise
    return list(found.items())


def rows(path: Path, passes: Sequence[str], data: Path | None) -> Iterator[dict[str, Any]]:
    """Measure every pass on one model."""

    @functools.cache
    def reference() -> Reference | str:
        # Made when it is first needed: its runs are no part of the memory of the first pass.
        try:
            original = ir.load(path)
            return Reference.of(original, inputs(original, data))
        except Exception as error:
            return f"own runs failed: {type(error).__name__} {str(error)[:120]}"

    for name in passes:
        row: dict[str, Any] = {"model": path.stem, "pass": name, "changed": "", "note": ""}
        try:
            row |= measure(path, name, data, reference)
        except CipmError as error:
            row["verdict"] = f"{type(error).__name__}: {str(error)[:160]}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            row["verdict"] = (
                f"CRASH {type(error).__name__}: {str(error)[:120]} ({Path(place.filename).name}:{place.lineno})"
            )
        yield row


def peak() -> float:
    """Return the most memory that this process held so far, in MB; not that of the process which started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def measure(path: Path, name: str, data: Path | None, reference: Callable[[], Reference | str]) -> dict[str, Any]:
    """Run a pass without verification, then the verification alone, then our own comparison."""
    program = cipm_ir.load(str(path))
    before = program.emit()
    result = cipm_ir.optimize(program, name.split("+"), verify=False)
    changed = any(step.changed for step in result.report.steps)
    made: dict[str, Any] = {"changed": changed, "seconds": sum(step.seconds for step in result.report.steps)}
    if not changed:
        return made | {"verdict": "unchanged", "memory": peak()}
    after = result.program.emit()
    start = time.perf_counter()
    found = verify_models(before, after, data=data)
    made["verification"] = time.perf_counter() - start
    made["memory"] = peak()
    made |= {"max_abs": found.max_abs, "max_rel": found.max_rel, "verdict": "equal" if found.ok else str(found)[:160]}
    known = reference()
    if isinstance(known, str):
        made["note"] = known
    else:
        largest, multiple, where = known.distance(after)
        note = f"WRONG ({where})" if multiple > NEAR else ""
        if note and np.isfinite(multiple):
            note = in_double(before, after, known) or note
        if found.ok is False and not note.startswith("WRONG"):
            note = f"REFUSED {note}"
        made |= {"own_abs": largest, "own_times": multiple, "note": note}
    return made


def in_double(before: ir.Model, after: ir.Model, reference: Reference) -> str:
    """Say that a difference is rounding where it goes away in double precision; "" where it stays or cannot be run."""
    try:
        runner = Double(before)
        outputs = [runner.run(feeds) for _, feeds in reference.feeds]
        # A saturated output that is 0 in single precision has no rounding there, but a size in double precision.
        rounding = [
            {key: noise + _ULP * by_channel(np.abs(wide[key])) for key, noise in known.items()}
            for known, wide in zip(reference.rounding, outputs, strict=True)
        ]
        largest, multiple, _ = Reference(reference.feeds, outputs, rounding).distance(after, Double(after))
    except NoDoubleError:
        return ""
    return f"rounding: {largest:.2g} in double precision" if multiple <= NEAR else ""


def apart(
    path: Path, passes: Sequence[str], data: Path | None, timeout: int, gigabytes: int
) -> Iterator[dict[str, Any]]:
    """`rows` in a process of its own; what it did not reach is reported with the reason."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))

    command = [sys.executable, "-m", "tests.benchmarks.exact_table", str(path), "--one", "--passes", ",".join(passes)]
    command += ["--data", str(data)] if data is not None else []
    start, done = time.monotonic(), set()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    ) as child:
        assert child.stdout is not None
        ended = "ended early"
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            ended = f"no result after {timeout} s"
        for line in out.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                done.add(row["pass"])
                yield row
        for name in passes:
            if name not in done:
                last = err.strip().splitlines()[-1][:120] if err.strip() else ""
                reason = f"{ended} ({time.monotonic() - start:.0f} s, status {child.returncode}) {last}"
                yield {"model": path.stem, "pass": name, "changed": "", "verdict": reason, "note": "NOT RUN"}


def _line(row: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    cells = [row["model"], row["pass"], str(row["changed"]), number("seconds", ".2f"), number("verification", ".2f")]
    cells += [number("max_abs", ".2g"), number("max_rel", ".2g"), str(row.get("verdict", "")).replace("|", "\\|")]
    cells += [number("own_abs", ".2g"), number("own_times", ".2g"), number("memory", ".0f"), row.get("note", "")]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and a count of what is wrong and what is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="folders, or .onnx files")
    parser.add_argument("--passes", default=",".join(exact_passes()))
    parser.add_argument("--data", type=Path, help="folder of MODEL.npz")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one model")
    parser.add_argument("--memory", type=int, default=12, help="gigabytes of address space for one model")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    passes = given.passes.split(",")
    if given.one:
        warnings.simplefilter("ignore")
        for row in rows(given.paths[0], passes, given.data):
            print(json.dumps(row), flush=True)
        return
    files = [file for path in given.paths for file in (sorted(path.glob("*.onnx")) if path.is_dir() else [path])]
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    notes: Counter[str] = Counter()
    for file in files:
        data = given.data / f"{file.stem}.npz" if given.data else None
        for row in apart(file, passes, data if data and data.is_file() else None, given.timeout, given.memory):
            print(_line(row), flush=True)
            verdict = str(row.get("verdict", ""))
            known = verdict in ("equal", "unchanged")
            notes[row.get("note", "").split(" (")[0] or (verdict if known else verdict.split(":")[0])] += 1
    print("\n" + ", ".join(f"{count} {note}" for note, count in notes.most_common()))


if __name__ == "__main__":
    main()
