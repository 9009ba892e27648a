"""What is to be written, read off the name that it gets; checked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeAlias

from cipm_ir.errors import OutputError

Form: TypeAlias = Literal["onnx", "exported", "plan"]


def torch_form(path: str | os.PathLike[str]) -> Form:
    """Return how a torch program is written under a name: ``.onnx``, ``.pt2``, or a folder with a plan and weights.

    Raises:
        OutputError: another suffix.
    """
    text = os.fspath(path)
    suffix = Path(text).suffix
    if suffix in (".onnx", ".pt2"):
        return "onnx" if suffix == ".onnx" else "exported"
    if not suffix or text.endswith(("/", os.sep)) or os.path.isdir(text):
        return "plan"
    raise OutputError(
        f"{text!r}: a torch program is written as .onnx, as .pt2 (torch.export), or as a folder (plan and weights; "
        f"a name without suffix), not as {suffix}."
    )


def onnx_form(path: str | os.PathLike[str]) -> Form:
    """Return how an ONNX model is written under a name: ``.pt2`` through torch, ``.onnx``, ``.pb`` or no suffix as
    ONNX.

    Raises:
        OutputError: another suffix: the name would promise something else.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in ("", ".onnx", ".pb", ".pt2"):
        raise OutputError(
            f"{os.fspath(path)!r}: an ONNX model is written as .onnx, or as .pt2 (torch.export), not as {suffix}."
        )
    return "exported" if suffix.lower() == ".pt2" else "onnx"


def check_target(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Fail where nothing could be written; ``folder`` says that a folder is meant.

    Raises:
        OutputError: the result cannot be written.
    """
    target = Path(os.path.abspath(path))
    if target.is_dir() and not folder:
        raise OutputError(f"{os.fspath(path)!r} is a folder; give the name of a file.")
    if target.exists() and not target.is_dir() and folder:
        raise OutputError(f"{os.fspath(path)!r} is a file; a plan is written into a folder.")
    if not target.parent.is_dir():
        raise OutputError(f"{os.fspath(path)!r} cannot be written: the folder {str(target.parent)!r} does not exist.")
