"""Inputs of models: the data that a user gives, and inputs made up from what a model declares."""
