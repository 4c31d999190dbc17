"""Names of weights in Megatron's checkpoints, and the dimension that tensor parallelism splits.

Every naming scheme is translated into that of Transformer Engine's layers, which names a norm after
the linear layer behind it.
"""

import re

from megatron_sorted.checkpoint.layout import AVERAGED
from megatron_sorted.errors import CheckpointError

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Names of a layer's two norms in plain PyTorch layers -> in Transformer Engine's layers."""

OLD_LAYER = {
    "input_norm": "self_attention.linear_qkv.layer_norm_",
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "post_attention_norm": "mlp.linear_fc1.layer_norm_",
    "post_attention_layernorm": "mlp.linear_fc1.layer_norm_",
    "self_attention.query_key_value": "self_attention.linear_qkv.",
    "attention.query_key_value": "self_attention.linear_qkv.",
    "self_attention.dense": "self_attention.linear_proj.",
    "attention.dense": "self_attention.linear_proj.",
    "self_attention.q_layernorm": "self_attention.q_layernorm.",
    "self_attention.k_layernorm": "self_attention.k_layernorm.",
    "mlp.dense_h_to_4h": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h": "mlp.linear_fc2.",
}
"""Names within a layer of Megatron-LM's older ``language_model`` -> megatron-core's."""
OLD_REST = {
    "language_model.embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "language_model.embedding.position_embeddings.weight": "embedding.position_embeddings.weight",
    "language_model.encoder.final_norm.weight": "decoder.final_layernorm.weight",
    "language_model.encoder.final_norm.bias": "decoder.final_layernorm.bias",
    "language_model.encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    "language_model.encoder.final_layernorm.bias": "decoder.final_layernorm.bias",
    "language_model.output_layer.weight": "output_layer.weight",
    "word_embeddings_for_head.weight": "output_layer.weight",
}
OLD = re.compile(r"language_model\.(?:encoder|transformer)\.layers\.(\d+)\.(.+)\.(weight|bias)")
OLD_EXIT_HEAD = re.compile(r"language_model\.exit_output_layer\.(\d+)\.weight")

COLUMN = re.compile(
    r"(.+\.)?(linear_qkv|linear_fc1)\.(weight|bias)|embedding\.word_embeddings\.weight|output_layer\.weight"
    r"|exit_output_layers\.\d+\.weight"
)
ROW = re.compile(r".+\.(linear_proj|linear_fc2)\.weight")
WHOLE = re.compile(
    r".*layer_?norm(_|\.)(weight|bias)|exit_norms\.\d+\.(weight|bias)|.+\.(linear_proj|linear_fc2)\.bias"
    r"|embedding\.position_embeddings\.weight"
)


def is_no_weight(name: str) -> bool:
    """Return whether a stored name belongs to something other than a weight of the model.

    These are extra states of layers, rotary frequencies, optimizer and random state, and averages
    of weights.
    """
    return (
        "_extra_state" in name
        or name.endswith("rotary_pos_emb.inv_freq")
        or name.startswith(
            (
                "optimizer.",
                "chained_",
                "random_state",
                "rng_state",
                "rerun_state",
                "opt_param_scheduler",
                f"{AVERAGED}.",
            )
        )
    )


def plain_name(name: str) -> str:
    """Return Transformer Engine's name for a megatron-core name of either naming scheme.

    >>> plain_name("decoder.layers.0.input_layernorm.weight")
    'decoder.layers.0.self_attention.linear_qkv.layer_norm_weight'
    """
    for theirs, ours in NORMS.items():
        name = re.sub(
            rf"^(decoder\.layers\.(?:\d+\.)?|exit_blocks\.\d+\.){re.escape(theirs)}",
            rf"\1{ours}",
            name,
        )
    return name


def current_name(old: str) -> str:
    """Return the megatron-core name of a weight of the older ``language_model``.

    Layers keep their number within the stage. An exit's own norm (EE-LLM) becomes
    "decoder.layers.N.exit_norm.weight", its own head "exit_output_layer.N.weight".

    Raises:
        CheckpointError: There is no such name.
    """
    if old in OLD_REST:
        return OLD_REST[old]
    if match := OLD_EXIT_HEAD.fullmatch(old):
        return f"exit_output_layer.{match[1]}.weight"
    if match := OLD.fullmatch(old):
        layer, part, kind = match.groups()
        if part in OLD_LAYER:
            return f"decoder.layers.{layer}.{OLD_LAYER[part]}{kind}"
        if part == "exit_norm":
            return f"decoder.layers.{layer}.exit_norm.{kind}"
    raise CheckpointError(
        f"{old}: no weight of a plain GPT model (decoder only, no experts, no exit blocks), so it "
        "cannot be converted."
    )


def cut_axis(name: str) -> int | None:
    """Return the dimension that tensor parallelism splits; None if every rank has a copy.

    Raises:
        CheckpointError: It is not known how this weight is split.
    """
    if COLUMN.fullmatch(name):
        return 0
    if ROW.fullmatch(name):
        return 1
    if WHOLE.fullmatch(name):
        return None
    raise CheckpointError(
        f"{name}: it is not known how tensor parallel ranks share this weight. Save the checkpoint "
        "with tensor parallel size 1, or as torch_dist."
    )
