"""The pass `fold`: hidden units that compute the same are merged."""
