"""The versions of operators that a model imports."""

from __future__ import annotations

import onnx_ir as ir

_ALIAS = "ai.onnx"


def name_standard_domain(model: ir.Model) -> None:
    """Import the standard operators under "", in place, where a file says "ai.onnx".

    onnx_ir gives every node the first name; a look-up of the version under that name would find none.
    """
    for imports in (model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if _ALIAS in imports:
            version = imports.pop(_ALIAS)
            imports.setdefault("", version)
