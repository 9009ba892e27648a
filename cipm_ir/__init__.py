"""CIPM-IR: a compiler middle-end for neural networks that knows the symmetries of their weights."""
