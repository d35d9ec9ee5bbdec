"""Evaluation on held-out tasks, robustness to perturbed conditioning, and reports."""
