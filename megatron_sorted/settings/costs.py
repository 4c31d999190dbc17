"""Parameters and operations of every sub-model, counted from the settings."""

from collections.abc import Collection

from megatron_sorted.settings.derived import exit_depths, kv_channels, max_position_embeddings
from megatron_sorted.settings.field import AllSettings
from megatron_sorted.settings.lora import adapter_parameters
from megatron_sorted.settings.matrices import layer_shapes


def layer_parameters(settings: AllSettings) -> tuple[int, int]:
    """Return (weights that one token uses, all parameters) of one layer.

    The first number counts matrices alone; with experts a token uses ``moe_router_topk`` of them.
    """
    if not settings.num_experts:
        shapes = layer_shapes(settings)
        return shapes.products(), shapes.parameters(settings)
    shapes = layer_shapes(settings, ffn=settings.moe_ffn_hidden_size)
    mlp, router = shapes.products(with_attention=False), settings.hidden_size * settings.num_experts
    has_biases = not settings.disable_bias_linear
    biases, router_biases = (
        (shapes.fc1 + shapes.hidden) * has_biases,
        settings.num_experts * has_biases,
    )
    return (
        shapes.products() + (settings.moe_router_topk - 1) * mlp + router,
        shapes.parameters(settings)
        + (settings.num_experts - 1) * (mlp + biases)
        + router
        + router_biases,
    )


def part_parameters(settings: AllSettings) -> tuple[int, int]:
    """Return (weights of matrices, all parameters) of the parts an intermediate exit owns.

    These are the parts before its norm.
    """
    adapter, shapes = 2 * settings.hidden_size * settings.exit_adapter_rank, layer_shapes(settings)
    if settings.use_exit_block:
        weights, total = layer_parameters(settings)
        return adapter + weights, adapter + total
    if settings.use_exit_mlp:
        return adapter + shapes.products(with_attention=False), adapter + shapes.parameters(
            settings, with_attention=False
        )
    return adapter, adapter


def sub_model_parameters(settings: AllSettings, vocab_size: int) -> dict[int, int]:
    """Return {depth: number of parameters of the sub-model}.

    It consists of the embedding, the first layers, the exit's own parts, one norm and one head
    (which is the embedding where both are tied).
    """
    h = settings.hidden_size
    outside = vocab_size * h * (2 if settings.untie_embeddings_and_output_weights else 1)
    outside += layer_shapes(settings).norm
    if settings.position_embedding_type == "learned_absolute":
        outside += max_position_embeddings(settings) * h
    return {
        depth: outside
        + depth * layer_parameters(settings)[1]
        + (depth < settings.num_layers) * part_parameters(settings)[1]
        for depth in exit_depths(settings)
    }


def forward_flops_per_token(
    settings: AllSettings, vocab_size: int, seq_length: int | None = None
) -> dict[int, int]:
    """Return {depth: operations of the sub-model's forward pass for one token}.

    A multiply-add counts 2. Attention is counted at its mean over a causal sequence: half of
    ``seq_length`` (by default the run's); with a sliding window ``w``, where a token sees at most
    ``w`` others, that is w - w**2 / (2 * seq_length).
    """
    layer, head, part = _token_flops(settings, vocab_size, seq_length or settings.seq_length)
    return {
        depth: depth * layer + head + (depth < settings.num_layers) * part
        for depth in exit_depths(settings)
    }


def _token_flops(settings: AllSettings, vocab_size: int, length: int) -> tuple[int, int, int]:
    """Return forward operations for one token: of a layer, of a head, of an exit's own parts."""
    window = min(settings.sliding_window or length, length)
    seen_twice = 2 * window - window * window // length
    # scores and values, each 2 * seen * width
    attention = 2 * seen_twice * settings.num_attention_heads * kv_channels(settings)
    part = 2 * part_parameters(settings)[0] + (attention if settings.use_exit_block else 0)
    return (
        2 * layer_parameters(settings)[0] + attention,
        2 * settings.hidden_size * vocab_size,
        part,
    )


def train_flops_per_token(
    settings: AllSettings,
    vocab_size: int,
    depths: Collection[int] | None = None,
    deepest: int | None = None,
) -> int:
    """Return the operations of forward and backward for one token.

    With --tune-exit layers have no backward; a frozen matrix, also under adapters, has none for its
    weights.

    Args:
        settings: The run.
        vocab_size: Real tokens, without padding.
        depths: The exits that train; by default all that can.
        deepest: The number of layers that are run; by default all.
    """
    layer, head, part = _token_flops(settings, vocab_size, settings.seq_length)
    depths = (
        exit_depths(settings)[: -1 if settings.tune_exit else None] if depths is None else depths
    )
    deepest = deepest or settings.num_layers
    own = sum(depth < settings.num_layers for depth in depths)
    own_heads = own if settings.untie_exit_output_weights else 0
    frozen = settings.tune_exit or settings.lora_rank > 0
    heads = 3 * own_heads * head + (2 if frozen else 3) * (len(depths) - own_heads) * head
    layers = deepest * layer * (1 if settings.tune_exit else 3)
    if settings.lora_rank:
        layers += (
            6 * adapter_parameters(settings) * deepest // settings.num_layers
            - 2 * layer_parameters(settings)[0] * deepest
        )
    return layers + heads + 3 * own * part
