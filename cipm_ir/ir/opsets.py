"""The versions of operators that a model imports."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

_ALIAS = "ai.onnx"


def standard_name(domain: str) -> str:
    """Return the name of a domain in this project: the standard operators of a file are "" under either name.

    Nodes of onnx_ir need no look at this: they are given "" when they are made.
    """
    return "" if domain == _ALIAS else domain


def standard_version(imports: Mapping[str, int], default: int = 0) -> int:
    """Return the version of the standard operators that a model, graph or function imports."""
    return int(imports.get("", imports.get(_ALIAS, default)))


def name_standard_domain(model: ir.Model) -> None:
    """Import the standard operators under "", in place, where a file says "ai.onnx".

    onnx_ir gives every node the first name; a look-up of the version under that name would find none.
    """
    for imports in (model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if _ALIAS in imports:
            version = imports.pop(_ALIAS)
            imports.setdefault("", version)
