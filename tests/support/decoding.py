"""Nested models to decode, and the expected tokens, computed without a cache."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding.generate import start_batch
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.native.library import native_library
from megatron_sorted.decoding.network import Network, load_network
from megatron_sorted.decoding.speculation.steps import DecodingBatch
from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.texts import TextRequest
from tests.support.exit_parts import NestedCase, save_nested
from tests.support.model_directories import family_model

DEPTHS = (1, 3, 4)
"""Depths of the exits of `save_nested`'s models."""


def nested(
    directory: Path,
    family: str,
    kind: str = "block",
    dtype: torch.dtype = torch.float32,
    native: str = "auto",
    **more,
) -> tuple[NestedCase, Network]:
    """Return the reference of a model and the network that decodes it.

    The weights are far from uniform, so that tokens differ.

    Args:
        directory: Directory to write to.
        family: One of `model_directories.FAMILIES`.
        kind: Parts of the exits, one of `exit_parts.KINDS`.
        dtype: Data type of the network.
        native: Whether the compiled library runs the network.
        **more: Arguments of `save_nested`.
    """
    case = save_nested(directory, family, kind, **more)
    return case, load_network(directory, dtype=dtype, native=native)


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


KINDS = ("torch", "float32", "bfloat16", "int8")
"""Kinds of weights of `plain_network`: torch's in float32, and those of the compiled library."""


@cache
def has_native() -> bool:
    """Return whether the compiled library can be built here."""
    try:
        return native_library() is not None
    except NativeError:
        return False


needs_native = pytest.mark.skipif(not has_native(), reason="no C++ compiler builds the library")


@cache
def plain_network(
    family: str = "llama", agree: float = 0.3, kind: str | None = None
) -> tuple[NestedCase, Network]:
    """Return a model with shared norm and head at exits 1, 2, 3 and 4, and its network.

    The contribution of layers above the first is scaled by ``agree``, so that shallow exits often
    agree with the full model.

    Args:
        family: One of `model_directories.FAMILIES`.
        agree: See above.
        kind: One of `KINDS`; by default the library's float32, or torch's without a compiler.
    """
    model = family_model(family)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(agree)
    other = copy.deepcopy(model).requires_grad_(False)
    exits = {depth: NestedExit(other.model.norm, other.lm_head) for depth in (1, 2, 3, 4)}
    kind = kind or ("float32" if has_native() else "torch")
    native = None if kind == "torch" else kind
    return NestedCase(model), Network(other, exits, native=native, keep=True)


def started(
    network: Network,
    texts: Sequence[Sequence[int]],
    strategy: Strategy,
    sampling: SamplingParameters,
    max_new_tokens: int,
) -> DecodingBatch:
    """Return a batch of texts that has not run any layer yet."""
    return start_batch(network, TextRequest(texts, strategy, sampling, max_new_tokens), None)
