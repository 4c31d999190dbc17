"""Reports of a run, written to console, JSON lines, TensorBoard and Weights & Biases."""
