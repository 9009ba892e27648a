"""CIPM-IR: a compiler middle-end for neural networks that knows the symmetries of their weights.

    result = cipm_ir.optimize("model.onnx", passes=["canonicalize", "prune{macs=0.5}"], output="small.onnx")
    print(result.report)

Names are imported when they are first used, so that `import cipm_ir` is fast.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from cipm_ir import moved
from cipm_ir.errors import (
    CipmError,
    InputError,
    OptionError,
    OutputError,
    SymmetryError,
    UnsupportedError,
    VerificationError,
)
from cipm_ir.ir import deferred_imports
from cipm_ir.version import __version__

deferred_imports.install()
moved.install()
logging.getLogger("cipm_ir").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from cipm_ir import passes
    from cipm_ir.algebra import Element, Group
    from cipm_ir.api import Result, apply_plan, fingerprint, load, optimize, to_torch, torch_backend, verify
    from cipm_ir.ir_passes import IrPass
    from cipm_ir.symmetry.program import Program
    from cipm_ir.symmetry.space import Space

__all__ = [
    "CipmError",
    "Element",
    "Group",
    "InputError",
    "IrPass",
    "OptionError",
    "OutputError",
    "Program",
    "Result",
    "Space",
    "SymmetryError",
    "UnsupportedError",
    "VerificationError",
    "__version__",
    "apply_plan",
    "fingerprint",
    "load",
    "optimize",
    "passes",
    "statistics",
    "sweep",
    "to_torch",
    "torch_backend",
    "verify",
]

_HOMES = {
    "Element": "cipm_ir.algebra",
    "Group": "cipm_ir.algebra",
    "IrPass": "cipm_ir.ir_passes",
    "Program": "cipm_ir.symmetry.program",
    "Result": "cipm_ir.api",
    "Space": "cipm_ir.symmetry.space",
    "apply_plan": "cipm_ir.api",
    "fingerprint": "cipm_ir.api",
    "load": "cipm_ir.api",
    "optimize": "cipm_ir.api",
    "statistics": "cipm_ir.api",
    "sweep": "cipm_ir.sweeps",
    "to_torch": "cipm_ir.api",
    "torch_backend": "cipm_ir.api",
    "verify": "cipm_ir.api",
}


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("cipm_ir.passes")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'cipm_ir' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
