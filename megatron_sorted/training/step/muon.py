"""What Megatron's Muon needs to know of this program's network."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from megatron_sorted.model.chunk import SortedChunk
from megatron_sorted.settings.muon import MuonSettings
from megatron_sorted.settings.run import Settings


def muon_options(settings: Settings) -> dict[str, Any]:
    """Return the options of Megatron's ``OptimizerConfig`` for Muon; none for another optimizer."""
    if settings.optimizer != "muon":
        return {}
    names = [field.name for field in dataclasses.fields(MuonSettings)]
    return {name: getattr(settings, name) for name in names}


def leave_lookups_and_outputs_to_adam(chunks: Iterable[SortedChunk]) -> None:
    """Mark the matrices of one row a token or position, which Muon must not update.

    Muon takes every matrix that is not marked, and Megatron marks those of its own ``GPTModel``
    alone. So without this the output matrices, with their copies on other stages, learned positions
    and tied embeddings would all be Muon's. Adam's step of a copy depends on nothing but its own
    values and gradient, so copies stay equal.
    """
    for chunk in chunks:
        modules = [*chunk.heads.outputs]
        if chunk.pre_process:
            modules.append(chunk.embedding)
        for module in modules:
            for parameter in module.parameters():
                parameter.is_embedding_or_output_parameter = True
