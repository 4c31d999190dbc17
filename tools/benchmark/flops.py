"""Floating point operations of one training step, counted from the sizes."""

from megatron_sorted.settings.derived import ffn_hidden_size, kv_channels, num_query_groups, padded_vocab_size
from megatron_sorted.settings.run import Settings


def forward_flops_per_token(settings: Settings) -> tuple[int, int]:
    """Returns (one layer, one head): two operations for each multiplication of the matrix products in forward.

    Attention is counted over the whole square, as megatron-core's own counting does, although half of it is masked: layers then
    look dearer than they are, and the bound on the time of exits gets stricter.
    """
    h, heads, groups, d = settings.hidden_size, settings.num_attention_heads, num_query_groups(settings), kv_channels(settings)
    projections = 2 * h * d * (heads + 2 * groups) + 2 * heads * d * h
    mlp = 2 * h * ffn_hidden_size(settings) * (3 if settings.swiglu else 2)
    return projections + attention_flops_per_token(settings) + mlp, 2 * h * padded_vocab_size(settings.vocab_size, settings)


def attention_flops_per_token(settings: Settings) -> int:
    """Returns those of queries x keys and probabilities x values in one layer."""
    return 2 * 2 * settings.seq_length * settings.num_attention_heads * kv_channels(settings)


def step_attention_flops(settings: Settings) -> int:
    """Returns the part of ``step_flops`` that attention's two products take."""
    return 3 * settings.global_batch_size * settings.seq_length * settings.num_layers * attention_flops_per_token(settings)


def step_flops(settings: Settings, num_heads: int) -> int:
    """Returns the operations of one step with ``num_heads`` heads; backward takes twice those of forward."""
    layer, head = forward_flops_per_token(settings)
    tokens = settings.global_batch_size * settings.seq_length
    return 3 * tokens * (settings.num_layers * layer + num_heads * head)
