"""What network a run trains: sizes and shape of the decoder. Defaults are those of the LLaMA family."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class ModelSettings:
    """Sizes and shape of the decoder, in Megatron-LM's words."""

    num_layers: int = setting(8, "Number of transformer layers; also the depth of the last exit.")
    hidden_size: int = setting(256, "Width of the hidden state.")
    ffn_hidden_size: int | None = setting(
        None, "Width of the MLP; by default 4 x hidden size, or 8/3 of it (rounded up to 64) with SwiGLU.")
    num_attention_heads: int = setting(8, "Number of attention heads.")
    kv_channels: int | None = setting(None, "Width of one attention head; by default hidden size / heads.")
    group_query_attention: bool = setting(False, "Share key/value heads between groups of query heads (needs --num-query-groups).")
    num_query_groups: int | None = setting(None, "Number of key/value heads with --group-query-attention.")
    seq_length: int = setting(256, "Tokens of one training sample.")
    max_position_embeddings: int | None = setting(None, "Longest sequence the model can be used with; by default --seq-length.")
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = setting("rope", "How positions enter the network.")
    rotary_base: int = setting(10000, "Base of the rotary frequencies.")
    rotary_percent: float = setting(1.0, "Part of each head's channels that is rotated.")
    rotary_seq_len_interpolation_factor: float | None = setting(
        None, "Divide positions by this before rotating (linear position interpolation), to stretch a model over longer texts.")
    use_rope_scaling: bool = setting(False, "Stretch the low rotary frequencies as Llama 3.1 and later do.")
    rope_scaling_factor: float = setting(8.0, "With --use-rope-scaling: what the lowest rotary frequencies are divided by.")
    rope_scaling_low_freq_factor: float = setting(
        1.0, "With --use-rope-scaling: frequencies that turn less often than this within the original context are divided in full.")
    rope_scaling_high_freq_factor: float = setting(
        4.0, "With --use-rope-scaling: frequencies that turn more often than this within the original context stay as they are.")
    rope_scaling_original_max_position_embeddings: int = setting(
        8192, "With --use-rope-scaling: the context the model was first trained with.")
    sliding_window: int | None = setting(
        None, "Tokens a token may look back at, itself included, the same in every layer (Mistral 7B v0.1); by default all before it.")
    normalization: Literal["RMSNorm", "LayerNorm"] = setting("RMSNorm", "Kind of normalization.")
    norm_epsilon: float = setting(1e-5, "Epsilon of the normalization.")
    use_sandwich_norm: bool = setting(
        False, "Norm what attention and MLP put out as well, before it is added to the hidden state (PanGu).")
    attn_post_norm_scale: float = setting(1.0, "With --use-sandwich-norm: initial weight of the norm after attention.")
    ffn_post_norm_scale: float = setting(1.0, "With --use-sandwich-norm: initial weight of the norm after the MLP.")
    swiglu: bool = setting(True, "Gated MLP with SiLU (LLaMA); --no-swiglu gives a GELU MLP.")
    disable_bias_linear: bool = setting(True, "No bias in linear layers.")
    add_qkv_bias: bool = setting(False, "Bias in the query/key/value projection only (Qwen2).")
    qk_layernorm: bool = setting(False, "Norm on queries and keys (Qwen3).")
    untie_embeddings_and_output_weights: bool = setting(False, "Give the output head a matrix of its own instead of the embedding's.")
    make_vocab_size_divisible_by: int = setting(128, "The vocabulary is padded to a multiple of this x tensor parallel size.")
    vocab_size: int | None = setting(None, "Vocabulary of the model before padding; by default the tokenizer's.")
    init_method_std: float = setting(0.02, "Standard deviation of the initial weights.")
    hidden_dropout: float = setting(0.0, "Dropout on the hidden state.")
    attention_dropout: float = setting(0.0, "Dropout on attention probabilities.")
    num_experts: int | None = setting(None, "Number of experts of a mixture-of-experts MLP; none by default.")
    moe_router_topk: int = setting(2, "Experts each token is sent to.")
    moe_ffn_hidden_size: int | None = setting(None, "MLP width of one expert; by default --ffn-hidden-size.")
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = setting(
        "allgather", "How tokens travel to their experts; alltoall sends less and needs an accelerator.")
    moe_aux_loss_coeff: float = setting(0.0, "Coefficient of the router's load-balancing loss.")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = setting(
        "auto", "Layer implementation: plain PyTorch, or Transformer Engine. 'auto' takes Transformer Engine on CUDA where installed.")
