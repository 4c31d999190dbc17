"""Stretched rotary frequencies against those of transformers and of Megatron."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_sorted.model.rotary import stretch_low_frequencies

# head width, base, factor, low, high, original context
MODELS = {
    "Llama 3.1 8B": (128, 500000.0, 8.0, 1.0, 4.0, 8192),
    "Llama 3.2 1B": (64, 500000.0, 32.0, 1.0, 4.0, 8192),
    "none known": (48, 10000.0, 3.0, 0.25, 20.0, 1000),
}


def plain(width: int, base: float) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_transformers(name):
    width, base, factor, low, high, context = MODELS[name]
    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        },
    )
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config)
    got = stretch_low_frequencies(plain(width, base), factor, low, high, context)
    assert scale == 1.0
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)
    ratio = got / plain(width, base)  # all three kinds are there
    assert (
        ratio[0] == 1
        and ratio[-1] == pytest.approx(1 / factor)
        and ((ratio > 1.01 / factor) & (ratio < 0.99)).any()
    )


def test_megatron_knows_the_numbers_of_llama_3_alone():
    theirs = RotaryEmbedding._apply_scaling(None, plain(128, 500000.0), 8.0)
    torch.testing.assert_close(
        stretch_low_frequencies(plain(128, 500000.0), 8.0, 1.0, 4.0, 8192),
        theirs,
        rtol=3e-7,
        atol=0,
    )
