"""Interval analysis: bounds of every value of a graph, without data."""
