"""Nested models to decode, and what decoding must say: everything computed from the whole text each time, without a cache."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from megatron_sorted.conversion.hugging_face.nested_exits import Exit
from megatron_sorted.decoding.network import Network, load_network
from tests.support.exit_parts import NestedCase, save_nested
from tests.support.model_directories import family_model

DEPTHS = (1, 3, 4)
"""Of the exits of `save_nested`'s models."""


def nested(directory: Path, family: str, kind: str = "block", **more) -> tuple[NestedCase, Network]:
    """Returns what a model must say and the network that decodes it; weights far from uniform, so that tokens differ."""
    case = save_nested(directory, family, kind, **more)
    return case, load_network(directory)


def prompts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Returns random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]


def continue_greedily(
    prompt: list[int], num_tokens: int, logits_after: Callable[[list[int]], torch.Tensor]
) -> list[int]:
    """Returns the most likely tokens one after another; ``logits_after`` [v] computes the whole text anew."""
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(logits_after(text).argmax()))
    return text[len(prompt) :]


def last_logits(case: NestedCase, depth: int, text: Sequence[int]) -> torch.Tensor:
    """Returns what the exit at ``depth`` must say after a text [v]."""
    return case.logits(depth, torch.tensor([list(text)]))[0, -1]


@cache
def plain_network(family: str = "llama", agree: float = 0.3) -> tuple[NestedCase, Network]:
    """Returns a model with shared norm and head at exits 1, 2, 3 and 4, and its network.

    What layers above the first add is scaled by ``agree``, so that shallow exits often say what the full model says.
    """
    model = family_model(family)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(agree)
    other = copy.deepcopy(model)
    return NestedCase(model), Network(
        other, {depth: Exit(other.model.norm, other.lm_head) for depth in (1, 2, 3, 4)}
    )
