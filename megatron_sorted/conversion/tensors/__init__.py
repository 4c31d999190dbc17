"""Tensors of models on disk: sources, the correspondence of names, merged adapters, memory."""
