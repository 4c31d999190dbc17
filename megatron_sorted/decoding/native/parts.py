"""What the compiled library can run: checked before the first matrix is packed."""

from collections.abc import Iterator

import torch
from torch import nn

from megatron_sorted.conversion.hugging_face.nested_exits import (
    ExitAdapter,
    ExitMlp,
    ExitNorm,
    NestedExit,
)
from megatron_sorted.decoding.cache.eager import distinct_parameters, parts_of_block
from megatron_sorted.decoding.native.compiler import NativeError

ACTIVATIONS = ("SiLU", "SiLUActivation")
"""Names of the only activation that the library knows."""


def check_parts(model: nn.Module, exits: dict[int, NestedExit]) -> None:
    """Check that the library knows all parts of a model and that its weights are finite.

    Raises:
        NativeError: It has another part, or a weight is not finite.
    """
    for mlp in _mlps(model, exits):
        if (name := type(mlp.act_fn).__name__) not in ACTIVATIONS:
            raise NativeError(f"an MLP's activation is {name}, which the library does not know")
    for part in _own_parts(exits):
        if not isinstance(part, ExitAdapter | ExitMlp):
            name = type(part).__name__
            raise NativeError(f"an exit has a {name}, which the library does not know")
    for parameter in distinct_parameters(model, exits):
        # of NaN and numbers, the least and the greatest are NaN
        if not all(torch.isfinite(value) for value in torch.aminmax(parameter.detach())):
            raise NativeError("a matrix or vector of the model holds weights that are not finite")


def _mlps(model: nn.Module, exits: dict[int, NestedExit]) -> Iterator[nn.Module]:
    """Yield the MLPs of a model and its exits."""
    yield from (layer.mlp for layer in model.model.layers)
    yield from (parts_of_block(own.block)[0].mlp for own in exits.values() if own.block is not None)
    yield from (part.mlp for part in _own_parts(exits) if isinstance(part, ExitMlp))


def _own_parts(exits: dict[int, NestedExit]) -> Iterator[nn.Module]:
    """Yield the adapters and MLPs of exits."""
    for own in exits.values():
        if isinstance(own.norm, ExitNorm):
            yield from own.norm.parts
        if own.block is not None and (adapter := parts_of_block(own.block)[1]) is not None:
            yield adapter
