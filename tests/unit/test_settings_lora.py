"""The ranks that a step uses, and the size of adapters."""

from collections import Counter
from dataclasses import replace

from megatron_sorted.exits.chance import draw_rank
from megatron_sorted.settings.lora import adapter_parameters, is_adapter, nested_ranks, rank_at
from megatron_sorted.settings.matrices import layer_shapes
from megatron_sorted.settings.run import Settings

BASE = replace(
    Settings(),
    num_layers=3,
    hidden_size=8,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    ffn_hidden_size=10,
    lora_rank=4,
    seed=5,
)


def test_sizes_are_those_counted_by_hand():
    assert layer_shapes(BASE).matrices == {
        "linear_qkv": (16, 8),
        "linear_proj": (8, 8),
        "linear_fc1": (20, 8),
        "linear_fc2": (8, 10),
    }
    assert layer_shapes(replace(BASE, swiglu=False, kv_channels=6)).matrices["linear_fc1"] == (
        10,
        8,
    )
    assert layer_shapes(replace(BASE, kv_channels=6)).matrices["linear_proj"] == (8, 24)
    assert adapter_parameters(BASE) == 3 * 4 * (24 + 16 + 28 + 18)
    assert adapter_parameters(replace(BASE, lora_targets=("linear_fc2",), lora_rank=1)) == 3 * 18
    assert adapter_parameters(replace(BASE, lora_rank=0)) == 0


def test_names():
    assert is_adapter("decoder.layers.0.mlp.linear_fc1.lora_a") and is_adapter("x.lora_b")
    assert not is_adapter("decoder.layers.0.mlp.linear_fc1.weight") and not is_adapter(
        "lora_b.weight"
    )


def test_every_rank_is_drawn_alike_and_nothing_but_seed_and_step_matters():
    settings = replace(BASE, dylora=True)
    counts = Counter(rank_at(settings, step) for step in range(4000))
    assert set(counts) == {1, 2, 3, 4} and all(
        abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values()
    )
    assert [rank_at(settings, step) for step in range(12)] == [
        rank_at(replace(settings, lr=1.0), step) for step in range(12)
    ]
    assert [rank_at(settings, step) for step in range(12)] != [
        rank_at(replace(settings, seed=6), step) for step in range(12)
    ]
    assert {rank_at(replace(settings, dylora_ranks=(4, 2)), step) for step in range(40)} == {2, 4}
    assert {rank_at(BASE, step) for step in range(40)} == {4}
    assert (nested_ranks(BASE), nested_ranks(replace(settings, dylora_ranks=(4, 2)))) == (
        (4,),
        (2, 4),
    )


def test_a_draw_is_what_it_was():
    """A changed draw would change runs that are resumed."""
    assert [draw_rank(step, 1234, (1, 2, 3, 4, 5, 6, 7, 8)) for step in range(10)] == [
        7,
        5,
        1,
        1,
        8,
        2,
        1,
        1,
        1,
        3,
    ]
