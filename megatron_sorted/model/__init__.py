"""The network: Megatron's configuration from settings, and a model chunk with its exits."""
