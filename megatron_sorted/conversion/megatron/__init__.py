"""Checkpoints of Megatron-core, Megatron-LM and MindSpeed, read and written tensor by tensor."""
