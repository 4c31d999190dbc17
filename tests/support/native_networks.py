"""Random networks run by the compiled library, and their passes in many forms to compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.network import Network, load_network
from tests.support.native_libraries import library_for

VOCABULARY = 70
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Kinds of weights of the library, and the data types that choose them."""


def load_native(
    directory: Path, kind: str, target: str = "native", depths: Sequence[int] | None = None
) -> Network:
    """Load a network that the library for a value of -march runs; see `load_network`."""
    with mock.patch(
        "megatron_sorted.decoding.native.network.native_library", lambda: library_for(target)
    ):
        return load_network(directory, depths, dtype=DTYPES[kind], native="on")


@dataclass(frozen=True)
class Slot:
    """What the memory holds of one token at one stop, and its logits there.

    Attributes:
        hidden: Hidden state.
        cached: Keys and values of the stop's layers, of its own block too.
        logits: Logits.
    """

    hidden: torch.Tensor
    cached: torch.Tensor
    logits: torch.Tensor

    def equals(self, other: "Slot") -> bool:
        """Return whether all is equal, bit for bit; no zero of the other sign, no NaN."""
        pairs = (
            (self.hidden, other.hidden),
            (self.cached, other.cached),
            (self.logits, other.logits),
        )
        return all(
            bool(torch.isfinite(mine).all())
            and torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
            for mine, theirs in pairs
        )


def slots_of(state: DecodingState, row: int, depth: int, slots: Sequence[int]) -> list[Slot]:
    """Return what the memory holds of some tokens of a row that have been read up to a stop."""
    segments = [
        segment
        for segment in (state.segments[depth], state.blocks.get(depth))
        if segment is not None
    ]
    every_row = torch.tensor([list(slots)] * state.num_rows)
    logits = state.logits(depth, every_row)[row].contiguous()
    return [
        Slot(
            segments[-1].hidden_bch[row, slot].clone(),
            torch.cat(
                [
                    tensor[row, :, slot].flatten()
                    for segment in segments
                    for cache in segment.caches
                    for tensor in (cache.keys, cache.values)
                ]
            ),
            logits[index],
        )
        for index, slot in enumerate(slots)
    ]


def read_one_by_one(
    network: Network, text: Sequence[int], stops: Sequence[int]
) -> dict[int, list[Slot]]:
    """Return {stop: what is held of each token} of a text read in passes of one token."""
    state = DecodingState(network, 1, len(text), stops)
    for token in text:
        state.append(torch.tensor([[token]]))
        for stop in stops:
            state.read(stop)
    return {stop: slots_of(state, 0, stop, range(len(text))) for stop in stops}


def append_ragged(state: DecodingState, texts: Sequence[Sequence[int]]) -> None:
    """Append texts of different lengths, some perhaps empty, to the rows."""
    longest = max(map(len, texts))
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    state.append(torch.tensor(padded).view(len(texts), longest), [len(text) for text in texts])


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Return the nodes from the text to a node of a tree."""
    return [node] if parents[node] < 0 else [*path_to(parents, parents[node]), node]
