"""Memory for tensors that are read, used once and given back: at once, and without the cost of fresh pages."""

import mmap
from contextlib import suppress

import torch

LARGE_BYTES = 1 << 22


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of arbitrary numbers; a large one has a mapping of its own.

    The system clears every page it hands out; in pages of 4 KB that takes longer than reading a weight from its cache, in large ones (where
    it has them) a fifth. And what is given back leaves no holes in a heap that the next tensor does not fit into.
    """
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    if num_bytes < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor as writable bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors of one kind and length are the same bit for bit, compared eight bytes at a time."""
    one, other = one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
    words = one.numel() // 8 * 8
    aligned = all(
        tensor.data_ptr() % 8 == 0 and tensor.storage_offset() % 8 == 0 for tensor in (one, other)
    )
    if not aligned:
        return torch.equal(one, other)
    return torch.equal(
        one[:words].view(torch.int64), other[:words].view(torch.int64)
    ) and torch.equal(one[words:], other[words:])
