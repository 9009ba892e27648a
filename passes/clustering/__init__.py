"""The pass `cluster`: related units become neighbours, and modules are named."""
