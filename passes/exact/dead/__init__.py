"""The pass `remove-dead`, and the analysis of units that cannot contribute."""
