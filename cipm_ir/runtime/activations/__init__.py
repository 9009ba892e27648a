"""Inner values of a model over data, and products with a weight as least-squares problems."""
