"""Exact passes: the model computes the same before and after."""
