"""Checkpoints to and from Hugging Face directories, tensor by tensor; sub-models cut out. Needs torch and safetensors, no megatron."""
