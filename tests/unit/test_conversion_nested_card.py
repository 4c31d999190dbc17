import dataclasses

from megatron_sorted.conversion.hugging_face.model_card import nested_files, part_names
from megatron_sorted.settings.run import Settings

SETTINGS = Settings(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=100,
    exit_layer_nums=(2, 4),
    untie_embeddings_and_output_weights=True,
    seq_length=32,
)
LAYER = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64


def test_models_without_parts_get_no_files():
    assert (
        nested_files("m", SETTINGS)
        == {}
        == nested_files("m", dataclasses.replace(SETTINGS, use_exit_norm=True))
    )
    assert (
        part_names(dataclasses.replace(SETTINGS, use_exit_block=True, exit_layer_nums=(8,))) == []
    )


def test_the_card_names_parts_sizes_and_the_module():
    files = nested_files(
        "mine", dataclasses.replace(SETTINGS, use_exit_block=True, use_exit_norm=True)
    )
    assert sorted(files) == ["README.md", "nested_exits.py"]
    card = files["README.md"]
    assert (
        "predicts after 2, 4 layers" in card
        and "has a layer (block), a norm of its own" in card
        and "and shares head" in card
    )
    whole, first = 2 * 100 * 64 + 64 + 8 * LAYER, 2 * 100 * 64 + 64 + 3 * LAYER
    assert (
        f"| 2 | {first:,} | {100 * first / whole:.0f} % |" in card
        and f"| 8 | {whole:,} | 100 % |" in card
    )
    assert 'load_nested_exits("mine")' in card and "megatron-sorted extract" in card
    adapted = nested_files("mine", dataclasses.replace(SETTINGS, exit_adapter_rank=3))["README.md"]
    assert (
        "a low-rank adapter (rank 3)" in adapted
        and "no ordinary model" in adapted
        and "shares norm and head" in adapted
    )
