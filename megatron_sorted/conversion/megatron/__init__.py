"""Checkpoints of Megatron-core, Megatron-LM and MindSpeed, one tensor at a time."""
