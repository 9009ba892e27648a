"""Decisions about spaces: the passes, the framework to write one's own, and the pipeline that runs them."""

if __name__ == "passes":
    raise ImportError("import cipm_ir.passes, not passes: the folder at the root is the source of that package")

from cipm_ir.passes.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.registry import listing, lookup, names, register

__all__ = ["Context", "Kind", "Pass", "PassResult", "listing", "lookup", "names", "option", "register"]
