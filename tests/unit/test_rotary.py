"""Rotary frequencies against those of transformers, of Megatron and of the papers' formulas."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor,
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_sorted.conversion.hugging_face.rope_keys import rope_of_transformers
from megatron_sorted.model.rotary import set_attention_factor
from megatron_sorted.platform.cpu import CpuPlatform
from megatron_sorted.rotary import resonance_divisors, rotary_frequencies
from megatron_sorted.settings.rope_scaling import Rope, rope_of
from megatron_sorted.settings.run import Settings

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
# head width, base, longest text, rope_parameters
MODELS = {
    "plain": (128, 10000.0, 2048, {"rope_type": "default"}),
    "linear": (64, 10000.0, 2048, {"rope_type": "linear", "factor": 2.5}),
    "Llama 3.1 8B": (128, 500000.0, 131072, {**LLAMA3, "original_max_position_embeddings": 8192}),
    "llama3, other numbers": (
        48,
        10000.0,
        4000,
        {
            "rope_type": "llama3",
            "factor": 3.0,
            "low_freq_factor": 0.25,
            "high_freq_factor": 20.0,
            "original_max_position_embeddings": 1000,
        },
    ),
    "yarn": (128, 10000.0, 8192, YARN),
    "Qwen2.5 with yarn": (
        128,
        1000000.0,
        131072,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "DeepSeek's mscales": (64, 10000.0, 8192, {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}),
    "yarn, one mscale alone, which transformers ignores": (
        64,
        10000.0,
        8192,
        {**YARN, "mscale": 0.707},
    ),
    "gpt-oss's yarn": (
        64,
        150000.0,
        131072,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
            "attention_factor": 1.25,
        },
    ),
    "yarn, betas on one channel": (
        8,
        10000.0,
        512,
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 6,
            "beta_fast": 1.1,
        },
    ),
    "yarn without its factor": (
        64,
        10000.0,
        8192,
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
    ),
    "dynamic": (64, 10000.0, 512, {"rope_type": "dynamic", "factor": 2.0}),
    "longrope": (
        8,
        10000.0,
        512,
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 128,
        },
    ),
}


def config_of(name: str) -> LlamaConfig:
    width, base, longest, rope = MODELS[name]
    return LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters={**rope, "rope_theta": base},
    )


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_transformers_bit_for_bit(name):
    config = config_of(name)
    rope = rope_of_transformers(config)
    for tokens in (1, 512, 700, 4096):
        module = LlamaRotaryEmbedding(config)
        module(torch.zeros(1), torch.arange(tokens)[None])  # dynamic and longrope see the length
        assert torch.equal(rotary_frequencies(rope, tokens), module.inv_freq), tokens
        assert rope.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12)
    if name != "plain":
        _, base, _, _ = MODELS[name]
        assert not torch.equal(
            rotary_frequencies(rope, 4096), rotary_frequencies(Rope(rope.width, base), 4096)
        )


def test_llama3_frequencies_are_all_three_kinds():
    ratio = rotary_frequencies(
        rope_of_transformers(config_of("Llama 3.1 8B")), 1
    ) / rotary_frequencies(Rope(128, 500000.0), 1)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8)
    assert ((ratio > 1.01 / 8) & (ratio < 0.99)).any()


def test_megatron_knows_the_numbers_of_llama_3_alone():
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    theirs = RotaryEmbedding._apply_scaling(None, plain, 8.0)
    ours = rotary_frequencies(rope_of_transformers(config_of("Llama 3.1 8B")), 1)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 16.0, "context": 64},
        {"factor": 32.0, "context": 4096, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False},
    ],
)
def test_megatrons_yarn_has_the_same_angles(changes):
    """Under every supported version: `make test-megatron` runs this file."""
    CpuPlatform().prepare()
    rope = Rope(64, 10000.0, "yarn", **{"factor": 4.0, "context": 2048, **changes})
    theirs = YarnRotaryEmbedding(
        64,
        rotary_base=10000.0,
        scaling_factor=rope.factor,
        original_max_position_embeddings=rope.context,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        correction_range_round_to_int=rope.truncate,
        use_cpu_initialization=True,
    )
    angles, sharper = theirs.get_emb(100)
    expected = torch.outer(torch.arange(100.0), rotary_frequencies(rope, 100)).repeat(1, 2)
    torch.testing.assert_close(angles[:, 0, 0], expected, rtol=3e-7, atol=0)
    settings = Settings(
        rope_scaling_type="yarn",
        rope_scaling_factor=rope.factor,
        rope_scaling_original_max_position_embeddings=rope.context,
    )
    assert rope_of(settings).attention_factor == sharper


def test_megatrons_layers_get_the_attention_factor():
    for name in ("mscale", "mscale_all_dim"):
        settings = Settings(
            rope_scaling_type="yarn",
            rope_scaling_factor=4.0,
            rope_scaling_original_max_position_embeddings=64,
            **{f"rope_scaling_{name}": 0.7},
        )
        expected = _yarn_get_concentration_factor(
            4.0, *((0.7, 0.0) if name == "mscale" else (1.0, 0.7))
        )
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        assert _yarn_get_concentration_factor_from_config(config) == 1.0
        set_attention_factor(config, rope_of(settings))
        got = _yarn_get_concentration_factor_from_config(config)
        assert got == pytest.approx(expected, rel=1e-14) and got != 1.0


@pytest.mark.parametrize(
    "rope",
    [
        Rope(64, 10000.0),
        Rope(128, 500000.0, "linear", factor=4.0),
        Rope(128, 500000.0, "llama3", factor=8.0, context=8192),
        Rope(64, 10000.0, "yarn", factor=4.0, context=64),
    ],
    ids=lambda rope: rope.kind,
)
def test_resonance_rounds_every_wavelength_to_whole_tokens(rope):
    """Resonance RoPE (arXiv 2403.00071, eq. 5): 2 pi / round(2 pi / theta), in Python's floats."""
    got = rotary_frequencies(Rope(**{**vars(rope), "resonance": True}), 1).tolist()
    num_compared = 0
    for ours, frequency in zip(got, rotary_frequencies(rope, 1).tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if abs(wavelength % 1 - 0.5) < 1e-3 + 2e-7 * wavelength:
            continue  # fp32 may round it to either side
        assert ours == pytest.approx(2 * math.pi / round(wavelength), rel=2e-7)
        num_compared += 1
    assert num_compared > rope.width // 2 - 20  # wavelengths of millions of tokens are left out
    if rope.kind == "default":  # by hand: 2 pi = 6.28, 2 pi 10000^(1/32) = 8.38, 11.17
        wavelengths = [2 * math.pi / ours for ours in got]
        assert wavelengths[:3] == pytest.approx([6, 8, 11], rel=1e-6)
        angles = torch.outer(torch.arange(200.0), torch.tensor(got))
        for channel, wavelength in enumerate(wavelengths[:10]):  # they repeat
            whole = round(wavelength)
            torch.testing.assert_close(
                angles[:-whole, channel].cos(), angles[whole:, channel].cos(), atol=2e-5, rtol=0
            )


def test_resonance_divisors_give_transformers_longrope_the_same_frequencies():
    rope = Rope(64, 10000.0, "yarn", factor=4.0, context=64, resonance=True)
    divisors = list(resonance_divisors(rope, 1))
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": divisors,
            "long_factor": divisors,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
        },
    )
    expected, sharper = ROPE_INIT_FUNCTIONS["longrope"](config)
    assert torch.equal(rotary_frequencies(rope, 1), expected) and sharper == 1.25
