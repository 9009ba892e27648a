"""The canonical form of a model under its symmetry group, signs and fingerprints included."""
