"""Hypermodels for T5: read a task once, emit adapters, run the frozen backbone with them."""

__version__ = "0.1.0"
