"""Shapes of a layer's matrices against numbers computed by hand."""

from megatron_sorted.settings.matrices import LayerShapes, layer_shapes
from megatron_sorted.settings.run import Settings

GQA = Settings(
    hidden_size=8,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=3,
    ffn_hidden_size=10,
)


def test_whole_and_on_one_of_two_ranks():
    whole = layer_shapes(GQA)
    assert whole == LayerShapes(hidden=8, head=3, norm=8, query=12, key_value=6, fc1=20, ffn=10)
    assert layer_shapes(GQA, 2) == LayerShapes(
        hidden=8, head=3, norm=8, query=6, key_value=3, fc1=10, ffn=5
    )
    assert whole.matrices == {
        "linear_qkv": (24, 8),
        "linear_proj": (8, 12),
        "linear_fc1": (20, 8),
        "linear_fc2": (8, 10),
    }
    assert (
        whole.products()
        == 24 * 8 + 8 * 12 + 20 * 8 + 8 * 10
        == sum(rows * columns for rows, columns in whole.matrices.values())
    )
    assert whole.products(with_attention=False) == 240
    assert layer_shapes(GQA, ffn=4).matrices["linear_fc1"] == (8, 8)
