"""Tokenizers, indexed files, packed samples, batches."""
