"""A report as one HTML file: tables, pictures drawn by matplotlib and stored inside, no scripts, nothing to load."""

from __future__ import annotations

import base64
import html
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import UnsupportedError
from cipm_ir.passes.framework.figures import Bars, Curves, Figure, HeatMap, Rows
from cipm_ir.runtime.files import write_text
from cipm_ir.version import __version__

_MANY = 8
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c2127;background:#fff;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #d3d8de}
table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e5e8eb}th{font-weight:600;white-space:nowrap}
td.text,th.text{text-align:left}code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.meta,figcaption small{color:#5f6b7c}figure{display:inline-block;margin:.6rem 1.4rem .6rem 0;vertical-align:top}
figcaption{margin-bottom:.3rem;max-width:34rem}.pair{display:flex;gap:.8rem}.map{position:relative;width:15rem}
.map img{width:100%;image-rendering:pixelated;display:block;border:1px solid #abb3bf}
.map svg{position:absolute;inset:1px 1px auto 1px;width:calc(100% - 2px)}.map span{color:#5f6b7c;font-size:13px}
svg.plot{max-width:100%;height:auto}summary{cursor:pointer;margin:.8rem 0;color:#215db0}
@media(max-width:40rem){.map{width:44vw}}
"""


class TotalsView(Protocol):
    """Sizes of a program."""

    @property
    def parameters(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class StepView(Protocol):
    """What is shown of one pass."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def changed(self) -> bool: ...
    @property
    def summary(self) -> str: ...
    @property
    def after(self) -> TotalsView: ...
    @property
    def seconds(self) -> float: ...
    @property
    def error(self) -> float | None: ...
    @property
    def figures(self) -> tuple[Figure, ...]: ...


class SpaceView(Protocol):
    """What is shown of one space."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def group(self) -> str: ...


class ReportView(Protocol):
    """What is shown of a run: a `cipm_ir.passes.Report` has it all."""

    @property
    def steps(self) -> Sequence[StepView]: ...
    @property
    def before(self) -> TotalsView: ...
    @property
    def seconds(self) -> float: ...
    @property
    def error(self) -> float | None: ...
    @property
    def checked(self) -> str: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def opaque(self) -> Sequence[str]: ...
    @property
    def spaces(self) -> Sequence[SpaceView]: ...


def write_html(report: ReportView, path: str | os.PathLike[str], title: str = "") -> None:
    """Write a report as one self-contained file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
        UnsupportedError: there are pictures but no matplotlib.
    """
    write_text(path, render(report, title))


def render(report: ReportView, title: str = "") -> str:
    """Return the HTML text of a report; the same report gives the same text."""
    steps = "".join(_step(step) for step in report.steps)
    name = html.escape(title or "CIPM-IR report")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>\n<body>\n'
        f'<h1>{name}</h1><p class="meta">cipm-ir {__version__}; {report.seconds:.2f} s; {html.escape(_checked(report))}'
        f"</p>\n{_totals(report)}{_notes(report)}{steps}{_spaces(report)}</body></html>\n"
    )


def _checked(report: ReportView) -> str:
    error = "" if report.error is None else f", max |Δ| of the outputs {report.error:.2g}"
    return f"{report.checked}{error}"


# ------------------------------------------------------------ tables
def _totals(report: ReportView) -> str:
    first = report.before
    rows = [["(original)", "", f"{first.parameters:,}", f"{first.macs:,}", f"{first.bytes:,}", "", ""]]
    for step in report.steps:
        now, kind = step.after, step.kind if step.changed else "no change"
        sizes = [_share(getattr(now, key), getattr(first, key)) for key in ("parameters", "macs", "bytes")]
        rows.append([step.name, kind, *sizes, _number(step.error), f"{step.seconds:.2f}"])
    return _table(["pass", "kind", "parameters", "MACs", "bytes", "max |Δ|", "seconds"], rows, texts=2)


def _share(now: int, first: int) -> str:
    return f"{now:,}" if now == first or not first else f"{now:,} ({now / first:.0%})"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{' class=text' if k < texts else ''}>{html.escape(cell)}</{tag}>" for k, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>\n"


def _notes(report: ReportView) -> str:
    lines = list(report.notes)
    if report.opaque:
        lines.append(f"Opaque, so that what they touch stays fixed: {'; '.join(report.opaque)}")
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def _spaces(report: ReportView) -> str:
    if not report.spaces:
        return ""
    rows = [[f"@{one.name}", one.kind, f"{one.size:,}", one.group] for one in report.spaces]
    table = _table(["space", "kind", "size", "group"], rows, texts=2)
    return f"<h2>Spaces at the end</h2><details><summary>{len(rows)} spaces</summary>{table}</details>\n"


def _step(step: StepView) -> str:
    drawn = "".join(_folded([draw(figure) for figure in step.figures]))
    if not step.summary and not drawn:
        return ""
    return f"<h2><code>{html.escape(step.name)}</code></h2>\n<p>{html.escape(step.summary)}</p>\n{drawn}"


def _folded(drawn: list[str]) -> list[str]:
    """Return the first pictures in sight, the rest behind a line to click on."""
    if len(drawn) <= _MANY + 4:
        return drawn
    rest = "".join(drawn[_MANY:])
    more = f"<details><summary>{len(drawn) - _MANY} pictures more</summary>{rest}</details>\n"
    return [*drawn[:_MANY], more]


# ------------------------------------------------------------ pictures
def draw(figure: Figure) -> str:
    """Return one picture or table as an HTML ``figure``.

    Raises:
        UnsupportedError: a picture without matplotlib.
    """
    note = f"<br><small>{html.escape(figure.note)}</small>" if getattr(figure, "note", "") else ""
    caption = f"<figcaption>{html.escape(figure.title)}{note}</figcaption>"
    if isinstance(figure, HeatMap):
        return f"<figure>{caption}{_heat_map(figure)}</figure>\n"
    if isinstance(figure, Rows):
        return f"<figure>{caption}{_table(figure.head, figure.rows, figure.texts)}</figure>\n"
    # Without a salt of our own the ids of clip paths differ from run to run. The browser draws the text, so names may
    # hold what matplotlib's font lacks, and dollar signs are no formulas.
    plain = {"svg.hashsalt": "cipm", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
    with _matplotlib().rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        body = _bars(figure) if isinstance(figure, Bars) else _curves(figure)
    return f"<figure>{caption}{body}</figure>\n"


def check_matplotlib() -> None:
    """Raise `UnsupportedError`, saying how to get it, where matplotlib cannot be imported."""
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.image
    except ImportError as error:
        raise UnsupportedError(
            "Pictures of an HTML report need matplotlib, which is not installed; run `pip install 'cipm-ir[html]'`."
        ) from error
    return matplotlib


def _heat_map(figure: HeatMap) -> str:
    before = np.asarray(figure.before, np.float64)
    after = None if figure.after is None else np.asarray(figure.after, np.float64)
    both = [m for m in (before, after) if m is not None]
    # A few entries far above the rest would leave everything else without colour.
    top = max((float(np.quantile(np.abs(m), 0.995)) for m in both if m.size), default=0.0) or 1.0
    signed = any(float(m.min(initial=0.0)) < 0 for m in both)
    if after is None:
        return f'<div class="pair">{_picture(before, top, signed, figure.bounds, "")}</div>'
    first = _picture(before, top, signed, (), "before")
    return f'<div class="pair">{first}{_picture(after, top, signed, figure.bounds, "after")}</div>'


def _picture(matrix: npt.NDArray[np.float64], top: float, signed: bool, bounds: Sequence[float], what: str) -> str:
    out = io.BytesIO()
    scale = {"vmin": -top, "vmax": top, "cmap": "RdBu_r"} if signed else {"vmin": 0.0, "vmax": top, "cmap": "viridis"}
    _matplotlib().image.imsave(out, matrix, format="png", metadata={"Software": None}, **scale)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    rows, columns = matrix.shape
    lines = "".join(f"M0 {b:.5f}H1M{b:.5f} 0V1" for b in bounds)
    stroke = 'stroke="#fff" stroke-opacity=".75" stroke-width=".004" fill="none"'
    overlay = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none"><path d="{lines}" {stroke}/></svg>' if bounds else ""
    image = f'<img alt="{what or "matrix"}" width="{columns}" height="{rows}" src="data:image/png;base64,{data}">'
    return f'<div class="map">{image}{overlay}{f"<span>{what}</span>" if what else ""}</div>'


def _bars(figure: Bars) -> str:
    count, names = len(figure.labels), list(figure.series)
    canvas = _matplotlib().figure.Figure(figsize=(max(4.0, min(11.0, 1.5 + 0.45 * count)), 3.4), layout="constrained")
    axes = canvas.subplots()
    place, width = np.arange(count), 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        heights = np.asarray(figure.series[name], np.float64)
        axes.bar(place + (k - (len(names) - 1) / 2) * width, heights, width, label=name)
    axes.set_xticks(place, list(figure.labels), rotation=40 if count > 4 else 0, ha="right" if count > 4 else "center")
    axes.set_ylabel(figure.y_label)
    return _finished(canvas, axes, names)


def _curves(figure: Curves) -> str:
    canvas = _matplotlib().figure.Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = canvas.subplots()
    for name, (x, y) in figure.lines.items():
        axes.plot(np.asarray(x, np.float64), np.asarray(y, np.float64), marker="o", markersize=3, label=_shown(name))
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    axes.grid(alpha=0.3)
    return _finished(canvas, axes, list(figure.lines))


def _shown(name: str) -> str:
    """Matplotlib leaves out of a legend what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _finished(canvas: Any, axes: Any, names: Sequence[str]) -> str:
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1 or (names and names[0]):
        axes.legend(frameon=False, fontsize=8)
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg class="plot" ', 1)
