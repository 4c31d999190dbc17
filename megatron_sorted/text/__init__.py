"""Tokenizers, and how a conversation becomes tokens."""
