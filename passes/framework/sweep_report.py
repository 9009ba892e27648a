"""What a sweep found: its points, which of them nothing else beats, and the files that say so.

``sweep.json`` is the record that a later run goes on from, ``sweep.csv`` the same as a table, ``sweep.svg`` a picture.
Each is written beside its place and then renamed, so that whatever stops the program leaves whole files.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cipm_ir.errors import InputError
from cipm_ir.passes.framework.report import as_plain
from cipm_ir.runtime.files import write_text

FORMAT = 1
_WIDTH = 118


@dataclass(frozen=True)
class Point:
    """One model of a sweep.

    Attributes:
        budget: the fraction that was asked for; 1 for the model that came in.
        status: "dense" (the model that came in), "done", "impossible" (the budget is out of reach) or "failed".
        passes: what was run, in text form.
        file: the model, relative to the folder of the sweep; empty where none was written.
        macs, params, bytes: sizes.
        latency: seconds of one run in onnxruntime; None where it was not measured.
        relative: that over the dense model's in the same measurement.
        score: what ``evaluate`` gave; None without it.
        difference, agreement: of the outputs with the dense model's, see
            `cipm_ir.runtime.verification.closeness.Closeness`.
        seconds: that it took to make.
        summary: what the passes say that they did.
        reason: why there is no model.
        pareto: no other point is at least as small and as good, and better in one of the two.
        key: a hash of all that the point depends on.
        digest: a hash of the file.
    """

    budget: float
    status: str
    passes: str = ""
    file: str = ""
    macs: int = 0
    params: int = 0
    bytes: int = 0
    latency: float | None = None
    relative: float | None = None
    score: float | None = None
    difference: float | None = None
    agreement: float | None = None
    seconds: float = 0.0
    summary: str = ""
    reason: str = ""
    pareto: bool = False
    key: str = ""
    digest: str = ""

    @property
    def made(self) -> bool:
        """There is a model."""
        return self.status in ("dense", "done")

    def cost(self, budget: str) -> float:
        """Return what the budget of this name counts; latency is relative to the dense model's."""
        if budget == "latency":
            return math.nan if self.relative is None else self.relative
        return float({"macs": self.macs, "params": self.params, "bytes": self.bytes}[budget])

    @property
    def quality(self) -> float:
        """The score, or else the difference of the outputs, negated; NaN where neither is known."""
        if self.score is not None:
            return self.score
        return math.nan if self.difference is None else -self.difference


@dataclass(frozen=True)
class SweepReport:
    """The points of a sweep, smallest budget last; `str` gives a table. Iterating gives the points without the dense.

    Attributes:
        budget: what the budgets are fractions of: "macs", "params", "bytes" or "latency".
        dense: the model that came in.
        points: one per budget.
        notes: how it was measured and compared, and what else the user should know.
        reused: how many points were there from an earlier run.
    """

    budget: str
    dense: Point
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    reused: int = 0

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Point:
        return self.points[index]

    def flagged(self) -> SweepReport:
        """Return the same with the points in order and `Point.pareto` set; the dense model competes as well."""
        points = sorted(self.points, key=lambda point: -point.budget)
        every = [self.dense, *points]
        good = pareto([p.cost(self.budget) for p in every], [p.quality for p in every], [p.made for p in every])
        dense, *rest = [replace(point, pareto=flag) for point, flag in zip(every, good, strict=True)]
        return replace(self, dense=dense, points=tuple(rest))

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(_table(self))
        for line in _lines(self):
            console.print(Text(line))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and finite numbers."""
        made: dict[str, Any] = as_plain(
            {
                "format": FORMAT,
                "budget": self.budget,
                "notes": list(self.notes),
                "dense": asdict(self.dense),
                "points": [asdict(point) for point in self.points],
            }
        )
        return made


def pareto(costs: Sequence[float], qualities: Sequence[float], made: Sequence[bool]) -> list[bool]:
    """Return which points nothing beats: none costs at most as much and is at least as good, with one of the two
    strict.

    A point without a model, or with a cost or quality that is not a number, neither is one nor beats one.
    """
    known = [ok and not math.isnan(c) and not math.isnan(q) for c, q, ok in zip(costs, qualities, made, strict=True)]
    pairs = [(c, q) for c, q, ok in zip(costs, qualities, known, strict=True) if ok]
    return [
        ok and not any(a <= c and b >= q and (a < c or b > q) for a, b in pairs)
        for c, q, ok in zip(costs, qualities, known, strict=True)
    ]


# ---------------------------------------------------------------- the table
_COLUMNS: tuple[tuple[str, Callable[[Point, Point], str]], ...] = (
    ("MACs", lambda p, d: _against(p.macs, d.macs)),
    ("parameters", lambda p, d: _against(p.params, d.params)),
    ("bytes", lambda p, d: _against(p.bytes, d.bytes)),
    ("ms", lambda p, d: "" if p.latency is None else f"{p.latency * 1e3:.3g} ({p.relative or 1.0:.0%})"),
    ("score", lambda p, d: "" if p.score is None else f"{p.score:.4g}"),
    ("agreement", lambda p, d: "" if p.agreement is None else f"{p.agreement:.1%}"),
    ("difference", lambda p, d: "" if p.difference is None else f"{p.difference:.3g}"),
    ("seconds", lambda p, d: f"{p.seconds:.1f}"),
    ("Pareto", lambda p, d: "yes" if p.pareto else ""),
    ("file", lambda p, d: p.file),
)


def _table(report: SweepReport) -> Table:
    rows = [[show(p, report.dense) if p.made else "" for _, show in _COLUMNS] for p in (report.dense, *report.points)]
    # Bytes follow the parameters, unless types are mixed: they are shown where they are what counts.
    hidden = {"bytes"} if report.budget != "bytes" else {"parameters"}
    shown = [k for k, (name, _) in enumerate(_COLUMNS) if name not in hidden and any(row[k] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(report.budget)
    for k in shown:
        name = _COLUMNS[k][0]
        table.add_column(name, justify="left" if name in ("file", "Pareto") else "right", overflow="fold")
    for point, row in zip((report.dense, *report.points), rows, strict=True):
        head = "(dense)" if point.status == "dense" else f"{point.budget:g}"
        cells = [row[k] for k in shown] if point.made else [point.status, *([""] * (len(shown) - 1))]
        table.add_row(head, *cells)
    return table


def _lines(report: SweepReport) -> list[str]:
    missing = [f"{point.budget:g} {point.status}: {point.reason}" for point in report.points if not point.made]
    return [*missing, *report.notes]


def _against(now: int, first: int) -> str:
    return f"{_short(now)} ({now / first:.0%})" if first else _short(now)


def _short(number: int) -> str:
    """Three or four digits are enough to compare by; sweep.csv has all."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


# ---------------------------------------------------------------- files
def write_files(report: SweepReport, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``sweep.json`` and ``sweep.csv``.

    Raises:
        OutputError: the result cannot be written.
    """
    record = {**report.to_dict(), "settings": as_plain(settings)}
    write_text(folder / "sweep.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "sweep.csv", _csv(report))


def write_picture(report: SweepReport, folder: Path) -> None:
    """Write ``sweep.svg`` where matplotlib is installed.

    Raises:
        OutputError: the result cannot be written.
    """
    picture = svg(report)
    if picture is not None:
        write_text(folder / "sweep.svg", picture)


def read_record(path: Path) -> tuple[Point, list[Point]] | None:
    """Return the dense model and the points of an earlier run; None where there is no record.

    Raises:
        InputError: it cannot be read, which names the file and says what to do.
    """
    advice = "delete or move it, and the sweep starts again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as the record of a sweep ({error}); {advice}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{str(path)!r} is not the record of a sweep of this version; {advice}.")
    try:
        return _point(record["dense"]), [_point(entry) for entry in record["points"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(path)!r} is damaged ({error!r}); {advice}.") from error


def _point(entry: Mapping[str, Any]) -> Point:
    """Return a point as `to_dict` wrote it; infinities come as text."""
    values = {field.name: entry[field.name] for field in fields(Point)}
    for name, value in values.items():
        wanted = Point.__annotations__[name]
        if value is None and "None" in wanted:
            continue
        kind = {"float": float, "int": int, "str": str, "bool": bool}[wanted.removesuffix(" | None")]
        if kind is float:
            values[name] = float(value)
        elif not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")
    return Point(**values)


def _csv(report: SweepReport) -> str:
    out = io.StringIO()
    names = [field.name for field in fields(Point) if field.name not in ("key", "digest")]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for point in (report.dense, *report.points):
        writer.writerow(asdict(point))
    return out.getvalue()


def svg(report: SweepReport) -> str | None:
    """Quality over cost, a panel for each measure of quality; None without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    every = [p for p in (report.dense, *report.points) if p.made]
    panels = [(n, t) for n, t in _PANELS if any(getattr(p, n) is not None for p in every)]
    # The same points give the same bytes.
    with rc_context({"svg.hashsalt": "cipm-sweep"}):
        figure = Figure(figsize=(5.0 * max(len(panels), 1), 4.0), layout="constrained")
        for k, (name, title) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), k + 1)
            _draw(axes, every, report, name)
            axes.set_xlabel(f"{_COSTS[report.budget]}, % of the dense model's")
            axes.set_ylabel(title)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


_PANELS = (
    ("score", "score"),
    ("agreement", "same top class as the dense model, %"),
    ("difference", "relative difference of the outputs"),
)
_COSTS = {"macs": "multiply-accumulates", "params": "parameters", "bytes": "bytes of weights", "latency": "latency"}


def _draw(axes: Any, every: Sequence[Point], report: SweepReport, name: str) -> None:
    whole = report.dense.cost(report.budget) or 1.0
    factor = 100.0 if name == "agreement" else 1.0
    drawn = [p for p in every if getattr(p, name) is not None and math.isfinite(getattr(p, name))]
    drawn = sorted((p for p in drawn if math.isfinite(p.cost(report.budget))), key=lambda p: p.cost(report.budget))
    x = [100.0 * p.cost(report.budget) / whole for p in drawn]
    y = [factor * getattr(p, name) for p in drawn]
    front = [k for k, p in enumerate(drawn) if p.pareto]
    axes.plot([x[k] for k in front], [y[k] for k in front], "-", color="tab:blue", zorder=1, label="Pareto front")
    axes.scatter(x, y, c=["tab:blue" if p.pareto else "tab:gray" for p in drawn], zorder=2)
    for point, at_x, at_y in zip(drawn, x, y, strict=True):
        text = "dense" if point.status == "dense" else f"{point.budget:g}"
        axes.annotate(text, (at_x, at_y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.grid(alpha=0.3)
    if front:
        axes.legend(loc="best", fontsize=8)
