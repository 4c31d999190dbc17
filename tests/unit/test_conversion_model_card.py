import json

import pytest

from megatron_sorted.conversion.hugging_face.model_card import Origin, model_card, read_quality
from megatron_sorted.errors import DataError
from megatron_sorted.settings.run import Settings

FULL = Settings(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=100,
    exit_layer_nums=(2, 4),
    untie_embeddings_and_output_weights=True,
    seq_length=32,
)
PART = Settings(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=100,
    exit_layer_nums=(2, 4),
    untie_embeddings_and_output_weights=True,
    seq_length=32,
)
LAYER = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
EVALUATED = {
    "models": {"mine": {"is_baseline": False}, "other": {"is_baseline": True}},
    "texts": {
        "news": {
            "models": {
                "mine": {
                    "exits": {
                        "4": {"loss": 2.5, "agreement": 0.5},
                        "8": {"loss": 2.0, "agreement": 1.0},
                    }
                },
                "other": {"exits": {"4": {"loss": 9.0}, "8": {"loss": 9.0}}},
            }
        }
    },
    "questions": {},
    "tasks": {},
}


def test_the_card_states_origin_depth_and_sizes():
    card = model_card("small", Origin("big", FULL, 1200), PART, None)
    assert (
        "The first 4 of 8 layers of `big` (training step 1,200), one of its exits (2, 4, 8)" in card
    )
    part, whole = 2 * 100 * 64 + 64 + 4 * LAYER, 2 * 100 * 64 + 64 + 8 * LAYER
    assert f"| parameters | {part:,} | {whole:,} | {100 * part / whole:.0f} % |" in card
    assert (
        "Not measured." in card
        and "assistant_early_exit=4" in card
        and "Its own exits are 2" in card
    )
    assert 'AutoTokenizer.from_pretrained("small")' in card
    assert "AutoTokenizer" not in model_card(
        "small", Origin("big", FULL), PART, None, has_tokenizer=False
    )


def test_the_card_compares_quality_with_the_full_model(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATED))
    card = model_card("small", Origin("big", FULL), PART, read_quality(path))
    assert "| news | loss, nats per token | 2.5 | 2 |" in card
    assert "| news | agrees with the full model | 50.0 % | 100.0 % |" in card
    assert "| news | loss, nats per token | 9 | 9 |" in model_card(
        "small", Origin("big", FULL), PART, read_quality(path, "other")
    )
    path.write_text(
        json.dumps(
            {
                "run": "r",
                "step": 5,
                "exits": {},
                "sets": {"valid_text_document": {"4": {"loss": 1.25}}},
            }
        )
    )
    assert "| valid | loss, nats per token | 1.25 |  |" in model_card(
        "small", Origin("big", FULL), PART, read_quality(path)
    )


def test_files_that_are_no_evaluation_are_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    with pytest.raises(DataError, match="evaluation file"):
        read_quality(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="evaluation file"):
        read_quality(path)
    both = {**EVALUATED, "models": {name: {"is_baseline": False} for name in ("mine", "other")}}
    path.write_text(json.dumps(both))
    with pytest.raises(DataError, match=r"holds mine, other\. Name the one"):
        read_quality(path)
    with pytest.raises(DataError, match="holds no 'third'"):
        read_quality(path, "third")
