"""Budgets: what a choice of units costs, and the search for the largest model that fits."""
