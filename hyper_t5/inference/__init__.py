"""Adapters and predictions from a trained run: the Predictor, the batching engine, files."""
