"""What vLLM calls at the start of every process (entry point ``vllm.general_plugins``)."""

from megatron_sorted.serving.vllm.exits import ARCHITECTURES, NESTED


def register() -> None:
    """Make our model classes known to vLLM under names of their own; its own stay as they are.

    vLLM may call this several times in a process.
    """
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        if NESTED + name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(
                NESTED + name, f"megatron_sorted.serving.vllm.models:{NESTED}{name}"
            )
