"""Reports to console, JSON lines, TensorBoard and Weights & Biases."""
