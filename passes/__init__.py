"""Decisions about spaces: the passes, the framework to write one's own, and the pipeline that runs them.

Names are imported when they are first used: most commands need few of the passes.
"""

if __name__ == "passes":
    raise ImportError("import cipm_ir.passes, not passes: the folder at the root is the source of that package")

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cipm_ir.passes.absorb_bias import AbsorbBias
    from cipm_ir.passes.base import Context, Kind, Pass, PassResult, Progress, option
    from cipm_ir.passes.canonicalize import Canonicalize
    from cipm_ir.passes.canonicalize_signs import CanonicalizeSigns
    from cipm_ir.passes.cleanup import CleanUp, FoldBatchNorm
    from cipm_ir.passes.cluster import Cluster
    from cipm_ir.passes.compress import Compress
    from cipm_ir.passes.equalize import Equalize
    from cipm_ir.passes.expose import Expose
    from cipm_ir.passes.figures import Bars, Curves, Figure, HeatMap, Rows
    from cipm_ir.passes.fold import Fold
    from cipm_ir.passes.fold_affine import FoldAffine
    from cipm_ir.passes.pipeline import Outcome, RolledBack, Witness, run_passes
    from cipm_ir.passes.prune import Prune
    from cipm_ir.passes.recover_names import RecoverNames
    from cipm_ir.passes.registry import Listing, listing, lookup, names, register
    from cipm_ir.passes.remove_dead import RemoveDead
    from cipm_ir.passes.report import Report, Step, Totals
    from cipm_ir.passes.rotate import Rotate
    from cipm_ir.passes.text import parse_passes, print_passes

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
    "AbsorbBias": "absorb_bias",
    "Bars": "figures",
    "Canonicalize": "canonicalize",
    "CanonicalizeSigns": "canonicalize_signs",
    "CleanUp": "cleanup",
    "Cluster": "cluster",
    "Compress": "compress",
    "Context": "base",
    "Curves": "figures",
    "Equalize": "equalize",
    "Expose": "expose",
    "Figure": "figures",
    "Fold": "fold",
    "FoldAffine": "fold_affine",
    "FoldBatchNorm": "cleanup",
    "HeatMap": "figures",
    "Kind": "base",
    "Listing": "registry",
    "Outcome": "pipeline",
    "Pass": "base",
    "PassResult": "base",
    "Progress": "base",
    "Prune": "prune",
    "RecoverNames": "recover_names",
    "RemoveDead": "remove_dead",
    "Report": "report",
    "RolledBack": "pipeline",
    "Rotate": "rotate",
    "Rows": "figures",
    "Step": "report",
    "Totals": "report",
    "Witness": "pipeline",
    "listing": "registry",
    "lookup": "registry",
    "names": "registry",
    "option": "base",
    "parse_passes": "text",
    "print_passes": "text",
    "register": "registry",
    "run_passes": "pipeline",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'cipm_ir.passes' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"cipm_ir.passes.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
