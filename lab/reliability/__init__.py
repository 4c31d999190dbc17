"""A run that is killed at random moments, and its comparison with one that is not."""
