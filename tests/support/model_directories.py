"""Tiny random models of every family as Hugging Face directories, written by transformers."""

import json
from pathlib import Path

import torch

from tests.support.hugging_face import make_model

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": ROPE_LLAMA3}),
    "llama_linear": (
        "Llama",
        {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": ROPE_LINEAR},
    ),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def family_model(family: str, tied: bool = False) -> torch.nn.Module:
    """Return a random model of one of ``FAMILIES``."""
    name, changes = FAMILIES[family]
    return make_model(name, tie_word_embeddings=tied, **changes)


def save_model(
    directory: Path,
    family: str,
    tied: bool = False,
    num_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> torch.nn.Module:
    """Write a model with transformers in at least ``num_shards`` files; return it.

    ``changes`` go into its config.json afterwards.
    """
    model = family_model(family, tied).to(dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(
        directory, max_shard_size=2 * size if num_shards == 1 else size // num_shards
    )
    if changes:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


def tokens(length: int = 40, rows: int = 2) -> torch.Tensor:
    """Return token ids [b, s] of the tiny vocabulary."""
    return torch.randint(100, (rows, length), generator=torch.Generator().manual_seed(5))
