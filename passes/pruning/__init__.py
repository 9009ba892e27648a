"""Structured pruning: what to remove, how to stay within a budget, and how to make up for it."""
