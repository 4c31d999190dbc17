"""What follows from the settings of adapters. All but the names suppose settings that `check_settings` has passed."""

from megatron_sorted.exits.ranks import draw_rank
from megatron_sorted.settings.derived import ffn_hidden_size, kv_channels, num_query_groups
from megatron_sorted.settings.run import Settings

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MUST_AGREE = ("lora_rank", "lora_alpha", "lora_targets")
"""Settings that say what the adapters of a checkpoint are; how they train may change."""


def is_adapter(name: str) -> bool:
    """Returns whether a parameter of this name is half of an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def target_shapes(settings: Settings) -> dict[str, tuple[int, int]]:
    """Returns {target: (rows, columns)} of the matrices that adapters can be put on."""
    heads, d, ffn = settings.num_attention_heads, kv_channels(settings), ffn_hidden_size(settings)
    rows = (heads + 2 * num_query_groups(settings)) * d
    return {"linear_qkv": (rows, settings.hidden_size), "linear_proj": (settings.hidden_size, heads * d),
            "linear_fc1": (ffn * (2 if settings.swiglu else 1), settings.hidden_size), "linear_fc2": (settings.hidden_size, ffn)}


def adapter_parameters(settings: Settings) -> int:
    """Returns the number of all adapters' parameters."""
    shapes = target_shapes(settings)
    return settings.num_layers * settings.lora_rank * sum(sum(shapes[target]) for target in settings.lora_targets if settings.lora_rank)


def nested_ranks(settings: Settings) -> tuple[int, ...]:
    """Returns the ranks the adapters can be used at: with DyLoRA those it draws, else the whole one."""
    if not settings.dylora:
        return (settings.lora_rank,)
    return tuple(sorted(settings.dylora_ranks)) or tuple(range(1, settings.lora_rank + 1))


def rank_at(settings: Settings, step: int) -> int:
    """Returns how many ranks of every adapter are used at ``step``; the same on every rank without talking."""
    return draw_rank(step, settings.seed, nested_ranks(settings))
