"""The options of the command line for sizes of dynamic dimensions: `--input-shape` and `--fix-shapes`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import typer

from cipm_ir.errors import OptionError

InputShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME:]SIZES",
        help="Sizes of an input with dynamic ones, as in x:1x3x640x640, ? for one that stays open; may be repeated. "
        "Analysis, costs and verification use them; the file stays dynamic.",
    ),
]
FixShapesOption = Annotated[
    bool, typer.Option("--fix-shapes", help="Write the sizes of --input-shape into the model, which is then fixed.")
]
_SIZES = re.compile(r"(?:-?\d+|\?)(?:[x,](?:-?\d+|\?))*|scalar")


def input_shapes(given: Sequence[str] | None) -> dict[str, tuple[int | None, ...]] | tuple[int | None, ...] | None:
    """Return the sizes by name of the input, or the sizes alone where no name is given.

    Raises:
        OptionError: text that is no shape, an input given twice, or sizes without a name beside others.
    """
    found: dict[str, tuple[int | None, ...]] = {}
    for text in given or ():
        name, colon, sizes = text.rpartition(":")
        if not _SIZES.fullmatch(sizes) or (colon and not name):
            raise OptionError(f"--input-shape {text!r} is not of the form name:1x3x640x640.")
        if name in found:
            raise OptionError(f"--input-shape gives {repr(name) if name else 'sizes without a name'} twice.")
        parts = [] if sizes == "scalar" else re.split("[x,]", sizes)
        found[name] = tuple(None if part == "?" else int(part) for part in parts)
    if "" in found:
        if len(found) > 1:
            raise OptionError("--input-shape gives sizes without a name beside others; name each input.")
        return found[""]
    return found or None
