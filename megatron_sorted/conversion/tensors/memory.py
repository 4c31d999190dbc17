"""Memory for tensors that are read, used once and freed, without the cost of fresh small pages."""

import mmap
from contextlib import suppress

import torch

LARGE_BYTES = 1 << 22


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized tensor; a large one has a memory mapping of its own.

    The system clears every page it hands out. With pages of 4 KB that takes longer than reading a
    weight from the page cache, with huge pages (where the kernel has them) a fifth of that. And a
    mapping that is freed leaves no gaps in the heap that are too small for the next tensor.
    """
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    if num_bytes < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, writable, as bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors of equal type and size are equal bit for bit."""
    one, other = one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
    num_bytes = one.numel() // 8 * 8  # compared eight bytes at a time
    aligned = all(
        tensor.data_ptr() % 8 == 0 and tensor.storage_offset() % 8 == 0 for tensor in (one, other)
    )
    if not aligned:
        return torch.equal(one, other)
    return torch.equal(
        one[:num_bytes].view(torch.int64), other[:num_bytes].view(torch.int64)
    ) and torch.equal(one[num_bytes:], other[num_bytes:])
