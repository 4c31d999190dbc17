"""Whether a batch fits into memory, before it is begun: a host that lends more than it has kills the process instead of refusing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_sorted.decoding.network import Network
from megatron_sorted.errors import MemoryExhaustedError

HOST_REFUSES = ("can't allocate memory", "not enough memory")
"""What torch's allocator of the host says in a plain RuntimeError."""
TOKEN_BYTES = 8
REMEDY = "Shorten prompts or ask for fewer new tokens or texts at once."


def bytes_needed(network: Network, num_rows: int, capacity: int, stops: Sequence[int]) -> int:
    """Return the bytes of keys, values, hidden states and tokens of so many texts of ``capacity`` slots."""
    blocks = [
        network.readers[stop].block
        for stop in set(stops)
        if stop in network.readers and network.readers[stop].block is not None
    ]
    keys = sum(
        2 * layer.num_groups * layer.head_size for layer in [*network.layers[: max(stops)], *blocks]
    )
    states = (len(set(stops)) + len(blocks)) * network.hidden_size
    return num_rows * capacity * ((keys + states) * network.embedding.element_size() + TOKEN_BYTES)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that the host, and the container this runs in, can still give; None where nobody tells.

    Args:
        root: Of the file system; for tests.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = root / "sys/fs/cgroup"
        most, used = (
            (group / "memory.max").read_text(encoding="ascii").strip(),
            int((group / "memory.current").read_text(encoding="ascii")),
        )
        # files that were read count as used and are dropped when memory is short
        files = [
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("inactive_file ")
        ]
        if most != "max":
            found.append(max(0, int(most) - used + sum(files)))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def check_cache_memory(
    network: Network, num_rows: int, capacity: int, stops: Sequence[int], more_bytes: int = 0
) -> None:
    """Check that the texts fit; a device's own allocator says so by itself.

    Args:
        network: What reads them.
        num_rows: Texts.
        capacity: Slots of each.
        stops: Depths at which reading may stop.
        more_bytes: That a model which drafts needs for them.

    Raises:
        MemoryExhaustedError: They do not fit into the host's memory.
    """
    if network.device.type != "cpu":
        return
    needed, free = bytes_needed(network, num_rows, capacity, stops) + more_bytes, free_host_bytes()
    if free is not None and needed > free:
        raise MemoryExhaustedError(
            f"out of memory: {num_rows} texts of {capacity} tokens need {needed / 1e9:.2f} GB of keys and values, "
            f"{free / 1e9:.2f} GB are free. {REMEDY}"
        )


@contextmanager
def as_memory_error() -> Iterator[None]:
    """Say in one kind of error that memory is exhausted, whoever noticed.

    Raises:
        MemoryExhaustedError: It is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryExhaustedError(_words(error)) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in HOST_REFUSES):
            raise
        raise MemoryExhaustedError(_words(error)) from error


def _words(error: BaseException) -> str:
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]}). {REMEDY}"
