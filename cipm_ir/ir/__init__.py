"""Part of CIPM-IR."""
