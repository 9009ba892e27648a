"""Work is refused where its result would be thrown away: an approximate pass on the command line without an output."""

from __future__ import annotations

from collections.abc import Iterable

from cipm_ir.errors import OptionError
from cipm_ir.passes.framework.base import Pass
from cipm_ir.passes.framework.parser import parse_passes


def check_kept(
    passes: str | Pass | Iterable[str | Pass] | None, *, output: bool, dry: bool, report: bool = False
) -> None:
    """Fail before the work where nothing would come of it.

    Args:
        passes: those of the command line; None: the default ones, which are exact.
        output: a file is written.
        dry: only the report is wanted.
        report: it is written to a file.

    Raises:
        OptionError: an approximate pass without either, or for both; as `parse_passes`.
    """
    if output and dry:
        raise OptionError("--dry-run writes no model; leave out -o, or --dry-run.")
    todo = () if passes is None else parse_passes(passes)
    costly = next((one for one in todo if one.approximates), None)
    if costly is not None and not (output or dry or report):
        raise OptionError(
            f"Pass '{costly}' makes another model, which nothing would keep: give -o OUT.onnx, or --dry-run for the "
            "report alone."
        )
