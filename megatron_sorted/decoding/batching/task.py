"""A task of the engine: what needs passes of the model, such as a text that is being written."""

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_sorted.decoding.cache.joined import ForwardPass
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import Sizes

Passes = Generator[ForwardPass | Any, Tensor | None, None]
"""Yields passes, is sent their logits, and yields other outputs for whoever gave the task."""


@dataclass(eq=False)
class Task:
    """What needs passes of the model.

    Attributes:
        sizes: The memory that it needs.
        start: Function from the task to its generator; called when the memory is there.
        emit: Called with every output.
        tenant: Name of the owner of its prompt, see `PrefixCache`.
        prompt: The tokens whose beginning may be kept already; None where nothing is kept.
        passes: The generator, once it is begun.
        pending: The pass that it waits for.
        states: States that hold the prompt, the model's first.
        donor: A task whose prompt begins alike and is being read, and the number of tokens that
            they have in common; None without one.
        num_prompt: Number of tokens that were known when it began.
        num_passes: Number of complete passes of each of its states.
        num_turns: Number of rounds in which a piece of a long prompt was read for it.
        seconds: Time that was used for it: its share of joined passes, and its own steps.
        num_layers: Number of layers that ran for it, summed over its tokens.
        num_cached: Number of tokens of its prompt that were kept already.
        ended: Called with the task, and None or an error, when it is over.
    """

    sizes: Sizes
    start: Callable[["Task"], Passes]
    emit: Callable[[Any], None]
    ended: Callable[["Task", BaseException | None], None]
    tenant: str = ""
    prompt: list[int] | None = None
    passes: Passes | None = None
    pending: ForwardPass | None = None
    states: list[DecodingState] = field(default_factory=list)
    donor: "tuple[Task, int] | None" = None
    num_prompt: int = 0
    num_passes: Counter[DecodingState] = field(default_factory=Counter)
    num_turns: int = 0
    seconds: float = 0.0
    num_layers: int = 0
    num_cached: int = 0

    @property
    def num_bytes(self) -> int:
        """Return the memory that is reserved for it."""
        return self.sizes.num_bytes + self.sizes.draft_bytes

    @property
    def num_read(self) -> int:
        """Return the number of tokens that all layers of its text have processed."""
        return min(min(segment.filled) for segment in self.states[0].segments.values())

    def advance(self, logits: Tensor | None) -> bool:
        """Run it to its next pass, given the logits of the last one; return whether there is one.

        Raises:
            SortedError: It cannot go on.
        """
        if self.passes is None:
            self.passes = self.start(self)
        elif self.pending is not None:
            self.num_passes[self.pending.state] += 1
        while True:
            try:
                output = self.passes.send(logits)
            except StopIteration:
                self.pending = None
                return False
            if isinstance(output, ForwardPass):
                self.pending = output
                return True
            logits = None
            self.emit(output)
            if self.passes is None:  # whoever got the output has ended it
                return False

    def close(self) -> None:
        """End it, and free its memory."""
        if self.passes is not None:
            self.passes.close()
        self.pending, self.states, self.passes, self.donor = None, [], None, None
