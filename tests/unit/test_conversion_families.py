import dataclasses

import pytest

from megatron_sorted.conversion.hugging_face.config_settings import (
    config_of_settings,
    settings_of_config,
)
from megatron_sorted.conversion.hugging_face.families import read_config
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.run import Settings
from tests.support.model_directories import FAMILIES, family_model

LLAMA3 = {  # as Llama-3.2-1B's file has it
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pretraining_tp": 1,
    "use_cache": True,
    "transformers_version": "4.45.0.dev0",
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def test_settings_of_llama_3():
    settings = settings_of_config(LLAMA3, "config.json")
    assert settings == Settings(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        kv_channels=64,
        group_query_attention=True,
        num_query_groups=8,
        seq_length=131072,
        max_position_embeddings=131072,
        rotary_base=500000,
        norm_epsilon=1e-5,
        vocab_size=128256,
        untie_embeddings_and_output_weights=False,
        bf16=True,
        rope_scaling_type="llama3",
        rope_scaling_factor=32.0,
        rope_scaling_low_freq_factor=1.0,
        rope_scaling_high_freq_factor=4.0,
        rope_scaling_original_max_position_embeddings=8192,
    )


def test_an_exported_config_keeps_the_keys_of_its_origin():
    settings = settings_of_config(LLAMA3, "config.json")
    out = config_of_settings(settings, "bfloat16", LLAMA3)
    added = {
        "exit_layer_indices": [16],
        "tie_exit_lm_head": True,
        "own_exit_norms": False,
        "initializer_range": 0.02,
    }
    assert out == {**LLAMA3, **added}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_transformers_keeps_its_keys(family):
    model = family_model(family)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    settings = settings_of_config(config, "config.json")
    out = config_of_settings(settings, "float32", config)
    added = {"exit_layer_indices": [4], "tie_exit_lm_head": True, "own_exit_norms": False}
    assert out == {**config, **added, "dtype": "float32"} | (
        {"head_dim": config["head_dim"]} if "head_dim" in config else {}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_config_from_settings_alone_as_the_same_network(family):
    import transformers

    original = family_model(family).config
    settings = settings_of_config(original.to_dict(), "config.json")
    made = transformers.AutoConfig.for_model(**config_of_settings(settings, "float32"))
    ignored = {
        "architectures",
        "exit_layer_indices",
        "tie_exit_lm_head",
        "own_exit_norms",
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "_name_or_path",
        "head_dim",
        "transformers_version",
    }
    one, other = (
        {key: value for key, value in config.to_dict().items() if key not in ignored}
        for config in (original, made)
    )
    assert one == other
    assert (
        dataclasses.replace(settings_of_config(made.to_dict(), "again"), exit_layer_nums=())
        == settings
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_missing_keys_have_the_defaults_of_transformers(family):
    import transformers

    shortest = {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_attention_heads": 32,
        "vocab_size": 100,
    }
    full = transformers.AutoConfig.for_model(**shortest).to_dict()
    full["architectures"] = None
    assert settings_of_config(shortest, "config.json") == settings_of_config(full, "config.json")


def test_exits_are_written_to_the_config_and_read_back():
    settings = dataclasses.replace(
        settings_of_config(LLAMA3, "config.json"), exit_layer_nums=(4, 8), use_exit_norm=True
    )
    out = config_of_settings(settings, "bfloat16", LLAMA3)
    assert (out["exit_layer_indices"], out["tie_exit_lm_head"], out["own_exit_norms"]) == (
        [4, 8, 16],
        True,
        True,
    )
    again = settings_of_config(out, "config.json")
    assert (again.exit_layer_nums, again.use_exit_norm, again.untie_exit_output_weights) == (
        (4, 8, 16),
        True,
        False,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type 'gpt2' is not supported. Supported are llama \(LlamaForCausalLM\), "
            r"mistral .* qwen3",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification.* is not a language model",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; of llama models only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None where a number above 0 is needed"),
        ({"num_hidden_layers": "16"}, "num_hidden_layers is '16'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "type yarn without original_max_position_embeddings",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            "llama3 without low_freq_factor",
        ),
        ({"rope_scaling": {"type": "linear"}}, "type linear without factor. Fetch the file"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
            "factor is 0.5 for rotary positions of type dynamic; it would shorten",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional"}, "rope_scaling": None},
            "rope_type is 'proportional', which is not one of default, linear, llama3, yarn, "
            "dynamic, longrope. Convert",
        ),
        (
            {"rope_scaling": {"rope_type": ["yarn"]}},
            r"rope_type is \['yarn'\], which is not one of",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 4096,
                },
                "original_max_position_embeddings": 2048,
            },
            "original_max_position_embeddings is 2048, and 4096 among the rotary parameters",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "type longrope without original_max_position_embeddings",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 31 + [-1],
                    "long_factor": [1.0] * 32,
                    "original_max_position_embeddings": 4096,
                }
            },
            "short_factor is .* where a list of 32 numbers above 0 is needed",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 32,
                    "long_factor": [1.0] * 32,
                    "original_max_position_embeddings": 4096,
                }
            },
            "longrope with divisors that this program did not write.* not trained or imported",
        ),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 is not a whole number"),
        ({"exit_layer_indices": [4, 99]}, "exit_layer_indices .*99 is not a layer"),
        ({"exit_layer_indices": 4}, "exit_layer_indices 4"),
        ({"head_dim": None, "num_attention_heads": 24}, "does not divide"),
    ],
)
def test_unsupported_values_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        settings_of_config({**LLAMA3, **changes}, "config.json")


def test_a_mix_of_sliding_and_other_layers_is_refused():
    config = family_model("qwen2").config.to_dict()
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        settings_of_config({**config, "use_sliding_window": True}, "config.json")
    with pytest.raises(CheckpointError, match="layer_types"):
        settings_of_config(
            {**config, "layer_types": ["full_attention", "sliding_attention"]}, "config.json"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "--normalization: LayerNorm"),
        ({"swiglu": False}, "--swiglu: False"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type"),
        ({"num_experts": 4}, "--num-experts: 4"),
        (
            {"use_sandwich_norm": True},
            "--use-sandwich-norm: True, which no supported Hugging Face family has",
        ),
        (
            {"add_qkv_bias": True, "qk_layernorm": True},
            "no supported Hugging Face family has them together",
        ),
    ],
)
def test_a_network_without_a_family_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_of_settings(
            dataclasses.replace(settings_of_config(LLAMA3, "config.json"), **changes), "float32"
        )


def test_a_directory_without_a_config_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json, so this is no Hugging Face model"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_config(tmp_path)
