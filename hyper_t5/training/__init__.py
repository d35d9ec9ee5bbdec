"""Training: the step, the loop around it, losses, optimizers, metrics."""
