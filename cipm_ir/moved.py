"""Old names of modules that other packages may import: each still works, with a `DeprecationWarning`."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "cipm_ir.backends.to_onnx": "cipm_ir.backends.onnx.save",
    "cipm_ir.backends.to_torch": "cipm_ir.backends.torch.emit",
    "cipm_ir.frontends.from_onnx": "cipm_ir.frontends.onnx.load",
    "cipm_ir.frontends.from_torch": "cipm_ir.frontends.torch.load",
    "cipm_ir.passes.base": "cipm_ir.passes.framework.base",
    "cipm_ir.passes.fingerprint": "cipm_ir.passes.exact.canonicalize.fingerprint",
    "cipm_ir.passes.importance": "cipm_ir.passes.pruning.importance.criteria",
    "cipm_ir.passes.options": "cipm_ir.passes.framework.options",
    "cipm_ir.passes.pipeline": "cipm_ir.passes.framework.pipeline",
    "cipm_ir.passes.registry": "cipm_ir.passes.framework.registry",
    "cipm_ir.passes.report": "cipm_ir.passes.framework.report",
    "cipm_ir.passes.text": "cipm_ir.passes.framework.parser",
    "cipm_ir.rules": "cipm_ir.ops",
    "cipm_ir.rules.context": "cipm_ir.ops.context",
    "cipm_ir.rules.costs": "cipm_ir.ops.costs",
    "cipm_ir.rules.events": "cipm_ir.ops.events",
    "cipm_ir.rules.registry": "cipm_ir.ops.registry",
    "cipm_ir.rules.resize": "cipm_ir.ops.resize",
    "cipm_ir.rules.steps": "cipm_ir.ops.steps",
    "cipm_ir.runtime.verify": "cipm_ir.runtime.verification.verify",
}


class _Moved(MetaPathFinder, Loader):
    """Loads an old name as a module that holds the very objects of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=fullname == "cipm_ir.rules") if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}.", DeprecationWarning, stacklevel=2)
        found = importlib.import_module(new)
        vars(module).update({name: value for name, value in vars(found).items() if not name.startswith("__")})


def install() -> None:
    """Put the finder in front of Python's own, which may take an empty folder of an old checkout for a package."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
