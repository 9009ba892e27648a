"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cipm_ir.errors import OutputError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text beside its place and rename it.

    Raises:
        OutputError: the file cannot be written; nothing is left behind then.
    """
    target = Path(os.path.abspath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{os.fspath(path)!r} was not written: {error.strerror}; choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)
