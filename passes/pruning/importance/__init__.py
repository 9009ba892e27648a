"""Importance of hidden units: the criteria by which `prune` ranks them."""
