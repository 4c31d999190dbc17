"""Tokenizer files and prompt forms that go out with a model."""
