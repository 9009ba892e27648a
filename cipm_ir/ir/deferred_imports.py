"""Modules that are loaded when they are first used, although another package imports them at its start.

onnx_ir imports sympy for arithmetic on symbolic sizes, which nothing here does; that would be a third of the time
that a command takes to start. The standard library's `LazyLoader` puts that off until an attribute is asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_DEFERRED = frozenset({"sympy", "onnx_ir._symbolic_shapes"})


class _Deferring(MetaPathFinder):
    """Finds these modules as Python would, with a loader that waits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _DEFERRED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def install() -> None:
    """Put the finder in front of Python's own; call it before anything imports onnx_ir."""
    if "onnx_ir" not in sys.modules and not any(isinstance(finder, _Deferring) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Deferring())
