"""Nested models to decode, and the expected tokens, computed without a cache."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding.network import Network, load_network
from tests.support.exit_parts import NestedCase, save_nested
from tests.support.model_directories import family_model

DEPTHS = (1, 3, 4)
"""Depths of the exits of `save_nested`'s models."""


def nested(directory: Path, family: str, kind: str = "block", **more) -> tuple[NestedCase, Network]:
    """Return the reference of a model and the network that decodes it.

    The weights are far from uniform, so that tokens differ.
    """
    case = save_nested(directory, family, kind, **more)
    return case, load_network(directory)


def prompts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]


def continue_greedily(
    prompt: list[int], num_tokens: int, logits_after: Callable[[list[int]], torch.Tensor]
) -> list[int]:
    """Return the most likely tokens; ``logits_after`` [v] reads the whole text for each."""
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(logits_after(text).argmax()))
    return text[len(prompt) :]


def last_logits(case: NestedCase, depth: int, text: Sequence[int]) -> torch.Tensor:
    """Return the expected logits [v] of the exit at ``depth`` after a text."""
    return case.logits(depth, torch.tensor([list(text)]))[0, -1]


@cache
def plain_network(family: str = "llama", agree: float = 0.3) -> tuple[NestedCase, Network]:
    """Return a model with shared norm and head at exits 1, 2, 3 and 4, and its network.

    The contribution of layers above the first is scaled by ``agree``, so that shallow exits often
    agree with the full model.
    """
    model = family_model(family)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(agree)
    other = copy.deepcopy(model)
    return NestedCase(model), Network(
        other, {depth: NestedExit(other.model.norm, other.lm_head) for depth in (1, 2, 3, 4)}
    )
