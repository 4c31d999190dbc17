"""What follows from the settings of adapters. All but the names suppose settings that `check_settings` has passed."""

from megatron_sorted.exits.chance import draw_rank
from megatron_sorted.settings.field import AllSettings
from megatron_sorted.settings.matrices import layer_shapes

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MUST_AGREE = ("lora_rank", "lora_alpha", "lora_targets")
"""AllSettings that say what the adapters of a checkpoint are; how they train may change."""


def is_adapter(name: str) -> bool:
    """Returns whether a parameter of this name is half of an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def adapter_parameters(settings: AllSettings) -> int:
    """Returns the number of all adapters' parameters."""
    shapes = layer_shapes(settings).matrices
    return (
        settings.num_layers
        * settings.lora_rank
        * sum(sum(shapes[target]) for target in settings.lora_targets if settings.lora_rank)
    )


def nested_ranks(settings: AllSettings) -> tuple[int, ...]:
    """Returns the ranks the adapters can be used at: with DyLoRA those it draws, else the whole one."""
    if not settings.dylora:
        return (settings.lora_rank,)
    return tuple(sorted(settings.dylora_ranks)) or tuple(range(1, settings.lora_rank + 1))


def rank_at(settings: AllSettings, step: int) -> int:
    """Returns how many ranks of every adapter are used at ``step``; the same on every rank without talking."""
    return draw_rank(step, settings.seed, nested_ranks(settings))
