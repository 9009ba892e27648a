"""Readers: what turns a file or an object of another framework into the graph IR."""

if __name__ == "frontends":
    raise ImportError("import cipm_ir.frontends, not frontends: the folder at the root is the source of that package")
