"""What a pipeline did: sizes before and after each pass, how far the outputs moved, and what spaces there are."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cipm_ir.ir.lifted import held_weights
from cipm_ir.passes.framework.figures import Figure
from cipm_ir.runtime.graphs import all_graphs
from cipm_ir.runtime.verification.verify import Verification
from cipm_ir.symmetry.counting import sizes_in_words
from cipm_ir.symmetry.program import Program

_WIDTH = 118
TOGETHER = " together with "
"""Between the verdict on a step and the names of those that it was verified with."""


@dataclass(frozen=True)
class Totals:
    """Sizes of a program: float parameters, multiply-accumulates of a run, bytes of all weights, nodes, free units.

    ``sizes``: at which dynamic dimensions were counted; ``uncounted``: nodes whose multiply-accumulates are not known;
    ``only``: sizes that the file calls dynamic, but no others fit the constants inside; ``left_out``: branches that
    cannot run at these sizes.
    """

    parameters: int
    macs: int
    bytes: int
    nodes: int
    units: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    only: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0

    @classmethod
    def of(cls, program: Program, sizes: Mapping[str, int] | None = None) -> Totals:
        """Measure a program; ``sizes``: of dynamic dimensions, as for `Program.count`."""
        model, counted = program.source_model, program.count(sizes)
        graphs = list(all_graphs(model))
        weights = [value.const_value for graph in graphs for value in graph.initializers.values()]
        weights += [tensor for graph in graphs for _, tensor in held_weights(graph)]
        return cls(
            program.parameters,
            counted.total,
            sum(tensor.nbytes for tensor in weights if tensor is not None),
            sum(len(graph) for graph in graphs),
            sum(space.size for space in program.spaces if space.kind == "units"),
            dict(counted.sizes),
            tuple(map(str, counted.unknown)),
            dict(program.analysis.walk.shapes.only),
            counted.left_out,
        )

    @property
    def costs(self) -> list[str]:
        """Parameters and multiply-accumulates, with what must be known to read them."""
        return [f"{self.parameters:,} parameters, {self.macs:,} multiply-accumulates (MACs)", *self.counting]

    @property
    def counting(self) -> list[str]:
        """What must be known to read the multiply-accumulates: at which sizes, and without which nodes."""
        at = f"MACs are counted at {sizes_in_words(self.sizes)}" if self.sizes else ""
        if at and self.left_out:
            at += f", without the branches that cannot run at these sizes ({self.left_out})"
        more = f" and {len(self.uncounted) - 3} more" if len(self.uncounted) > 3 else ""
        without = f"MACs are without what cannot be counted: {'; '.join(self.uncounted[:3])}{more}"
        only = f"taken as fixed, since no other size that was tried fits: {sizes_in_words(self.only)}"
        return [line for line in (at, without if self.uncounted else "", only if self.only else "") if line]


@dataclass(frozen=True)
class Step:
    """One pass of a run.

    Attributes:
        name: of the pass, with its options.
        kind: what it promises.
        changed: the program after it is another one.
        summary: what it did, in one line.
        before, after: sizes.
        seconds: of the pass alone; `verification` has its own.
        verification: the comparison with the program before the last run of exact passes; None where nothing ran. Of
            exact passes in a row there is one, of the last program.
        checked: that in words, with the names of the passes that were verified together with this one.
        metrics: numbers of the pass.
        figures: pictures of the pass.
        skipped: it broke its promise, and its result was left out.
    """

    name: str
    kind: str
    changed: bool
    summary: str
    before: Totals
    after: Totals
    seconds: float
    verification: Verification | None
    checked: str
    metrics: Mapping[str, Any]
    figures: tuple[Figure, ...] = ()
    skipped: bool = False

    @property
    def error(self) -> float | None:
        """max |Δ| of the outputs against the program that it was compared with; None where nothing was compared."""
        return _error(self.changed, self.verification)


@dataclass(frozen=True)
class SpaceLine:
    """One space of the final program."""

    name: str
    kind: str
    size: int
    group: str


@dataclass(frozen=True)
class Report:
    """The whole run. `str` gives a table that needs no terminal, `to_dict` what `json.dump` takes.

    Attributes:
        steps: one for each pass, in order.
        before, after: sizes of the first and of the last program.
        verification: the last program against the first; None where nothing was compared.
        checked: that in words.
        spaces: of the last program.
        opaque: nodes of the last program that pin what they touch, with the reason.
        seconds: of the passes and of the comparisons together.
        notes: what else the user should know: how the program was read, and as what it comes out.
    """

    steps: tuple[Step, ...]
    before: Totals
    after: Totals
    verification: Verification | None
    checked: str
    spaces: tuple[SpaceLine, ...]
    opaque: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[str, ...]:
        """The passes that broke their promise and were left out."""
        return tuple(step.name for step in self.steps if step.skipped)

    @property
    def error(self) -> float | None:
        """max |Δ| of the outputs of the last program against the first; None where they were not compared."""
        return _error(any(step.changed for step in self.steps), self.verification)

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
        for part in self.renderables():
            console.print(part)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def renderables(self) -> tuple[Any, ...]:
        """Return the table and the lines below it, for a rich console."""
        return (self._table(), *(Text(line) for line in self._notes()))

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("pass", overflow="fold", max_width=46)
        table.add_column("kind")
        for head in ("parameters", "MACs", "bytes", "max |Δ|", "seconds"):
            table.add_column(head, justify="right", no_wrap=True)
        first = self.before
        table.add_row("(original)", "", f"{first.parameters:,}", f"{first.macs:,}", f"{first.bytes:,}", "", "")
        for step in self.steps:
            kind = step.kind if step.changed else ("left out" if step.skipped else "no change")
            moved = _shown(step.error) + _share(step.verification)
            table.add_row(Text(step.name), kind, *_sizes(step.after, first), moved, f"{step.seconds:.2f}")
        table.add_section()
        moved = _shown(self.error) + _share(self.verification)
        table.add_row("in all", "", *_sizes(self.after, first), moved, f"{self.seconds:.2f}")
        return table

    def _notes(self) -> list[str]:
        lines = [f"{step.name.split('{')[0]}: {step.summary}" for step in self.steps if step.summary]
        unchecked = {step.checked for step in self.steps if step.changed and step.error is None}
        groups: dict[int, list[str]] = {}
        for step in self.steps:
            if TOGETHER in step.checked:
                groups.setdefault(id(step.verification), []).append(step.name.partition("{")[0])
        lines += sorted(text[:1].upper() + text[1:] for text in unchecked if text)
        lines += [f"verified together: {', '.join(names)}" for names in groups.values()]
        kinds = Counter(space.kind for space in self.spaces)
        counted = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        lines.append(f"spaces: {len(self.spaces)}{f' ({counted})' if counted else ''}, {self.after.units:,} free units")
        if self.opaque:
            more = f" and {len(self.opaque) - 3} more" if len(self.opaque) > 3 else ""
            lines.append(f"opaque, so that what they touch stays fixed: {'; '.join(self.opaque[:3])}{more}")
        lines += dict.fromkeys([*self.before.counting, *self.after.counting])
        return lines + list(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and finite numbers."""
        made = {
            "before": vars(self.before),
            "after": vars(self.after),
            "max_abs": self.error,
            "checked": self.checked,
            "skipped": list(self.skipped),
            "verification": _verification(self.verification),
            "seconds": self.seconds,
            "passes": [_step(step) for step in self.steps],
            "spaces": [vars(space) for space in self.spaces],
            "opaque": list(self.opaque),
            "notes": list(self.notes),
        }
        plain: dict[str, Any] = as_plain(made)
        return plain

    def to_html(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write one self-contained HTML file with tables and pictures, whole or not at all.

        Raises:
            OutputError: the result cannot be written.
            UnsupportedError: there are pictures and matplotlib (extra ``html``) is missing.
        """
        from cipm_ir.passes.framework.html import write_html

        write_html(self, path, title)


def space_lines(program: Program) -> tuple[SpaceLine, ...]:
    """Return the spaces of a program as the report shows them."""
    return tuple(SpaceLine(space.name, space.kind, space.size, space.admits) for space in program.spaces)


def pinned_note(program: Program) -> list[str]:
    """Return a note that names what pins axes for want of a rule; none where there is nothing."""
    names = [f"{node.op} {node.name!r}" for node in program.opaque]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"what reaches {', '.join(names[:3])}{more} is pinned, for want of a rule"] if names else []


def opaque_lines(program: Program) -> tuple[str, ...]:
    """Return the opaque nodes of a program, one text each."""
    return tuple(f"{node.op} {node.name!r}: {node.reason}" for node in program.opaque)


def _error(changed: bool, verification: Verification | None) -> float | None:
    if not changed:
        return 0.0
    return verification.max_abs if verification is not None and verification.verified else None


def _sizes(now: Totals, first: Totals) -> list[str]:
    return [
        _against(now.parameters, first.parameters),
        _against(now.macs, first.macs),
        _against(now.bytes, first.bytes),
    ]


def _against(now: int, first: int) -> str:
    return f"{now:,}" if now == first or not first else f"{now:,} ({now / first:.0%})"


def _shown(error: float | None) -> str:
    return "?" if error is None else ("0" if error == 0 else f"{error:.2g}")


def _share(verification: Verification | None) -> str:
    """Return the largest difference as a share of what the model's own rounding allows there.

    "" where no such limit held.
    """
    known = verification is not None and verification.ok and verification.share
    return f" ({verification.share:.0%})" if verification and known else ""


def _step(step: Step) -> dict[str, Any]:
    made = {key: value for key, value in vars(step).items() if key not in ("verification", "figures")}
    made |= {"before": vars(step.before), "after": vars(step.after), "max_abs": step.error}
    return made | {"verification": _verification(step.verification)}


def _verification(verification: Verification | None) -> dict[str, Any] | None:
    return None if verification is None else dict(vars(verification))


def as_plain(value: Any) -> Any:
    """Return a value as JSON knows it.

    Numpy scalars and arrays unwrapped, infinities and NaN as text, the rest as `str`.
    """
    if isinstance(value, Mapping):
        return {str(key): as_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
