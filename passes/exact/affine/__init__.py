"""Constant scales and shifts, folded into the products before or after them."""
