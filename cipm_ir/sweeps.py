"""`sweep`: one model for each of several budgets, what each costs and how good it is, and which of them are worth it.

Every finished point is in ``sweep.json`` before the next begins, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from cipm_ir import api
from cipm_ir.errors import InputError, OptionError, OutputError, SymmetryError, UnsupportedError, VerificationError
from cipm_ir.passes.framework.base import Progress, ignore_progress
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.passes.framework.report import Totals
from cipm_ir.passes.framework.sweep_report import Point, SweepReport, read_record, write_files, write_picture
from cipm_ir.passes.pruning.compress.search import Evaluate, Run
from cipm_ir.runtime.content import data_hash, model_hash
from cipm_ir.runtime.files import write_text
from cipm_ir.runtime.inputs.batch_size import fit_batch
from cipm_ir.runtime.inputs.data_sizes import data_sizes
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.timing import compare_latency, timing_feeds
from cipm_ir.runtime.verification.closeness import Closeness, closeness
from cipm_ir.sources import OnnxOrigin, Source, normalize_data, origin_of
from cipm_ir.symmetry.program import Program
from cipm_ir.version import __version__

BUDGETS = ("macs", "params", "bytes", "latency")
_COMPARED = 1024
"""Samples that outputs are compared on, at most."""
_PLACE = r"(?<=[{{,])(\s*)(?:(?:{}\s*=\s*)?\{{budget\}}|budget)(?=\s*[,}}])"


def sweep(
    source: Source,
    *,
    output_folder: str | os.PathLike[str],
    budgets: Sequence[float] = (0.9, 0.8, 0.7, 0.5),
    budget: str = "macs",
    passes_template: str = "compress",
    data: Data | None = None,
    held_out: Data | None = None,
    evaluate: Evaluate | None = None,
    threads: int | None = 1,
    batch: int = 1,
    seed: int = 0,
    verify: bool = True,
    progress: Progress | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> SweepReport:
    """Make a model for each budget, compare it with the dense one, and mark the Pareto-optimal ones.

    Writes into the folder: the models, ``sweep.json`` (the record), ``sweep.csv``, and ``sweep.svg`` where matplotlib
    is installed. A point of an earlier record is reused if its file, the model, the data, the options and
    the version are unchanged. A budget that is out of reach is a point too, with the reason.

    Args:
        source: see `cipm_ir.sources.Source`; never changed.
        output_folder: made where it is missing.
        budgets: fractions of the dense model that may remain.
        budget: fractions of what: "macs", "params", "bytes" or "latency"; the passes must have an option of this name.
        passes_template: passes in text form. The budget goes where ``{budget}`` stands, as in
            ``"fold-batch-norm, prune{macs={budget}, round_to=8}"``, or else into the last pass.
        data: calibration input, see `cipm_ir.optimize`; not an iterator.
        held_out: inputs on which outputs are compared with the dense model's; None: the calibration data.
        evaluate: scores a model, more is better; as for `compress` a function of ``run``, which takes arrays by input
            name and gives arrays by output name. Without it the difference of the outputs decides.
        threads: of onnxruntime, when latency is measured; None: it is not.
        batch: samples in a run, when latency is measured.
        seed: of everything random.
        verify: see `cipm_ir.optimize`.
        progress: called with what is being done and the fraction done.
        example_inputs, example_kwargs: how to read a torch program, see `cipm_ir.load`.

    Raises:
        OptionError: an option is unknown or out of range.
        InputError: the model, the data or an earlier record cannot be used.
        OutputError: a file cannot be written. Points that are finished are kept.
    """
    values = _checked(budgets, budget)
    if data is None and held_out is None and evaluate is None:
        raise InputError("A sweep compares models: give data= (inputs to compare outputs on) or evaluate=.")
    if threads is None and budget == "latency":
        raise OptionError("A sweep over latency measures it: give a number of threads.")
    texts = {value: passes_for(passes_template, budget, value) for value in values}
    program = api.load(source, example_inputs, example_kwargs)
    data, held_out = normalize_data(data, program), normalize_data(held_out, program)
    hashes = data_hash(data), data_hash(held_out)
    fit_batch(program.model, data if data is not None else held_out)
    folder = Path(os.path.abspath(output_folder))
    _prepare(folder)
    earlier = read_record(folder / "sweep.json")
    settings = {
        "cipm": __version__, "model": model_hash(program.source_model), "data": hashes[0], "held_out": hashes[1],
        "evaluate": _identity(evaluate), "passes": passes_template, "budget": budget,
        "threads": threads, "batch": batch, "seed": seed, "verify": verify,
    }  # fmt: skip
    work = _Work(
        program, folder, budget, settings, data, held_out, evaluate, threads, batch, seed, verify,
        progress or ignore_progress,
    )  # fmt: skip
    return work.run(texts, earlier)


def passes_for(template: str, budget: str, value: float) -> str:
    """Return the passes for one budget, in text form; see `sweep`.

    Raises:
        OptionError: the result cannot be read, or the last pass has no such option.
    """
    if (other := re.search(r"(\w+)\s*=\s*\{budget\}", template)) and other[1] != budget:
        raise OptionError(
            f"The sweep is over {budget}, but the passes give the budget to {other[1]}; "
            f"sweep over {other[1]}, or write {budget}={{budget}}."
        )
    given = f"{budget}={value:.10g}"
    text, count = re.subn(_PLACE.format(budget), rf"\g<1>{given}", template)
    if not count:
        head = template.rstrip()
        if not head.endswith("}"):
            text = f"{head}{{{given}}}"
        else:
            inside = head[:-1].rstrip()
            text = f"{inside}{'' if inside.endswith(('{', ',')) else ', '}{given}}}"
    parse_passes(text)
    return text


@dataclass
class _Work:
    """One sweep: what it needs, and what it found so far."""

    program: Program
    folder: Path
    budget: str
    settings: Mapping[str, Any]
    data: Data | None
    held_out: Data | None
    evaluate: Evaluate | None
    threads: int | None
    batch: int
    seed: int
    verify: bool
    progress: Progress
    notes: list[str] = field(default_factory=list)
    plans: dict[Any, Any] = field(default_factory=dict)

    def run(self, texts: Mapping[float, str], earlier: tuple[Point, list[Point]] | None) -> SweepReport:
        """Return all points, each recorded as soon as it is there."""
        known = {} if earlier is None else {p.key: p for p in (earlier[0], *earlier[1]) if self._intact(p)}
        dense_key = self._key("")
        keys = {value: self._key(text) for value, text in texts.items()}
        again = sum(key in known for key in keys.values())
        if earlier is not None and earlier[0].key != dense_key:
            self.notes.append("The record of an earlier sweep with another model, data or options was replaced.")
        dense = known.get(dense_key) or self._dense(dense_key)
        # Budgets of an earlier run that were not asked for again stay on the same curve.
        points = {p.budget: p for p in known.values() if p.status != "dense" and p.key == self._key(p.passes)}
        report = SweepReport(self.budget, dense, tuple(points.values()), reused=again)
        report = self._recorded(report)
        for number, (value, text) in enumerate(texts.items(), 1):
            if keys[value] not in known:
                points[value] = self._point(value, text, f"{self.budget}={value:g} ({number} of {len(texts)})")
                report = self._recorded(replace(report, points=tuple(points.values())))
        write_picture(report, self.folder)
        return report

    def _recorded(self, report: SweepReport) -> SweepReport:
        report = replace(report, notes=(*self._described(report), *self.notes)).flagged()
        write_files(report, self.folder, self.settings)
        return report

    def _described(self, report: SweepReport) -> Iterator[str]:
        if report.dense.difference is not None:
            where = "the held-out data" if self.held_out is not None else "the calibration data itself"
            yield f"outputs were compared with the dense model's on {where}, at most {_COMPARED} samples"
        judge = "score" if self.evaluate is not None else "difference of the outputs"
        yield f"Pareto: by {self.budget} and {judge}"
        if self.threads is not None and report.dense.latency is not None:
            yield (
                f"latency: onnxruntime on the CPU, threads {self.threads}, batch {self.batch}, the least of "
                "interleaved runs; in brackets against the dense model in the same measurement"
            )
        if not _has_matplotlib():
            yield 'no picture: it needs matplotlib, pip install "cipm-ir[html]"'

    # ------------------------------------------------------------ points
    def _dense(self, key: str) -> Point:
        self.progress("the dense model", 0.0)
        point = self._judged(self._sized(Point(1.0, "dense", key=key), self.program), self.program)
        if point.difference is not None and not math.isfinite(point.difference):
            which = "held-out" if self.held_out is not None else "calibration"
            raise InputError(
                f"The outputs of the model are NaN or infinite on some of the {which} data, so nothing can be compared "
                "with them; repair the data, or leave these samples out."
            )
        return point

    def _point(self, value: float, text: str, what: str) -> Point:
        def show(doing: str, fraction: float | None) -> None:
            self.progress(f"{what}: {doing}", fraction)

        show("start", 0.0)
        start = time.perf_counter()
        point = Point(value, "done", text, key=self._key(text))
        try:
            result = api.optimize(
                self.program,
                text,
                data=self.data,
                verify=self.verify,
                seed=self.seed,
                progress=show,
                options={"plans": self.plans},
            )
        except (SymmetryError, VerificationError) as error:
            status = "impossible" if isinstance(error, SymmetryError) else "failed"
            return replace(point, status=status, reason=str(error), seconds=time.perf_counter() - start)
        path = self.folder / f"{self.budget}-{value:.10g}{self._suffix}"
        result.save(path)
        point = replace(
            self._sized(point, result.program),
            file=path.name,
            seconds=time.perf_counter() - start,
            summary="; ".join(step.summary for step in result.report.steps if step.summary),
            digest=_digest(path),
        )
        show("compare", None)
        return self._judged(point, result.program)

    def _judged(self, point: Point, program: Program) -> Point:
        """Return the point with its latency, its closeness to the dense model and its score."""
        latency, relative = self._latency(program)
        close = self._closeness(program)
        return replace(
            point,
            latency=latency,
            relative=relative,
            score=None if self.evaluate is None else self._score(self.evaluate, program, point.budget),
            difference=None if close is None else close.difference,
            agreement=None if close is None else close.agreement,
        )

    def _score(self, evaluate: Evaluate, program: Program, budget: float) -> float:
        with _running(program) as run:
            score = evaluate(run)
        if not isinstance(score, int | float | np.number) or not math.isfinite(score):
            raise OptionError(f"evaluate must give a finite number; for budget {budget:g} it gave {score!r}.")
        return float(score)

    def _latency(self, program: Program) -> tuple[float | None, float | None]:
        if self.threads is None:
            return None, None
        samples = self.data if self.data is not None else self.held_out
        try:
            models = [self.program.emit(), program.emit()][: 1 if program is self.program else 2]
            feeds = timing_feeds(models[0], samples, batch=self.batch, seed=self.seed)
            timings = compare_latency(models, feeds, threads=self.threads, noise=0.01, seconds=10.0)
        except UnsupportedError as error:
            if self.budget == "latency":
                raise
            note = f"latency was not measured: {error}"
            self.notes += [] if note in self.notes else [note]
            return None, None
        return timings.seconds[-1], timings.seconds[-1] / timings.seconds[0]

    def _closeness(self, program: Program) -> Closeness | None:
        samples = self.held_out if self.held_out is not None else self.data
        if samples is None:
            return None
        seen = 0

        def few(feeds: Feeds) -> bool:
            nonlocal seen
            seen += max((len(array) for array in feeds.values() if array.ndim), default=1)
            return seen <= _COMPARED

        feeds = takewhile(few, batches(samples, self.program.model, 64))
        with _running(self.program) as first, _running(program) as second:
            return closeness(first, second, feeds)

    # ------------------------------------------------------------ files and keys
    @property
    def _suffix(self) -> str:
        return ".onnx" if isinstance(origin_of(self.program), OnnxOrigin) else ".pt2"

    def _sized(self, point: Point, program: Program) -> Point:
        totals = Totals.of(program, data_sizes(self.program.model, self.data))
        return replace(point, macs=totals.macs, params=totals.parameters, bytes=totals.bytes)

    def _key(self, passes: str) -> str:
        return hashlib.sha256(json.dumps([self.settings, passes], sort_keys=True).encode()).hexdigest()

    def _intact(self, point: Point) -> bool:
        """Return whether a recorded point need not be made again: its file is as it was written."""
        if point.status != "done":
            return point.status != "failed"
        return _digest(self.folder / point.file) == point.digest


@contextmanager
def _running(program: Program) -> Iterator[Run]:
    """A program ready to run: in torch where it came from there."""
    origin = origin_of(program)
    if isinstance(origin, OnnxOrigin):
        with Runner(program.emit(), fast=True) as runner:
            yield runner.run
    else:
        graph = origin.graph(program.emit())
        yield lambda feeds: origin.run(graph, dict(feeds))


def _checked(budgets: Sequence[float], budget: str) -> list[float]:
    if budget not in BUDGETS:
        raise OptionError(f"The budget of a sweep is one of {', '.join(BUDGETS)}, not {budget!r}.")
    values = [float(value) for value in budgets]
    bad = next((value for value in values if not 0 < value <= 1), None)
    if bad is not None:
        raise OptionError(f"A budget is the fraction that may remain, above 0 and at most 1; {bad:g} is not.")
    if not values:
        raise OptionError("A sweep needs at least one budget.")
    return sorted(set(values), reverse=True)


def _prepare(folder: Path) -> None:
    """Make the folder, and try to write into it before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {str(folder)!r} cannot be made: {error.strerror}; choose another.") from error
    trial = folder / ".sweep-trial"
    write_text(trial, "")
    trial.unlink(missing_ok=True)


def _identity(evaluate: Evaluate | None) -> str:
    """Return a name for a function that changes when its code does; data that it holds is not seen."""
    if evaluate is None:
        return "none"
    code = getattr(evaluate, "__code__", None)
    name = f"{getattr(evaluate, '__module__', '')}.{getattr(evaluate, '__qualname__', type(evaluate).__qualname__)}"
    if code is None:
        return name
    return f"{name} {hashlib.sha256(repr(_code(code)).encode()).hexdigest()[:16]}"


def _code(code: Any) -> list[Any]:
    """Return what a function does, without where it stands: functions inside it as well."""
    inner = [_code(c) if hasattr(c, "co_code") else c for c in code.co_consts]
    return [code.co_code, inner, code.co_names]


def _digest(path: Path) -> str:
    """Return a hash of a model file with its external data; "" where it is missing."""
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    for part in (path, path.with_name(path.name + ".data")):
        if part.is_file():
            digest.update(str(part.stat().st_size).encode())
            with open(part, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None
