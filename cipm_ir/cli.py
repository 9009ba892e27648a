"""The command line: `cipm inspect`, `cipm optimize`, `cipm verify`, `cipm sweep`, `cipm passes`.

Exit codes: 0 done, 1 `verify` found a difference or `optimize` left out a pass that broke its promise, 2 bad input,
option or output (one sentence on stderr), 3 a defect of this program, 130 stopped by the user, 141 the reader of the
output went away.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import secrets
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from cipm_ir.cli_shapes import FixShapesOption, InputShapeOption, input_shapes
from cipm_ir.cli_sweep import DATA_HELP
from cipm_ir.cli_sweep import sweep as sweep_command
from cipm_ir.errors import CipmError, OptionError, OutputError
from cipm_ir.progress_bar import progress_bar
from cipm_ir.version import __version__

if TYPE_CHECKING:
    from cipm_ir.symmetry.program import Program
    from cipm_ir.symmetry.space import Space

app = typer.Typer(
    name="cipm",
    help="A compiler middle-end for neural networks that knows the symmetries of their weights.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_KINDS = "An .onnx file; with torch also a .pt2 file (torch.export.save), or module:function, or file.py:function"
Model = Annotated[
    str,
    typer.Argument(
        help=f"{_KINDS}. The function takes nothing and gives a program, (module, args) or (module, args, kwargs).",
        show_default=False,
    ),
]
_OUTPUTS = (
    "Where to write the result: .onnx or .pt2, and for a module of torch also a folder, which gets a plan and weights "
    "(cipm_ir.apply_plan). Without it only the report is shown."
)
_RTOL = (
    "Allow outputs to move by this times the largest value of their channel, instead of by the model's own rounding."
)
_ATOL = "Allow this in addition, or alone."


class OnFailure(enum.Enum):
    """What to do with a pass that broke its promise; see `cipm_ir.passes.framework.pipeline.OnFailure`."""

    skip = "skip"
    # Not a name that Python allows.
    stop = "raise"


DataOption = Annotated[str | None, typer.Option("--data", metavar="DATA", help=DATA_HELP)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"cipm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Model,
    spaces: Annotated[bool, typer.Option("--spaces", help="Show the table of spaces instead of the graph.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write spaces, sizes and opaque nodes as JSON.")] = False,
    annotate: Annotated[
        str | None, typer.Option("--annotate", metavar="OUT", help="Write a copy with the groups in its metadata.")
    ] = None,
    input_shape: InputShapeOption = None,
    full: Annotated[bool, typer.Option("--full", help="Show every block of nodes, also where blocks repeat.")] = False,
    short: Annotated[bool, typer.Option("--summary", help="Show the summary alone.")] = False,
) -> None:
    """Show a summary and the annotated graph: which axes move with which space of hidden units, by which group."""
    from cipm_ir.api import load
    from cipm_ir.passes.framework.summary import summary_lines
    from cipm_ir.sources import check_annotated, save_annotated

    if annotate is not None:
        check_annotated(annotate)
    program = load(model, input_shapes=input_shapes(input_shape))
    if annotate is not None:
        save_annotated(program, annotate)
    if as_json:
        print(json.dumps(_described(program), indent=2))
        return
    print(*(f"// {line}" for line in summary_lines(program)), sep="\n")
    if spaces:
        _print_spaces(program)
    elif not short:
        print(program.text(fold=not full))


@app.command()
def optimize(
    model: Model,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help=_OUTPUTS)] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--pass",
            metavar="PASS",
            help="A pass with its options, as in 'prune{macs=0.5}'; may be repeated. "
            "Default: clean-up, fold-affine, remove-dead; for torch: remove-dead. `cipm passes` lists them.",
        ),
    ] = None,
    data: DataOption = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="JSON", help="Write the report to this file too.")
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="HTML", help="Write it with pictures, one file for a browser.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not run the model before and after.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Count a pass as failed, too, whose result could not be run.")
    ] = False,
    on_failure: Annotated[
        OnFailure,
        typer.Option(
            "--on-failure",
            help="skip: leave out a pass that changed what the model computes, keep the others' work, and exit with 1; "
            "raise: stop and write nothing.",
        ),
    ] = OnFailure.skip,
    rtol: Annotated[float | None, typer.Option("--rtol", min=0.0, help=_RTOL)] = None,
    atol: Annotated[float | None, typer.Option("--atol", min=0.0, help=_ATOL)] = None,
    annotate: Annotated[bool, typer.Option("--annotate", help="Write the groups into the metadata.")] = False,
    input_shape: InputShapeOption = None,
    fix_shapes: FixShapesOption = False,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the report and write no model.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show neither progress nor report.")] = False,
) -> None:
    """Run passes, check after each that the model still computes what it should, and write the result.

    Exit code 1 where a pass was left out.
    """
    from cipm_ir import api
    from cipm_ir.passes.framework.keeping import check_kept
    from cipm_ir.sources import check_output

    check_kept(passes or None, output=output is not None, dry=dry_run, report=(report or html) is not None)
    _check_apart({"--data": data}, {"-o": output})
    _check_apart({"the model": model, "--data": data, "-o": output}, {"--report": report, "--html": html})
    if output is not None:
        check_output(output, model)
    for place in (report, html):
        if place is not None:
            check_output(place)
    if html is not None:
        from cipm_ir.passes.framework.html import check_matplotlib, render

        check_matplotlib()
    with progress_bar(quiet) as progress:
        result = api.optimize(
            model,
            passes or None,
            data=data,
            verify=False if no_verify else ("strict" if strict else True),
            on_failure=on_failure.value,
            rtol=rtol,
            atol=atol,
            annotate=annotate,
            input_shapes=input_shapes(input_shape),
            fix_shapes=fix_shapes,
            seed=seed,
            progress=progress,
        )
    page = "" if html is None else render(result.report, Path(model).name)
    as_json = json.dumps(result.report.to_dict(), indent=2, ensure_ascii=False) + "\n"
    with _written(report, as_json), _written(html, page):
        if output is not None:
            result.save(output)
    if not quiet:
        print(result.report)
        print(f"written: {output}" if output is not None else "nothing written: give -o to keep the result")
    if result.report.skipped:
        print(f"cipm: left out: {', '.join(result.report.skipped)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help=f"The model taken as right. {_KINDS}.", show_default=False)],
    b: Annotated[str, typer.Argument(help="The model to compare with it.", show_default=False)],
    data: DataOption = None,
    seed: Seed = 0,
    rtol: Annotated[float | None, typer.Option("--rtol", min=0.0, help=_RTOL)] = None,
    atol: Annotated[float | None, typer.Option("--atol", min=0.0, help=_ATOL)] = None,
    cases: Annotated[
        int | None,
        typer.Option(
            "--cases",
            min=1,
            help="At most this many generated inputs, and batches of data.",
            show_default="what time allows",
        ),
    ] = None,
    input_shape: InputShapeOption = None,
) -> None:
    """Run two models on the same inputs; exit code 0 when they agree, 1 when they differ."""
    from cipm_ir import api

    shapes = input_shapes(input_shape)
    found = api.verify(a, b, data=data, seed=seed, rtol=rtol, atol=atol, cases=cases, input_shapes=shapes)
    if not found.verified:
        raise CipmError(f"The models could not be compared: {found.reason.rstrip('.')}.")
    print(found)
    raise typer.Exit(0 if found else 1)


app.command("sweep")(sweep_command)


@app.command("passes")
def list_passes() -> None:
    """List the passes with their options."""
    from cipm_ir.passes.framework.registry import listing

    for entry in listing():
        origin = "" if entry.package in ("", "cipm_ir") else f", {entry.package}"
        print(f"{entry.name}  ({entry.kind or 'not usable'}{origin})")
        print(f"    {entry.fault or entry.doc}")
        for option in entry.options:
            default = "required" if option.required else f"default {_plain(option.default)}"
            doc = f"{option.doc}; " if option.doc else ""
            print(f"    {option.name}: {doc}{option.allowed} ({default})")
        print()


# --- output ---------------------------------------------------------------------------------------


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "()" if value == () else str(value)


def _described(program: Program) -> dict[str, Any]:
    from cipm_ir.passes.framework.report import Totals, as_plain
    from cipm_ir.symmetry.pinned import costs_of_opaque, pinned_by_opaque

    def one(space: Space) -> dict[str, Any]:
        parent = None if space.parent is None else {"space": space.parent[0].name, "index": space.parent[1]}
        return {
            "name": space.name,
            "kind": space.kind,
            "size": space.size,
            "group": space.admits,
            "members": list(space.members),
            "parent": parent,
        }

    made: dict[str, Any] = as_plain(
        {
            "totals": vars(Totals.of(program)),
            "spaces": [one(space) for space in program.spaces],
            "opaque": [{**vars(node), "units": units} for node, units in costs_of_opaque(program.analysis)],
            "units_pinned_by_opaque": pinned_by_opaque(program.analysis),
        }
    )
    return made


def _print_spaces(program: Program) -> None:
    rows = [("space", "kind", "size", "group", "tensors", "in block")]
    for space in program.spaces:
        parent = "" if space.parent is None else f"{space.parent[1]} of @{space.parent[0].name}"
        rows.append((f"@{space.name}", space.kind, str(space.size), space.admits, str(len(space.members)), parent))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    units = sum(space.size for space in program.spaces if space.kind == "units")
    print(f"{len(program.spaces)} spaces, {units} free units")


def _check_apart(used: dict[str, str | None], written: dict[str, str | None]) -> None:
    """Raise `OptionError`: a file would be written over something that is given beside it."""
    seen = {os.path.realpath(path): what for what, path in used.items() if path is not None}
    for what, path in written.items():
        if path is not None and (other := seen.setdefault(os.path.realpath(path), what)) != what:
            raise OptionError(f"{what} would be written over {other}, {path!r}; give it a file of its own.")


@contextlib.contextmanager
def _written(path: str | None, text: str) -> Iterator[None]:
    """Write the text beside its place, do what is inside, then rename: all or nothing."""
    if path is None:
        yield
        return
    target = Path(os.path.abspath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path!r} was not written: {error.strerror}; nothing was left behind.") from error
        yield
        try:
            os.replace(temporary, target)
        except OSError as error:
            raise OutputError(f"{path!r} was not written: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


# --- exit codes -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; never raises but for `SystemExit` of the interpreter."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    given = [word for place, word in enumerate(given) if word != "--debug" or place >= end]
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Unicode shows a question mark for a Greek letter rather than failing.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except KeyboardInterrupt:
        return _fail("Stopped.", 130, debug)
    except CipmError as error:
        return _fail(str(error), 2, debug)
    except OSError as error:
        if error.filename is None:
            _drop_stdout()
        return _fail(f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}.", 2, debug)
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        hint = "" if debug else " Run again with --debug to see where, and please report it."
        return _fail(f"Internal error: {type(error).__name__}: {first}. {notes}".rstrip() + hint, 3, debug)


def _run(given: list[str]) -> int:
    """Typer's command without its `main`, which would end the process where the reader of the output goes away."""
    command = get_command(app)
    try:
        with command.make_context("cipm", given) as context:
            command.invoke(context)
        return 0
    except typer.Exit as done:
        return int(done.exit_code)
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        hint = " `cipm --help` says what there is." if "No such command" in error.format_message() else ""
        raise CipmError(error.format_message().strip().rstrip(".") + "." + hint) from error


# Typer lies on click, newer ones on a copy of their own: take the base class from where it is in either.
_USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _fail(message: str, code: int, debug: bool) -> int:
    with contextlib.suppress(OSError):
        if debug:
            traceback.print_exc()
        print(f"cipm: {message}", file=sys.stderr)
        sys.stderr.flush()
    return code


def _drop_stdout() -> None:
    """Python flushes stdout once more at exit; let it flush into nothing."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
