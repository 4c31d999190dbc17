"""Settings of the network: sizes and shape of the decoder, with their rules.

The defaults are those of the LLaMA family.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.derived import (
    ffn_hidden_size,
    max_position_embeddings,
    num_query_groups,
)
from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require, require_divides


@dataclass(frozen=True)
class ModelSettings:
    """Sizes and shape of the decoder, named as in Megatron-LM."""

    num_layers: int = setting(8, "Number of transformer layers; also the depth of the last exit.")
    hidden_size: int = setting(256, "Width of the hidden state.")
    ffn_hidden_size: int | None = setting(
        None,
        "Width of the MLP; by default 4 x hidden size, or 8/3 of it (rounded up to 64) with "
        "SwiGLU.",
    )
    num_attention_heads: int = setting(8, "Number of attention heads.")
    kv_channels: int | None = setting(
        None, "Width of one attention head; by default hidden size / heads."
    )
    group_query_attention: bool = setting(
        False, "Share key/value heads between groups of query heads (needs --num-query-groups)."
    )
    num_query_groups: int | None = setting(
        None, "Number of key/value heads with --group-query-attention."
    )
    seq_length: int = setting(256, "Number of tokens in one training sample.")
    max_position_embeddings: int | None = setting(
        None, "Longest sequence the model can be used with; by default --seq-length."
    )
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = setting(
        "rope",
        "Position embedding: rotary, learned absolute, or none; yarn means rope with "
        "--rope-scaling-type yarn, as in Megatron-LM.",
    )
    sliding_window: int | None = setting(
        None,
        "Number of tokens that a token attends to, itself included, the same in every layer "
        "(Mistral 7B v0.1); by default all before it.",
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = setting("RMSNorm", "Type of normalization.")
    norm_epsilon: float = setting(1e-5, "Epsilon of the normalization.")
    use_sandwich_norm: bool = setting(
        False,
        "Also normalise the outputs of attention and MLP before they are added to the hidden "
        "state (PanGu).",
    )
    attn_post_norm_scale: float = setting(
        1.0, "With --use-sandwich-norm: initial weight of the norm after attention."
    )
    ffn_post_norm_scale: float = setting(
        1.0, "With --use-sandwich-norm: initial weight of the norm after the MLP."
    )
    swiglu: bool = setting(True, "Gated MLP with SiLU (LLaMA); --no-swiglu gives a GELU MLP.")
    disable_bias_linear: bool = setting(True, "Use no bias in linear layers.")
    add_qkv_bias: bool = setting(
        False, "Use a bias in the query/key/value projection only (Qwen2)."
    )
    qk_layernorm: bool = setting(False, "Normalise queries and keys (Qwen3).")
    untie_embeddings_and_output_weights: bool = setting(
        False, "Give the output head a matrix of its own instead of the embedding's."
    )
    make_vocab_size_divisible_by: int = setting(
        128, "Pad the vocabulary to a multiple of this number x tensor parallel size."
    )
    vocab_size: int | None = setting(
        None, "Size of the vocabulary before padding; by default the tokenizer's."
    )
    init_method_std: float = setting(0.02, "Standard deviation of the initial weights.")
    hidden_dropout: float = setting(0.0, "Dropout on the hidden state.")
    attention_dropout: float = setting(0.0, "Dropout on attention probabilities.")
    num_experts: int | None = setting(
        None, "Number of experts of a mixture-of-experts MLP; none by default."
    )
    moe_router_topk: int = setting(
        2,
        "Number of experts that each token is sent to. Their outputs are weighed by the router's "
        "softmax over them; a single one by its share of the softmax over all experts.",
    )
    moe_ffn_hidden_size: int | None = setting(
        None, "MLP width of one expert; by default --ffn-hidden-size."
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = setting(
        "allgather",
        "How tokens are sent to their experts: every token to all expert parallel ranks, or with "
        "alltoall each to its experts' ranks alone, which sends less.",
    )
    moe_aux_loss_coeff: float = setting(0.0, "Coefficient of the router's load-balancing loss.")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = setting(
        "auto",
        "Implementation of the layers: plain PyTorch (local) or Transformer Engine. 'auto' "
        "chooses Transformer Engine on CUDA if it is installed.",
    )


def check_model(settings: AllSettings) -> None:
    """Check that the network's sizes fit each other and tensor parallelism.

    Raises:
        SettingsError: They do not.
    """
    heads, tp = settings.num_attention_heads, settings.tensor_model_parallel_size
    if settings.kv_channels is None:
        require_divides(
            settings.hidden_size,
            "--hidden-size",
            heads,
            "--num-attention-heads",
            "Change one of them, or give the width of a head with --kv-channels.",
        )
    require(
        settings.group_query_attention == (settings.num_query_groups is not None),
        f"--num-query-groups: {settings.num_query_groups} with --group-query-attention "
        f"{'on' if settings.group_query_attention else 'off'}. Give both or neither.",
    )
    groups = num_query_groups(settings)
    require_divides(
        heads,
        "--num-attention-heads",
        groups,
        "--num-query-groups",
        "Every group has the same number of heads; change one.",
    )
    require_divides(
        heads, "--num-attention-heads", tp, "--tensor-model-parallel-size", "Change one of them."
    )
    require_divides(
        groups,
        "--num-query-groups",
        tp,
        "--tensor-model-parallel-size",
        "Each rank needs whole key/value heads; change one.",
    )
    require_divides(
        ffn_hidden_size(settings),
        "--ffn-hidden-size",
        tp,
        "--tensor-model-parallel-size",
        "Change one of them.",
    )
    _check_sandwich(settings)
    require(
        settings.sliding_window is None
        or settings.seq_length <= settings.sliding_window
        or settings.context_parallel_size == 1,
        f"--sliding-window: {settings.sliding_window} is shorter than --seq-length "
        f"{settings.seq_length}, and attention across context parallel processes "
        f"(--context-parallel-size {settings.context_parallel_size}) sees the whole sequence. Use "
        "--context-parallel-size 1.",
    )
    require(
        max_position_embeddings(settings) >= settings.seq_length,
        f"--max-position-embeddings: {settings.max_position_embeddings} is less than --seq-length "
        f"{settings.seq_length}. Raise it or leave it out.",
    )


def _check_sandwich(settings: AllSettings) -> None:
    """Check that settings of the norms after attention and MLP have an effect."""
    for name in ("attn_post_norm_scale", "ffn_post_norm_scale"):
        require(
            settings.use_sandwich_norm or getattr(settings, name) == 1.0,
            f"{flag_of(name)}: {getattr(settings, name)} has no effect without "
            "--use-sandwich-norm. Give that as well, or leave it out.",
        )
    require(
        not settings.use_sandwich_norm or settings.num_experts is None,
        f"--use-sandwich-norm: not supported with experts (--num-experts {settings.num_experts}). "
        "Leave one of them out.",
    )


def check_experts(settings: AllSettings, world_size: int) -> None:
    """Check that the experts can be split over the ranks.

    Raises:
        SettingsError: They cannot.
    """
    experts, tp, expert_size = (
        settings.num_experts,
        settings.tensor_model_parallel_size,
        settings.expert_model_parallel_size,
    )
    if experts is None:
        require(
            expert_size == 1,
            f"--expert-model-parallel-size: {expert_size} without experts. Give --num-experts or "
            "leave it at 1.",
        )
        return
    require_divides(
        experts, "--num-experts", expert_size, "--expert-model-parallel-size", "Change one of them."
    )
    require(
        settings.moe_router_topk <= experts,
        f"--moe-router-topk: {settings.moe_router_topk} of {experts} experts (--num-experts). "
        "Lower it.",
    )
    require_divides(
        world_size,
        "number of processes",
        tp * settings.pipeline_model_parallel_size * expert_size,
        "tensor x pipeline x expert parallel size",
        "Change the sizes or start another number of processes.",
    )
    if settings.moe_ffn_hidden_size is not None:
        require_divides(
            settings.moe_ffn_hidden_size,
            "--moe-ffn-hidden-size",
            tp,
            "--tensor-model-parallel-size",
            "Change one of them.",
        )
    if tp > 1:
        require(
            settings.sequence_parallel,
            f"--tensor-model-parallel-size: {tp} with experts needs --sequence-parallel (megatron "
            "refuses to train without it). Switch it on.",
        )
        require(
            settings.disable_bias_linear,
            "--no-disable-bias-linear: experts with biases cannot be split "
            f"(--tensor-model-parallel-size {tp}). Leave one of them out.",
        )
