"""Placeholder docstring: replaced by the owner of this folder."""

if __name__ == "passes":
    raise ImportError("import cipm_ir.passes, not passes: the folder at the root is the source of that package")
