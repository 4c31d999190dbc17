"""Megatron's arguments translated into settings, and those that are refused."""

import argparse
import dataclasses

import pytest

from megatron_sorted.conversion.megatron.arguments import REFUSED, settings_of, vocabulary_sizes
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.exits import ExitSettings
from megatron_sorted.settings.model import ModelSettings
from megatron_sorted.settings.rope import RopeSettings

NEW_FIELDS = {
    "use_rope_scaling",
    "rope_scaling_factor",
    "rope_scaling_low_freq_factor",
    "rope_scaling_high_freq_factor",
    "rope_scaling_original_max_position_embeddings",
    "rotary_seq_len_interpolation_factor",
    "sliding_window",
}
LLAMA_3 = {  # as Megatron-LM's parser leaves it, with arguments of no concern left out
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "group_query_attention": True,
    "num_query_groups": 8,
    "seq_length": 8192,
    "max_position_embeddings": 131072,
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": False,
    "rotary_base": 500000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "add_position_embedding": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "swiglu": True,
    "squared_relu": False,
    "openai_gelu": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True,
    "make_vocab_size_divisible_by": 128,
    "vocab_size": 128256,
    "padded_vocab_size": 129024,
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "window_size": None,
    "heterogeneous_layers_config_path": None,
    "apply_residual_connection_post_layernorm": False,
    "softmax_type": "vanilla",
    "hybrid_attention_ratio": 0.0,
}
EXPECTED = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "group_query_attention": True,
    "num_query_groups": 8,
    "seq_length": 8192,
    "max_position_embeddings": 131072,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "rotary_percent": 1.0,
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 8192,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "disable_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True,
    "make_vocab_size_divisible_by": 128,
    "vocab_size": 128256,
}
OLD = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "padded_vocab_size": 50304}


def of(**changes) -> dict:
    return settings_of({**LLAMA_3, **changes})


def test_llama_3_of_megatron_lm():
    assert settings_of(argparse.Namespace(**LLAMA_3)) == settings_of(LLAMA_3) == EXPECTED
    known = {
        field.name
        for part in (ModelSettings, RopeSettings, ExitSettings)
        for field in dataclasses.fields(part)
    }
    assert EXPECTED.keys() <= known | NEW_FIELDS


def test_an_old_gpt_without_newer_arguments_has_megatrons_defaults():
    assert settings_of(OLD) == {
        **{name: OLD[name] for name in ("num_layers", "hidden_size", "num_attention_heads")},
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "swiglu": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "disable_bias_linear": False,
        "untie_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 128,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "group_query_attention": False,
        "position_embedding_type": "learned_absolute",
        "vocab_size": 50304,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"use_rotary_position_embeddings": True}, {"position_embedding_type": "rope"}),
        ({"add_position_embedding": False}, {"position_embedding_type": "none"}),
        ({"layernorm_epsilon": 1e-6}, {"norm_epsilon": 1e-6}),
        ({"disable_bias_linear": True}, {"disable_bias_linear": True}),
        ({"rotary_base": 10000.0}, {"rotary_base": 10000}),
        ({"window_size": (4095, 0)}, {"sliding_window": 4096}),
        ({"window_size": (-1, -1)}, {}),
        ({"sliding_window": 4096}, {"sliding_window": 4096}),
        ({"rotary_seq_len_interpolation_factor": 4}, {"rotary_seq_len_interpolation_factor": 4}),
        (
            {
                "rope_scaling_type": "llama3",
                "rope_scaling_factor": 32,
                "low_freq_factor": 2,
                "high_freq_factor": 5,
                "rope_scaling_original_max_position_embeddings": 4096,
            },
            {
                "use_rope_scaling": True,
                "rope_scaling_factor": 32.0,
                "rope_scaling_low_freq_factor": 2.0,
                "rope_scaling_high_freq_factor": 5.0,
                "rope_scaling_original_max_position_embeddings": 4096,
            },
        ),
        (
            {
                "position_embedding_type": "yarn",
                "yarn_rotary_scaling_factor": 16.0,
                "yarn_original_max_position_embeddings": 4096,
                "yarn_beta_fast": 24.0,
                "yarn_mscale": None,
                "yarn_correction_range_round_to_int": False,
            },
            {
                "position_embedding_type": "rope",
                "rope_scaling_type": "yarn",
                "rope_scaling_factor": 16.0,
                "rope_scaling_original_max_position_embeddings": 4096,
                "rope_scaling_beta_fast": 24.0,
                "rope_scaling_truncate": False,
            },
        ),
        ({"vocab_size": 50257}, {"vocab_size": 50257}),
        ({"scale_depth": 1.0, "num_experts": 0}, {}),
        (
            {
                "exit_layer_nums": [3, 6],
                "use_exit_norm": True,
                "untie_exit_output_weights": True,
                "pre_exit": False,
            },
            {"exit_layer_nums": (3, 6), "use_exit_norm": True, "untie_exit_output_weights": True},
        ),
        (
            {"exit_layer_nums": [7, 4], "use_exit_norm": True, "pre_exit": True},
            {"exit_layer_nums": (3, 6), "use_exit_norm": True, "untie_exit_output_weights": False},
        ),
        ({"exit_layer_nums": []}, {}),
    ],
)
def test_single_arguments(arguments, expected):
    assert settings_of({**OLD, **arguments}) == {**settings_of(OLD), **expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: True}, f"{name} = True") for name in REFUSED),
        ({"num_experts": 1}, "num_experts = 1: experts"),
        ({"mtp_num_layers": 1}, "mtp_num_layers = 1"),
        ({"scale_emb": 12.0}, "scale_emb = 12.0"),
        ({"position_embedding_type": "yarn"}, "'yarn': without yarn_rotary_scaling_factor"),
        (
            {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0},
            "'yarn': without yarn_original_max_position_embeddings",
        ),
        ({"rope_scaling_type": "yarn"}, "rope_scaling_type = 'yarn'"),
        ({"softmax_type": "learnable"}, "softmax_type = 'learnable'"),
        ({"normalization": "ScaleNorm"}, "normalization = 'ScaleNorm'"),
        ({"window_size": (128, 128)}, r"window_size = \(128, 128\)"),
        ({"rotary_base": 10000.5}, "rotary_base = 10000.5"),
        ({"vocab_size": 200000}, "vocab_size = 200000: that is more than"),
        ({"hidden_size": None}, "do not say hidden_size"),
        ({"exit_layer_nums": [4], "use_exit_norm": False}, "feed their head without a norm"),
        ({"exit_layer_nums": [1, 4], "use_exit_norm": True, "pre_exit": True}, "runs no layer"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        of(**arguments)


def test_real_and_padded_vocabulary_sizes():
    assert vocabulary_sizes(LLAMA_3) == (128256, 129024) and vocabulary_sizes(OLD) == (None, 50304)
