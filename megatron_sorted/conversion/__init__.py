"""Conversion of checkpoints to and from Hugging Face directories, tensor by tensor.

Also sub-models cut out of nested models. Needs torch and safetensors, no Megatron.
"""
