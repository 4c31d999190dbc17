"""One training step of this rank: the model, the forward step, exits and the optimizer."""
