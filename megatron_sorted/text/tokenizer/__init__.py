"""Tokenizers: their files, the contract that every reading of them keeps, and how they are opened."""
