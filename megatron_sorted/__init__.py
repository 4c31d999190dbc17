"""Nested language models on megatron-core: every prefix of the layers is a working sub-model."""

__version__ = "0.10.0"
