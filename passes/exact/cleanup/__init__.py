"""The passes `clean-up` and `fold-batch-norm`: the same graph in fewer nodes."""
