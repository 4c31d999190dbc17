"""Nested language models on megatron-core: every prefix of the layers is a working sub-model."""

from megatron_sorted.triton_stand_in import install_finder

__version__ = "0.15.0"

install_finder()  # before anything here imports megatron
