"""The model of a soak: a small random one whose exits often agree, with a tokenizer."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece

CONTEXT, VOCABULARY = 1024, 300
DEPTHS = (1, 2, 3)
"""Exits beside the last layer's; they are read with the last norm and head."""
SPREAD, ABOVE = 0.3, 0.2
"""Spread of the weights, so that tokens depend on the whole text; scale of what layers above the
first add, so that exits often agree."""
TEXTS = (
    "Once upon a time there was a small red cat.\nIt sat on a mat.",
    "The big dog ran 12 miles, and the cat did not!",
    'Other signs: "yes", replied the mother. Größer 猫!',
    "A bird flew over the house. The bird sang.\n\nThen it was night.",
)


def write_soaked_model(folder: Path) -> Path:
    """Write the model into a folder and return its directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=DEPTHS[-1] + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=SPREAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(ABOVE)
    target = folder / "soaked"
    model.save_pretrained(target)
    train_sentencepiece(lambda: TEXTS, str(target / "tokenizer.model"), VOCABULARY)
    return target
