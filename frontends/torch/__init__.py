"""torch in: modules, FX graphs and exported programs become the graph IR."""
