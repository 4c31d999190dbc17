"""Training data: indexed files and their preparation, samples, batches, identity of the data."""
