"""Counted costs against a built network and a measured forward pass."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_sorted.model.config import can_route_without_transformer_engine
from megatron_sorted.settings.costs import (
    forward_flops_per_token,
    layer_parameters,
    sub_model_parameters,
    train_flops_per_token,
)
from megatron_sorted.settings.derived import ffn_hidden_size, kv_channels, num_query_groups
from megatron_sorted.settings.run import Settings
from tests.support.hugging_face import make_model
from tests.support.rank_bodies import start
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny

# tiny: 4 layers, hidden 32, MLP 48, 4 heads in 2 groups of 8 channels, vocabulary 100
SHAPES = {
    "grouped queries": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "all heads, query bias": {
        "group_query_attention": False,
        "num_query_groups": None,
        "add_qkv_bias": True,
    },
    "query and key norms": {"qk_layernorm": True},
    "sandwich norms": {"use_sandwich_norm": True},
    "biases, layer norms, GELU, learned positions": {
        "disable_bias_linear": False,
        "normalization": "LayerNorm",
        "swiglu": False,
        "position_embedding_type": "learned_absolute",
    },
    "biases, SwiGLU, wide heads": {
        "disable_bias_linear": False,
        "kv_channels": 16,
        "ffn_hidden_size": None,
    },
}
if can_route_without_transformer_engine():
    SHAPES |= {
        "experts": {"num_experts": 4},
        "experts with biases": {
            "num_experts": 4,
            "moe_ffn_hidden_size": 24,
            "disable_bias_linear": False,
        },
    }


def built_parameters(settings: Settings) -> tuple[int, int]:
    """Return the parameters of the built network, and of its layers alone, without padding."""
    _, _, model = start(settings)
    sizes = {}
    for name, parameter in model.chunks[0].module.named_parameters():
        rows = (
            settings.vocab_size
            if name.startswith(("embedding.word", "output_layer"))
            else parameter.shape[0]
        )
        sizes[name] = parameter[:rows].numel()
    return sum(sizes.values()), sum(
        size for name, size in sizes.items() if "decoder.layers" in name
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_built_network(name):
    settings = tiny(**SHAPES[name])
    [(everything, in_layers)] = run_ranks(1, built_parameters, settings)
    counted = sub_model_parameters(settings, settings.vocab_size)
    assert counted[4] == everything and 4 * layer_parameters(settings)[1] == in_layers
    assert counted == {depth: everything - (4 - depth) * in_layers // 4 for depth in (1, 2, 3, 4)}


def test_parameters_of_a_known_model():
    # LLaMA 2 7B as published: 6,738,415,616 parameters
    llama = Settings(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        exit_layer_nums=(16,),
        untie_embeddings_and_output_weights=True,
    )
    assert sub_model_parameters(llama, 32000)[32] == 6_738_415_616


def measured_flops(settings: Settings, depth: int) -> int:
    """Return the operations of matrix products in one plain forward pass over a sequence.

    Those of attention are included.
    """
    s, h, d = settings.seq_length, settings.hidden_size, kv_channels(settings)
    heads, groups, width = (
        settings.num_attention_heads,
        num_query_groups(settings),
        ffn_hidden_size(settings),
    )
    x = torch.zeros(1, s, h)
    with FlopCounterMode(display=False) as counter:
        for _ in range(depth):
            q, k, v = F.linear(x, torch.zeros((heads + 2 * groups) * d, h)).split(
                (heads * d, groups * d, groups * d), -1
            )
            q = q.view(1, s, heads, d).transpose(1, 2)
            k, v = (
                t.reshape(1, s, groups, d).transpose(1, 2).repeat_interleave(heads // groups, 1)
                for t in (k, v)
            )
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            x = F.linear(mixed.transpose(1, 2).reshape(1, s, heads * d), torch.zeros(h, heads * d))
            y = F.linear(x, torch.zeros(width * (2 if settings.swiglu else 1), h))
            x = F.linear(y[..., :width], torch.zeros(h, width))
        F.linear(x, torch.zeros(settings.vocab_size, h))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name",
    [
        "grouped queries",
        "biases, layer norms, GELU, learned positions",
        "biases, SwiGLU, wide heads",
    ],
)
def test_operations_are_those_of_a_plain_forward_pass(name):
    settings = tiny(**SHAPES[name])
    flops = forward_flops_per_token(settings, settings.vocab_size)
    for depth in (1, 2, 3, 4):
        # all pairs of tokens cost twice the mean over a causal sequence, so the plain pass of the
        # same length counts as one twice as long
        twice = forward_flops_per_token(settings, settings.vocab_size, 2 * settings.seq_length)[
            depth
        ]
        assert twice * settings.seq_length == measured_flops(settings, depth)
        attention = 2 * settings.seq_length * settings.num_attention_heads * kv_channels(settings)
        assert twice - flops[depth] == depth * attention


@pytest.mark.parametrize("window", [1, 4, 15, 16, 40])
def test_a_window_counts_what_tokens_see(window):
    settings = tiny(sliding_window=window)
    without = forward_flops_per_token(replace(settings, sliding_window=None), 100)
    seen = (
        sum(min(i, window) - 0.5 for i in range(1, 17)) / 16
    )  # as without a window, where the mean over 16 tokens is counted as 8
    expected = without[4] - round(
        4 * 4 * 4 * 8 * (8 - seen)
    )  # 4 operations, 4 layers, 4 heads of 8 channels
    assert forward_flops_per_token(settings, 100)[4] == pytest.approx(
        expected, abs=4 * 2 * 32 * (2 * 0.5)
    )


FAMILIES = {
    "Llama": (
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {
            "untie_embeddings_and_output_weights": True,
            "group_query_attention": False,
            "num_query_groups": None,
        },
    ),
    "Mistral": (
        {"tie_word_embeddings": False, "head_dim": 16},
        {"untie_embeddings_and_output_weights": True, "kv_channels": 16},
    ),
    "Qwen2": ({"tie_word_embeddings": True}, {"add_qkv_bias": True}),
    "Qwen3": (
        {"tie_word_embeddings": True, "head_dim": 16},
        {"qk_layernorm": True, "kv_channels": 16},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family):
    config, ours = FAMILIES[family]
    for depth, count in sub_model_parameters(tiny(**ours), VOCABULARY).items():
        assert make_model(family, num_hidden_layers=depth, **config).num_parameters() == count


def test_training_counts_backward_twice_and_every_head():
    settings = tiny()
    head = 2 * 32 * 100
    forward = forward_flops_per_token(settings, 100)
    assert train_flops_per_token(settings, 100) == 3 * (forward[4] + 3 * head)
    assert train_flops_per_token(settings, 100, depths=(2,), deepest=2) == 3 * forward[2]


def test_frozen_matrices_get_no_gradient_and_adapters_are_counted():
    settings, head = tiny(lora_rank=4, lora_targets=("linear_qkv", "linear_fc2")), 2 * 32 * 100
    matrices = 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48
    adapters = 4 * (64 + 32 + 32 + 48)
    full = train_flops_per_token(tiny(), 100)
    assert (
        train_flops_per_token(settings, 100)
        == full - 4 * 2 * matrices - 4 * head + 4 * 3 * 2 * adapters
    )
    half = train_flops_per_token(tiny(), 100, (2,), 2)
    assert (
        train_flops_per_token(settings, 100, (2,), 2)
        == half - 2 * 2 * matrices - head + 2 * 6 * adapters
    )
    own = replace(settings, untie_exit_output_weights=True)
    assert train_flops_per_token(own, 100) == train_flops_per_token(settings, 100) + 3 * head


def test_experts_count_fully_as_parameters_and_by_choice_as_operations():
    # router 8 x 3; experts of 3 matrices 8 x 16; attention 4 matrices 8 x 8; two norms
    settings = Settings(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_experts=3,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
    )
    assert layer_parameters(settings) == (4 * 64 + 24 + 2 * 384, 4 * 64 + 24 + 3 * 384 + 16)


LAYER, MLP, ADAPTER = 32 * 64 + 32 * 32 + 3 * 32 * 48, 3 * 32 * 48, 2 * 32 * 3
PARTS = {
    "block": ({"use_exit_block": True}, LAYER, 2 * 32),
    "mlp": ({"use_exit_mlp": True}, MLP, 32),
    "adapter": ({"exit_adapter_rank": 3}, ADAPTER, 0),
    "block and adapter": (
        {"use_exit_block": True, "exit_adapter_rank": 3},
        LAYER + ADAPTER,
        2 * 32,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_intermediate_exits_count_for_those_alone(name):
    changes, matrices, norms = PARTS[name]
    plain, parts = (sub_model_parameters(tiny(**more), VOCABULARY) for more in ({}, changes))
    assert {depth: parts[depth] - plain[depth] for depth in plain} == dict.fromkeys(
        (1, 2, 3), matrices + norms
    ) | {4: 0}
    attention = 2 * 16 * 32 if "block" in name else 0
    plain, parts = (forward_flops_per_token(tiny(**more), VOCABULARY) for more in ({}, changes))
    assert {depth: parts[depth] - plain[depth] for depth in plain} == dict.fromkeys(
        (1, 2, 3), 2 * matrices + attention
    ) | {4: 0}


def test_frozen_layers_have_no_backward_and_frozen_heads_only_one_to_their_input():
    settings = tiny(use_exit_block=True, tune_exit=True)
    layer, head = 2 * LAYER + 2 * 16 * 32, 2 * 32 * 100
    assert train_flops_per_token(settings, 100) == 4 * layer + 3 * (2 * head + 3 * layer)
    assert train_flops_per_token(settings, 100, depths=(1, 3), deepest=3) == 3 * layer + 2 * (
        2 * head + 3 * layer
    )
    own_heads = tiny(tune_exit=True, untie_exit_output_weights=True)
    assert train_flops_per_token(own_heads, 100, depths=(2,), deepest=2) == 2 * layer + 3 * head
