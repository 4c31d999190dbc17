"""Tiny random models of every family as Hugging Face directories, for the tests of evaluation."""

import functools
from pathlib import Path

import torch

from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece

VOCAB_SIZE = 300
TEXTS = [
    "Once upon a time there was a small red cat.\nIt sat on a mat.",
    "The big dog ran 12 miles, and the cat did not!",
    'Größer 猫 and other signs: "yes", replied Tom\'s mother.',
    "A bird flew over the house. The bird sang.\n\nThen it was night.",
]


@functools.cache
def _pieces() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train_sentencepiece(lambda: TEXTS, str(Path(folder) / "t.model"), VOCAB_SIZE)
        return (Path(folder) / "t.model").read_bytes()


def write_tokenizer(directory: Path) -> Path:
    """Write a sentencepiece file of 300 pieces; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(_pieces())
    return directory


def make_model(
    family: str = "llama", num_layers: int = 3, tied: bool = True, seed: int = 0, **more
):
    """Return a random model; its norms are not all ones, so that confused norms are noticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
            **({"head_dim": 8} if family in ("mistral", "qwen3") else {}),
            **more,
        },
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def write_model(directory: Path, family: str = "llama", **more) -> Path:
    """Write a random model and a tokenizer; return the directory."""
    make_model(family, **more).save_pretrained(directory)
    return write_tokenizer(directory)
