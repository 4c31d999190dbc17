"""Many texts at once: each is decoded by its own strategy, and their forward passes are joined."""
