"""Exits with parts have the same logits in training, transformers' modules and exported code."""

import pytest

from megatron_sorted.conversion.open_model import open_model
from tests.support.exit_parts import save_nested
from tests.support.given_weights import join_logits, logits_of_exits
from tests.support.model_directories import tokens
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny

LAYOUTS = {
    "one process": (1, {}),
    "tp2 pp2 sequence parallel": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
}
CASES = {
    "mistral": (
        "block",
        {"sliding_window": 20, "untie_embeddings_and_output_weights": True, "use_exit_block": True},
    ),
    "qwen2": (
        "adapter and mlp",
        {
            "add_qkv_bias": True,
            "untie_embeddings_and_output_weights": True,
            "use_exit_mlp": True,
            "exit_adapter_rank": 3,
        },
    ),
    "qwen3": (
        "adapter and block",
        {
            "qk_layernorm": True,
            "kv_channels": 16,
            "untie_embeddings_and_output_weights": True,
            "use_exit_block": True,
            "exit_adapter_rank": 3,
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", CASES)
def test_logits_equal_those_of_transformers_modules(family, layout, tmp_path):
    kind, changes = CASES[family]
    case = save_nested(tmp_path, family, kind, norms=True, heads=family == "qwen3")
    network = open_model(tmp_path).settings
    world_size, split = LAYOUTS[layout]
    settings = tiny(
        seq_length=40,
        exit_layer_nums=(1, 3),
        use_exit_norm=True,
        untie_exit_output_weights=family == "qwen3",
        norm_epsilon=network.norm_epsilon,
        **changes,
        **split,
    )
    weights = case.our_tensors()
    reports = run_ranks(world_size, logits_of_exits, settings, weights, tokens())
    assert set.union(*(used for _, used, _ in reports)) == weights.keys(), "a weight was left over"
    got = join_logits(reports, 100)
    assert got.keys() == {1, 3, 4}
    for depth, logits in got.items():
        expected = case.logits(depth, tokens())
        assert float((logits - expected).abs().max()) <= 2e-5 * float(expected.abs().max()), depth
