"""Differential verification: two programs run on the same inputs and may differ by the first one's rounding."""
