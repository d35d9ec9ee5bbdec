"""Ahead-of-time compilation for TPUs: memory, FLOPs, traffic and time of a step."""
