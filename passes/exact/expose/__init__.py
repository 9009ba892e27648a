"""The pass `expose`: rewrites of a graph that enlarge its symmetry group."""
