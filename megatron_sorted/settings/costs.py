"""Parameters and operations of every sub-model, counted from the settings."""

from megatron_sorted.settings.derived import exit_depths, ffn_hidden_size, kv_channels, max_position_embeddings, num_query_groups
from megatron_sorted.settings.lora import adapter_parameters
from megatron_sorted.settings.run import Settings


def layer_parameters(settings: Settings) -> tuple[int, int]:
    """Returns the weights of one layer's matrices that one token uses, and all parameters of the layer.

    With experts a token uses ``moe_router_topk`` of them.
    """
    h, d = settings.hidden_size, kv_channels(settings)
    query, key_value = settings.num_attention_heads * d, 2 * num_query_groups(settings) * d
    attention = h * (query + key_value) + query * h
    width = (settings.moe_ffn_hidden_size or ffn_hidden_size(settings)) if settings.num_experts else ffn_hidden_size(settings)
    mlp = h * width * (3 if settings.swiglu else 2)
    norms = (1 if settings.normalization == "RMSNorm" else 2) * (2 * h + (2 * d if settings.qk_layernorm else 0))
    bias = 0
    if not settings.disable_bias_linear:
        bias = query + key_value + h + width * (2 if settings.swiglu else 1) + h
    elif settings.add_qkv_bias:
        bias = query + key_value
    if not settings.num_experts:
        return attention + mlp, attention + mlp + norms + bias
    router = h * settings.num_experts
    return attention + settings.moe_router_topk * mlp + router, attention + settings.num_experts * mlp + router + norms + bias


def sub_model_parameters(settings: Settings, vocab_size: int) -> dict[int, int]:
    """Returns {depth: parameters of the sub-model}: embedding, first layers, one norm and one head (none of its own when tied)."""
    h = settings.hidden_size
    outside = vocab_size * h * (2 if settings.untie_embeddings_and_output_weights else 1)
    outside += h if settings.normalization == "RMSNorm" else 2 * h
    if settings.position_embedding_type == "learned_absolute":
        outside += max_position_embeddings(settings) * h
    return {depth: outside + depth * layer_parameters(settings)[1] for depth in exit_depths(settings)}


def forward_flops_per_token(settings: Settings, vocab_size: int, seq_length: int | None = None) -> dict[int, int]:
    """Returns {depth: operations of the sub-model's forward pass for one token}, a multiply-add counting 2.

    Attention is counted at its mean over a causal sequence: half of ``seq_length`` (by default the run's); with a sliding window ``w``,
    where a token sees at most ``w`` others, that is w - w**2 / (2 * seq_length).
    """
    length = seq_length or settings.seq_length
    window = min(settings.sliding_window or length, length)
    seen_twice = 2 * window - window * window // length
    attention = 2 * seen_twice * settings.num_attention_heads * kv_channels(settings)  # scores and values, each 2 * seen * width
    layer = 2 * layer_parameters(settings)[0] + attention
    return {depth: depth * layer + 2 * settings.hidden_size * vocab_size for depth in exit_depths(settings)}


def train_flops_per_token(settings: Settings, vocab_size: int, num_exits: int | None = None, depth: int | None = None) -> int:
    """Returns operations of forward and backward for one token with ``num_exits`` heads (by default every exit's) up to ``depth``."""
    depth = depth or settings.num_layers
    heads = len(exit_depths(settings)) if num_exits is None else num_exits
    head = 2 * settings.hidden_size * vocab_size
    layers = forward_flops_per_token(settings, vocab_size)[settings.num_layers] - head
    trained = 3 * layers * depth // settings.num_layers + 3 * heads * head
    if not settings.lora_rank:
        return trained
    # no gradients of frozen matrices: the layers', and the heads' but those that exits own
    num_frozen = min(heads, 1) if settings.untie_exit_output_weights else heads
    adapters = 6 * adapter_parameters(settings) * depth // settings.num_layers
    return trained - 2 * layer_parameters(settings)[0] * depth - num_frozen * head + adapters
