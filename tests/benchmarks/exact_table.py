"""A table of models and exact passes: how far the outputs move, what the verification says, and what both cost.

    python -m tests.benchmarks.exact_table FOLDER [FOLDER...] [--passes NAME,...] [--data FOLDER] [--timeout 600]

Each model is read in a process of its own, limited in memory, and each pass runs in a fork of that, limited in time:
its memory is what it adds to the model that was read. Every exact pass of the registry with its default options, and
the default passes one after the other. `--data` holds realistic inputs, `MODEL.npz` for some of the models; the
verification gets them too. The outputs and the rounding of the model are measured once for all passes.

The last columns are a measure of their own: the largest difference on random inputs of several sizes, zeros, ones and
waves, and the same as a multiple of the model's own rounding per channel. Above 16 times that, a run in double
precision decides: "WRONG" where the difference stays, "rounding" where it goes. "REFUSED": the verification says that
a result differs, and this measure says that it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tests.benchmarks.forked import Row, forked, growth, lines_of
from tests.benchmarks.rounding import Reference, nudged, widen
from tests.oracles.double_precision import NEAR, Double, Feeds, NoDoubleError, by_channel, probes

import cipm_ir
from cipm_ir.api import DEFAULT_PASSES
from cipm_ir.passes.framework import registry
from cipm_ir.runtime.inputs.generate import batches
from cipm_ir.runtime.verification.verify import Verifier
from cipm_ir.symmetry.program import Program

_MEASURED = "model", "pass", "changed", "pass s", "verification s", "max abs", "relative", "verdict"
_COLUMNS = (*_MEASURED, "own max abs", "times rounding", "added MB", "")
_INPUTS = ("normal", "normal x 0.1", "normal x 10", "all 0", "all 1", "waves")
_ULP = 2.0**-23
_DRAWS = 5
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


def rows(path: Path, passes: Sequence[str], data: Path | None, seconds: float) -> Iterator[Row]:
    """Measure every pass on one model, each in a fork of this process; those that change nothing come first.

    Args:
        path: of the model.
        passes: their names.
        data: a realistic input.
        seconds: after so many a measurement of one pass is stopped, and the row says so.
    """
    program = cipm_ir.load(str(path))
    before = program.emit()
    changed: list[tuple[str, Row]] = []
    for name in passes:
        row: Row = {"model": path.stem, "pass": name, "changed": "", "note": ""}
        row |= forked(lambda name=name: applied(program, name), seconds)  # type: ignore[misc]
        if row["changed"] is True:
            changed.append((name, row))
        else:
            yield _told(row)
    if not changed:
        return
    # What all comparisons share is measured once, and handed to the forks.
    verifier = Verifier(before, data=data)
    try:
        verifier.check(nudged(before, np.random.default_rng(11)))
        reference: Reference | str = Reference.of(ir.load(path), inputs(ir.load(path), data))
    except Exception as error:
        reference = f"own runs failed: {type(error).__name__} {str(error)[:120]}"
    for name, row in changed:
        yield _told(row | forked(lambda name=name: judged(program, before, name, verifier, reference), seconds))  # type: ignore[misc]


def _told(row: Row) -> Row:
    """A row whose trouble is its verdict."""
    trouble = f"CRASH {row['crash']}" if "crash" in row else row.get("refused")
    return row | ({"verdict": trouble} if trouble else {})


def applied(program: Program, name: str) -> Row:
    """Run a pass without verification."""
    result = cipm_ir.optimize(program, name.split("+"), verify=False)
    changed = any(step.changed for step in result.report.steps)
    made: Row = {"changed": changed, "seconds": sum(step.seconds for step in result.report.steps), "memory": growth()}
    return made if changed else made | {"verdict": "unchanged"}


def judged(program: Program, before: ir.Model, name: str, verifier: Verifier, reference: Reference | str) -> Row:
    """Run a pass, verify its result, and compare it by our own measure."""
    after = cipm_ir.optimize(program, name.split("+"), verify=False).program.emit()
    found = verifier.check(after)
    made: Row = {"verification": found.seconds, "max_abs": found.max_abs, "max_rel": found.max_rel}
    made["verdict"] = "equal" if found.ok else str(found)[:160]
    if isinstance(reference, str):
        return made | {"note": reference}
    largest, multiple, where = reference.distance(after)
    note = f"WRONG ({where})" if multiple > NEAR else ""
    if note and np.isfinite(multiple):
        note = in_double(before, after, reference) or note
    if found.ok is False and not note.startswith("WRONG"):
        note = f"REFUSED {note}"
    return made | {"own_abs": largest, "own_times": multiple, "note": note}


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
        # One that has a coarse grid there (a sigmoid, multiples of 6e-8) may show none in single precision; how far the
        # rounding of weights moves it shows in double precision. By few draws, one of a thousand channels hardly moves.
        for draw in range(_DRAWS):
            moved = Double(nudged(before, np.random.default_rng([7, draw])))
            for noise, wide, (_, feeds) in zip(rounding, outputs, reference.feeds, strict=True):
                widen(noise, wide, moved.run(feeds))
        largest, multiple, _ = Reference(reference.feeds, outputs, rounding).distance(after, Double(after))
    except NoDoubleError:
        return ""
    return f"rounding: {largest:.2g} in double precision" if multiple <= NEAR else ""


def apart(path: Path, passes: Sequence[str], data: Path | None, timeout: float, gigabytes: int) -> Iterator[Row]:
    """Yield `rows` of a process of its own as they come; what it did not reach is reported with the reason."""
    command = [sys.executable, "-m", "tests.benchmarks.exact_table", str(path), "--one", "--passes", ",".join(passes)]
    command += ["--timeout", str(timeout)] + (["--data", str(data)] if data is not None else [])
    done = set()
    for row in lines_of(command, 2 * timeout * (len(passes) + 1), gigabytes):
        if "pass" in row:
            done.add(row["pass"])
            yield row
        else:
            for name in passes:
                if name not in done:
                    yield {"model": path.stem, "pass": name, "changed": "", "verdict": row["crash"], "note": "NOT RUN"}


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
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one pass, and for its verification")
    parser.add_argument("--memory", type=int, default=12, help="gigabytes of address space for one model")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    passes = given.passes.split(",")
    if given.one:
        warnings.simplefilter("ignore")
        for row in rows(given.paths[0], passes, given.data, given.timeout):
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
