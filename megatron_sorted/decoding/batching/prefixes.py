"""Prefix caching: what layers computed for earlier texts, kept for later ones that begin alike."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sorted.decoding.cache.capacity import bytes_needed
from megatron_sorted.decoding.cache.state import PART, DecodingState, num_slots

MIN_TOKENS = 16
"""Shortest common beginning that is worth a copy."""
MAX_KEPT = 1024
"""Maximum number of kept texts: each is compared with every new prompt."""


@dataclass(eq=False)
class Kept:
    """A text that is kept.

    Attributes:
        tokens: The tokens.
        states: The model's state, and that of the model that drafts.
        tenant: Name of its owner.
        num_prompt: Number of tokens that were read as a prompt, and not written.
        num_bytes: Memory that it takes.
    """

    tokens: np.ndarray
    states: list[DecodingState]
    tenant: str
    num_prompt: int
    num_bytes: int


class PrefixCache:
    """Texts that have ended, the one that was used least recently first.

    The compiled library computes the same bits for a token in every pass, so any beginning can be
    used. torch rounds by the number of tokens in a pass: there only the pieces in which prompts are
    read are the same, and whole pieces alone are used.

    Args:
        shared: Whether owners may use each other's texts.
    """

    def __init__(self, shared: bool):
        self.shared, self.num_bytes = shared, 0
        self._kept: OrderedDict[int, Kept] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of kept texts."""
        return len(self._kept)

    def find(
        self, prompt: Sequence[int], tenant: str, state: DecodingState
    ) -> tuple[Kept | None, int]:
        """Return the kept text whose beginning saves most, and how many tokens it has in common.

        Args:
            prompt: Tokens of the new text.
            tenant: Name of its owner.
            state: The state of the new text.
        """
        best, longest, most, new = None, 0, 0, np.asarray(prompt)
        for kept in self._kept.values():
            if kept.tenant != tenant and not self.shared:
                continue
            common = common_length(kept.tokens, new)
            if not state.network.is_native:
                common = min(common, kept.num_prompt, len(prompt) - 1) // PART * PART
            depth = min(max(kept.states[0].segments), max(state.segments))
            if common >= MIN_TOKENS and common * depth > most:
                best, longest, most = kept, common, common * depth
        if best is None:
            return None, 0
        self._kept.move_to_end(id(best))
        return best, longest

    def keep(self, states: Sequence[DecodingState], tenant: str, num_prompt: int) -> None:
        """Keep a text of one row; what it continues is dropped, unless deeper layers read it."""
        state = states[0]
        length = state.lengths[0]
        tokens = state.tokens_bc[0, :length].cpu().numpy().copy()
        for kept in list(self._kept.values()):
            size = len(kept.tokens)
            if (
                kept.tenant == tenant
                and size <= length
                and max(kept.states[0].segments) <= max(state.segments)
                and common_length(kept.tokens, tokens) == size
            ):
                self._drop(kept)
        states = [shortened(one) for one in states]
        size = sum(bytes_needed(one.network, 1, one.capacity, [*one.segments]) for one in states)
        kept = Kept(tokens, states, tenant, num_prompt, size)
        self._kept[id(kept)] = kept
        self.num_bytes += size
        while len(self._kept) > MAX_KEPT:
            self.evict()

    def evict(self) -> bool:
        """Drop the text that was used least recently; return whether there was one."""
        if not self._kept:
            return False
        self._drop(next(iter(self._kept.values())))
        return True

    def _drop(self, kept: Kept) -> None:
        del self._kept[id(kept)]
        self.num_bytes -= kept.num_bytes
        kept.states = []


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of tokens with which two texts begin alike.

    >>> common_length(np.array([5, 6, 7]), np.array([5, 6, 8, 9]))
    2
    """
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size


def shortened(state: DecodingState) -> DecodingState:
    """Return a copy of a text of one row in as little memory as it needs, or the text itself."""
    length = state.lengths[0]
    if num_slots(length) >= state.capacity or state.network.graphs:
        return state
    copy = DecodingState(state.network, 1, length, [*state.segments])
    copy.append(state.tokens_bc[:, :length])
    copy_beginning(state, copy, length)
    return copy


def copy_beginning(source: DecodingState, target: DecodingState, length: int) -> None:
    """Copy what layers computed for the first tokens of a text of one row to another.

    Args:
        source: The text to copy from.
        target: A text with the same beginning, of which no layer has run yet.
        length: Number of tokens.
    """
    pairs = [
        *((source.segments.get(stop), one) for stop, one in target.segments.items()),
        *((source.blocks.get(stop), one) for stop, one in target.blocks.items()),
    ]
    with torch.no_grad():
        for theirs, mine in pairs:
            if theirs is None:
                continue
            count = min(length, theirs.filled[0])
            mine.hidden_bch[:, :count] = theirs.hidden_bch[:, :count]
            for old, new in zip(theirs.caches, mine.caches, strict=True):
                new.both[:, :, :, :count] = old.both[:, :, :, :count]
            mine.filled = [count]
