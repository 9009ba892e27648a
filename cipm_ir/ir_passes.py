"""Passes of this package as a pass of `onnx_ir.passes`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from cipm_ir.api import optimize
from cipm_ir.passes.framework.parser import Passes
from cipm_ir.passes.framework.report import Report


class IrPass(ir.passes.FunctionalPass):
    """Run `cipm_ir.optimize` as one pass of an onnx_ir pipeline: the model that comes in stays as it is.

    Attributes:
        report: of the last call.
    """

    report: Report | None = None

    def __init__(self, passes: Passes | None = None, **options: Any) -> None:
        """Keep what to run.

        Args:
            passes: as for `cipm_ir.optimize`; None runs the default passes.
            options: further keywords of `cipm_ir.optimize`: ``data``, ``seed``, ``verify``, ``on_failure``, ...
        """
        super().__init__()
        self._passes, self._options = passes, options

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the optimized model, and whether any pass changed it."""
        result = optimize(model, self._passes, **self._options)
        self.report = result.report
        changed = any(step.changed and not step.skipped for step in result.report.steps)
        return ir.passes.PassResult(result.model, changed)
