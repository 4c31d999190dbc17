"""Text generation with nested models: any depth, early exits, self-speculation and draft trees.

Runs without Megatron.
"""
