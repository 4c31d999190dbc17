"""Caches with recorded passes, which a network keeps for later texts."""

from collections.abc import Sequence

import torch

from megatron_sorted.decoding.cache.memory import MIN_SPAN, BatchCache
from megatron_sorted.decoding.cache.passes import Passes
from megatron_sorted.decoding.network import Network

MAX_IDLE = 4
"""Maximum number of unused caches that a network keeps."""
MAX_IDLE_BYTES = 4 << 30
"""Maximum size of these caches together."""


def acquire(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> BatchCache:
    """Return an empty cache of at least this capacity: an unused one of the network or a new one.

    Capacities are powers of two, so that a cache can be reused for texts of other lengths.
    """
    wanted = num_rows, max(MIN_SPAN, 1 << (capacity - 1).bit_length()), tuple(sorted(set(stops)))
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


def release(network: Network, memory: BatchCache) -> None:
    """Keep a cache for later use; if there are too many, drop those unused for longest."""
    network.idle.append(memory)
    while (
        len(network.idle) > MAX_IDLE or sum(one.num_bytes for one in network.idle) > MAX_IDLE_BYTES
    ):
        del network.idle[0]


def _make(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> BatchCache:
    passes = Passes(network.make_recorder() if network.make_recorder else None)
    with torch.inference_mode(False):  # inference tensors cannot be written outside the mode
        return network.new_cache(num_rows, capacity, stops, passes)
