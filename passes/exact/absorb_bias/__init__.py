"""The pass `absorb-bias`: large constants move through a Relu into the biases of its consumers."""
