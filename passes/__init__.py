"""Decisions about spaces: the passes, the framework to write one's own, and the pipeline that runs them.

Names are imported when they are first used: most commands need few of the passes.
"""

if __name__ == "passes":
    raise ImportError("import cipm_ir.passes, not passes: the folder at the root is the source of that package")

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cipm_ir.passes.clustering.cluster import Cluster
    from cipm_ir.passes.exact.absorb_bias.absorb_bias import AbsorbBias
    from cipm_ir.passes.exact.affine.fold_affine import FoldAffine
    from cipm_ir.passes.exact.canonicalize.canonicalize import Canonicalize
    from cipm_ir.passes.exact.canonicalize.canonicalize_signs import CanonicalizeSigns
    from cipm_ir.passes.exact.cleanup.clean_up import CleanUp, FoldBatchNorm
    from cipm_ir.passes.exact.dead.remove_dead import RemoveDead
    from cipm_ir.passes.exact.equalize.equalize import Equalize
    from cipm_ir.passes.exact.expose.expose import Expose
    from cipm_ir.passes.exact.recover_names import RecoverNames
    from cipm_ir.passes.exact.rotate.rotate import Rotate
    from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, Progress, option
    from cipm_ir.passes.framework.figures import Bars, Curves, Figure, HeatMap, Rows
    from cipm_ir.passes.framework.onnx_ir_pass import OnnxIrPass
    from cipm_ir.passes.framework.parser import parse_passes, print_passes
    from cipm_ir.passes.framework.pipeline import Outcome, RolledBack, Witness, run_passes
    from cipm_ir.passes.framework.registry import Listing, listing, lookup, names, register
    from cipm_ir.passes.framework.report import Report, Step, Totals
    from cipm_ir.passes.merging.fold import Fold
    from cipm_ir.passes.pruning.compress.compress import Compress
    from cipm_ir.passes.pruning.prune import Prune

__all__ = [
    "AbsorbBias",
    "Bars",
    "Canonicalize",
    "CanonicalizeSigns",
    "CleanUp",
    "Cluster",
    "Compress",
    "Context",
    "Curves",
    "Equalize",
    "Expose",
    "Figure",
    "Fold",
    "FoldAffine",
    "FoldBatchNorm",
    "HeatMap",
    "Kind",
    "Listing",
    "OnnxIrPass",
    "Outcome",
    "Pass",
    "PassResult",
    "Progress",
    "Prune",
    "RecoverNames",
    "RemoveDead",
    "Report",
    "RolledBack",
    "Rotate",
    "Rows",
    "Step",
    "Totals",
    "Witness",
    "listing",
    "lookup",
    "names",
    "option",
    "parse_passes",
    "print_passes",
    "register",
    "run_passes",
]

_HOMES = {
    "AbsorbBias": "exact.absorb_bias.absorb_bias",
    "Bars": "framework.figures",
    "Canonicalize": "exact.canonicalize.canonicalize",
    "CanonicalizeSigns": "exact.canonicalize.canonicalize_signs",
    "CleanUp": "exact.cleanup.clean_up",
    "Cluster": "clustering.cluster",
    "Compress": "pruning.compress.compress",
    "Context": "framework.base",
    "Curves": "framework.figures",
    "Equalize": "exact.equalize.equalize",
    "Expose": "exact.expose.expose",
    "Figure": "framework.figures",
    "Fold": "merging.fold",
    "FoldAffine": "exact.affine.fold_affine",
    "FoldBatchNorm": "exact.cleanup.clean_up",
    "HeatMap": "framework.figures",
    "Kind": "framework.base",
    "Listing": "framework.registry",
    "OnnxIrPass": "framework.onnx_ir_pass",
    "Outcome": "framework.pipeline",
    "Pass": "framework.base",
    "PassResult": "framework.base",
    "Progress": "framework.base",
    "Prune": "pruning.prune",
    "RecoverNames": "exact.recover_names",
    "RemoveDead": "exact.dead.remove_dead",
    "Report": "framework.report",
    "RolledBack": "framework.pipeline",
    "Rotate": "exact.rotate.rotate",
    "Rows": "framework.figures",
    "Step": "framework.report",
    "Totals": "framework.report",
    "Witness": "framework.pipeline",
    "listing": "framework.registry",
    "lookup": "framework.registry",
    "names": "framework.registry",
    "option": "framework.base",
    "parse_passes": "framework.parser",
    "print_passes": "framework.parser",
    "register": "framework.registry",
    "run_passes": "framework.pipeline",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'cipm_ir.passes' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"cipm_ir.passes.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
