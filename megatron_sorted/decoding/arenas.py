"""Memory that outlives a text: a network lends it to one batch after another, with the passes that were recorded on it."""

from collections.abc import Sequence

import torch

from megatron_sorted.decoding.memory import LEAST_SPAN, Memory
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.passes import Passes

MOST_IDLE = 4
MOST_IDLE_BYTES = 4 << 30
"""How many memories, and how large together, a network keeps while nobody uses them."""


def lend(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> Memory:
    """Returns memory without texts of at least this capacity, which nobody else has.

    Capacities are powers of two, so that texts of other lengths fit as well.
    """
    wanted = num_rows, max(LEAST_SPAN, 1 << (capacity - 1).bit_length()), tuple(sorted(set(stops)))
    for memory in reversed(network.idle):
        if (memory.num_rows, memory.capacity, memory.stops) == wanted:
            network.idle.remove(memory)
            memory.clear()
            return memory
    try:
        return _make(network, *wanted)
    except torch.OutOfMemoryError:
        network.idle.clear()
    return _make(network, *wanted)


def take_back(network: Network, memory: Memory) -> None:
    """Keeps memory for the next borrower, unless too much is idle; what has been idle longest goes first."""
    network.idle.append(memory)
    while len(network.idle) > MOST_IDLE or sum(one.num_bytes for one in network.idle) > MOST_IDLE_BYTES:
        del network.idle[0]


def _make(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> Memory:
    with torch.inference_mode(False):  # what is made within may not be written without
        return Memory(network, num_rows, capacity, stops, Passes(network.make_recorder() if network.make_recorder else None))
