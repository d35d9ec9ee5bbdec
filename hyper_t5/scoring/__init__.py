"""Metrics of predictions: pure functions of rows, without JAX."""
