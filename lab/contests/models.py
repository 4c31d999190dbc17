"""The models of the contest: random ones of two shapes, and an exit that often agrees."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA with a tied head.

    Attributes:
        name: Name in tables.
        layers, hidden, inner, heads, vocabulary: Sizes.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int


SHAPES = (Shape("52M", 10, 640, 1728, 10, 4096), Shape("170M", 16, 768, 2048, 12, 32000))
QUICK_SHAPES = (Shape("tiny", 4, 256, 512, 4, 512),)
AGREEING = 2
"""Depth of the exit that agrees with most choices of a model written with ``agreeing``."""


def write_model(shape: Shape, folder: Path, context: int, agreeing: bool = False) -> Path:
    """Return a Hugging Face directory with random weights, written unless it is there.

    Args:
        shape: Sizes.
        folder: The folder of all models.
        context: Longest text.
        agreeing: Whether the layers up to `AGREEING` add much to the hidden state and the others
            little, so that the exit there writes most of the full model's tokens.
    """
    target = folder / (f"{shape.name}-agreeing" if agreeing else shape.name)
    if (target / "config.json").is_file():
        return target
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.exit_layer_indices = sorted({AGREEING, shape.layers // 2, shape.layers})
    model = LlamaForCausalLM(config).eval()
    if agreeing:
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    matrix.weight.mul_(3.0 if index < AGREEING else 0.05)
    model.generation_config.eos_token_id = None
    partial = target.with_name(f"{target.name}.partial")
    model.save_pretrained(partial)
    partial.rename(target)
    return target


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator).tolist()


def question_prompts(
    model: Path, questions: Sequence, per_group: int, most_tokens: int
) -> dict[str, list[list[int]]]:
    """Return the first turns of questions as prompts, evenly spread, by Spec-Bench's group.

    Args:
        model: Directory with a tokenizer.
        questions: Questions as `read_questions` returns them.
        per_group: Number of questions of each group.
        most_tokens: Longest prompt; of a longer one the end is kept.
    """
    from megatron_sorted.benchmark.questions import spread
    from megatron_sorted.decoding.open_model import open_text_generator

    generator = open_text_generator(model, native="off")
    groups: dict[str, list] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    return {
        group: [
            generator.encode_chat([{"role": "user", "content": question.turns[0]}])[-most_tokens:]
            for question in spread(members, per_group)
        ]
        for group, members in groups.items()
    }
