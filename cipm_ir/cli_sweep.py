"""The command `cipm sweep`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cipm_ir.errors import CipmError, OptionError
from cipm_ir.progress_bar import progress_bar

DATA_HELP = (
    "Calibration input: an .npz file (arrays by name, first axis samples), a .npy file where the model has one input, "
    "or a folder of such files (.npy files named after the inputs, or batches of one input)."
)


def sweep(
    model: Annotated[
        str, typer.Argument(help="An .onnx file; with torch also a .pt2 file or module:function.", show_default=False)
    ],
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="FOLDER", help="Gets the models, sweep.json, sweep.csv and sweep.svg."),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help=DATA_HELP),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", metavar="DATA", help="Inputs to compare outputs on. Default: the calibration data."),
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="B,B,...", help="Fractions that may remain, with commas between.")
    ] = ".9,.8,.7,.5",
    budget: Annotated[str, typer.Option("--budget", help="Of what: macs, params, bytes or latency.")] = "macs",
    passes: Annotated[
        str,
        typer.Option(
            "-p", "--passes", metavar="PASSES", help="What to run; the budget goes to {budget}, or into the last pass."
        ),
    ] = "compress",
    threads: Annotated[int, typer.Option("--threads", min=0, help="When latency is measured; 0: it is not.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples in a run when latency is measured.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not run the model before and after.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show neither progress nor table.")] = False,
) -> None:
    """Make a model for each of several budgets and say which are worth it; goes on where it was stopped."""
    from cipm_ir.sweeps import sweep as run

    values = _numbers(budgets)
    try:
        with progress_bar(quiet) as progress:
            report = run(
                model,
                output_folder=output,
                budgets=values,
                budget=budget,
                passes_template=passes,
                data=data,
                held_out=held_out,
                threads=threads or None,
                batch=batch,
                seed=seed,
                verify=not no_verify,
                progress=progress,
            )
    except KeyboardInterrupt:
        if os.path.exists(os.path.join(output, "sweep.json")):
            print(f"cipm: what is finished is in {output!r}; the same command goes on from there.", file=sys.stderr)
        raise
    if not quiet:
        print(report)
        again = f"; {report.reused} of {len(values)} points were there already" if report.reused else ""
        print(f"written: {output}{again}")
    if not any(point.made for point in report):
        raise CipmError(f"No budget could be met: {report[0].reason}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise OptionError(f"--budgets takes numbers with commas between, as in .9,.7,.5, not {text!r}.") from None
