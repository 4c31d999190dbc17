"""Rules of adapters: one run just within each, one just outside."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

# 8 heads of 32: qkv 768 x 256, proj 256 x 256, fc1 200 x 256, fc2 256 x 100
BASE = replace(Settings(), mock_data=True, vocab_size=100, ffn_hidden_size=100, lora_rank=16)
NESTED = {"dylora": True}
ALLOWED = [
    {},
    {"lora_rank": 100},
    {"lora_rank": 200, "lora_targets": ("linear_proj", "linear_fc1")},
    {"lora_dropout": 0.99},
    {"lora_targets": ("linear_fc2",)},
    {**NESTED, "dylora_frozen": True},
    {**NESTED, "dylora_ranks": (16, 1, 4)},
    {"lora_alpha": 0.1},
    {"lora_rank": 0},
    {"use_exit_norm": True, "exit_layer_nums": (2,)},
    {"transformer_impl": "local"},
]
REFUSED = [
    ({"lora_rank": -1}, "--lora-rank: -1 is negative"),
    ({"lora_alpha": 0.0}, "--lora-alpha: 0.0 is not above 0"),
    ({"lora_dropout": 1.0}, "--lora-dropout: 1.0 is not in [0, 1)"),
    (
        {"lora_rank": 101},
        "--lora-rank: 101 is more than the smaller side of linear_fc2 (256 x 100)",
    ),
    (
        {"lora_rank": 257, "lora_targets": ("linear_qkv",)},
        "257 is more than the smaller side of linear_qkv (768 x 256)",
    ),
    (
        {"lora_rank": 201, "lora_targets": ("linear_fc1",)},
        "201 is more than the smaller side of linear_fc1 (200 x 256)",
    ),
    (
        {"lora_targets": ("linear_kqv",)},
        "'linear_kqv' is no matrix of a layer. Did you mean linear_qkv?",
    ),
    ({"lora_targets": ("q_proj",)}, "'q_proj' is no matrix of a layer. "),
    (
        {"lora_targets": ("x",)},
        "'x' is no matrix of a layer. Use some of linear_qkv, linear_proj, linear_fc1, linear_fc2.",
    ),
    ({"lora_targets": ()}, "--lora-targets: empty with --lora-rank 16"),
    ({"lora_targets": ("linear_fc1", "linear_fc1")}, "--lora-targets: linear_fc1 is named twice"),
    (
        {"transformer_impl": "transformer_engine"},
        "--lora-rank: 16 with --transformer-impl transformer_engine, whose layers fuse",
    ),
    ({"context_parallel_size": 2}, "--lora-rank: 16 with --context-parallel-size 2"),
    ({"num_experts": 4}, "--lora-rank: 16 with --num-experts 4"),
    ({"dylora_frozen": True}, "--dylora-frozen: ranks are nested with --dylora only"),
    ({"dylora_ranks": (16,)}, "--dylora-ranks: ranks are nested with --dylora only"),
    ({**NESTED, "dylora_ranks": (0, 16)}, "--dylora-ranks: 0 is not in 1..16"),
    ({**NESTED, "dylora_ranks": (4, 17)}, "--dylora-ranks: 17 is not in 1..16"),
    ({**NESTED, "dylora_ranks": (4, 4, 16)}, "--dylora-ranks: 4 is listed twice"),
    ({**NESTED, "dylora_ranks": (4, 8)}, "the ranks above 8 of --lora-rank 16 would never train"),
    ({"lora_rank": 0, "lora_alpha": 8.0}, "--lora-alpha: there are no adapters (--lora-rank 0)"),
    ({"lora_rank": 0, "lora_targets": ("linear_qkv",)}, "--lora-targets: there are no adapters"),
    ({"lora_rank": 0, "lora_dropout": 0.1}, "--lora-dropout: there are no adapters"),
    ({"lora_rank": 0, **NESTED}, "--dylora: there are no adapters"),
    (
        {"use_exit_norm": True, "exit_layer_nums": (2,), "tune_exit": True},
        "--lora-rank: 16 with --tune-exit, which keeps the outputs",
    ),
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_a_run_within_the_rules_passes(changes):
    check_settings(replace(BASE, **changes), 1)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_broken_rule_is_an_error(changes, message):
    with pytest.raises(SettingsError) as error:
        check_settings(replace(BASE, **changes), 2)
    assert message in str(error.value)
