"""The pass `equalize`: scales that make weights easy to quantize."""
