"""Tests, checkpoints and a fine-tuning under every supported version of megatron-core."""
