"""Tokenizers: their files, the contract of every implementation, and how one is opened."""
