"""Environments for vLLM's build for CPUs, whose packages do not fit beside those of the trainer."""
