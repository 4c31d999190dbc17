"""Floating point operations of one training step, counted from the sizes."""

from megatron_sorted.settings.costs import layer_parameters
from megatron_sorted.settings.derived import kv_channels, padded_vocab_size
from megatron_sorted.settings.run import Settings


def forward_flops_per_token(settings: Settings) -> tuple[int, int]:
    """Return the operations of (one layer, one head) in forward, two for each multiplication.

    Attention is counted over the whole square, as megatron-core does, although half of it is
    masked: layers then look dearer than they are, and the bound on the time of exits is stricter.
    """
    head = 2 * settings.hidden_size * padded_vocab_size(settings.vocab_size, settings)
    return 2 * layer_parameters(settings)[0] + attention_flops_per_token(settings), head


def attention_flops_per_token(settings: Settings) -> int:
    """Return the operations of queries x keys and probabilities x values in one layer."""
    return 2 * 2 * settings.seq_length * settings.num_attention_heads * kv_channels(settings)


def step_attention_flops(settings: Settings) -> int:
    """Return the part of ``step_flops`` that attention's two products take."""
    return (
        3
        * settings.global_batch_size
        * settings.seq_length
        * settings.num_layers
        * attention_flops_per_token(settings)
    )


def step_flops(settings: Settings, num_heads: int) -> int:
    """Return the operations of a step with ``num_heads`` heads; backward is twice forward."""
    layer, head = forward_flops_per_token(settings)
    tokens = settings.global_batch_size * settings.seq_length
    return 3 * tokens * (settings.num_layers * layer + num_heads * head)
