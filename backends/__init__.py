"""Writers: what turns the graph IR back into a file or an object of another framework."""

if __name__ == "backends":
    raise ImportError("import cipm_ir.backends, not backends: the folder at the root is the source of that package")
