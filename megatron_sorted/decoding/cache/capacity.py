"""A check that a batch fits into memory before it starts.

A host that overcommits memory kills the process instead of refusing an allocation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_sorted.decoding.network import Network
from megatron_sorted.errors import MemoryExhaustedError

HOST_REFUSES = ("can't allocate memory", "not enough memory")
"""Texts by which a plain RuntimeError of torch's host allocator is recognised."""
TOKEN_BYTES = 8
REMEDY = "Shorten prompts or ask for fewer new tokens or texts at once."


def bytes_needed(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> int:
    """Return the bytes of the cache of a batch.

    Args:
        network: The model.
        num_rows: Number of texts.
        capacity: Number of cache slots of each text.
        stops: Depths at which a forward pass may stop.
    """
    blocks = [
        network.readouts[stop].block
        for stop in set(stops)
        if stop in network.readouts and network.readouts[stop].block is not None
    ]
    keys = sum(
        2 * layer.num_groups * layer.head_size for layer in [*network.layers[: max(stops)], *blocks]
    )
    states = (len(set(stops)) + len(blocks)) * network.hidden_size
    slot = keys * network.cache_dtype.itemsize + states * network.state_dtype.itemsize
    return num_rows * capacity * (slot + TOKEN_BYTES)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return the free bytes of the host or its container; None if the system does not report them.

    Args:
        root: Root of the file system; another one for tests.
    """
    free = []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        # cached files count as used, but the kernel drops them when memory is short
        files = [
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("inactive_file ")
        ]
        if limit != "max":
            free.append(max(0, int(limit) - used + sum(files)))
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


def check_cache_memory(
    network: Network, num_rows: int, capacity: int, stops: Sequence[int], more_bytes: int = 0
) -> None:
    """Check that the texts fit into the host's memory; accelerators report it by themselves.

    Args:
        network: The model.
        num_rows: Number of texts.
        capacity: Number of cache slots of each text.
        stops: Depths at which a forward pass may stop.
        more_bytes: Bytes that another model which drafts needs.

    Raises:
        MemoryExhaustedError: They do not fit.
    """
    if network.device.type != "cpu":
        return
    needed, free = bytes_needed(network, num_rows, capacity, stops) + more_bytes, free_host_bytes()
    if free is not None and needed > free:
        raise memory_error(num_rows, capacity, needed, f"{free / 1e9:.2f} GB are free")


def memory_error(num_rows: int, capacity: int, needed: int, there: str) -> MemoryExhaustedError:
    """Build the error of texts that do not fit.

    Args:
        num_rows: Number of texts.
        capacity: Number of cache slots of each text.
        needed: Bytes that they need.
        there: What there is instead, in words.
    """
    return MemoryExhaustedError(
        f"out of memory: {num_rows} texts of {capacity} tokens need {needed / 1e9:.2f} GB of "
        f"KV cache, {there}. {REMEDY}"
    )


@contextmanager
def as_memory_error() -> Iterator[None]:
    """Re-raise every out-of-memory error as `MemoryExhaustedError`.

    Raises:
        MemoryExhaustedError: Python, a device or the host's allocator ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and not any(text in str(error) for text in HOST_REFUSES):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MemoryExhaustedError(f"out of memory ({reason}). {REMEDY}") from error
