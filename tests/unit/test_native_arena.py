"""Memory of packed weights: tensors do not overlap, and pages are large where they can be."""

import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from megatron_sorted.decoding.native import arena
from megatron_sorted.decoding.native.arena import ALIGNMENT, Arena


def test_tensors_are_aligned_keep_their_numbers_and_do_not_overlap(monkeypatch):
    monkeypatch.setattr(arena, "CHUNK", 4096)
    memory = Arena()
    sizes = [1, 64, 65, 0, 4000, 9000, 7, 4096, 1]  # some begin a new mapping, one is larger
    tensors = [memory.empty(size).fill_(number) for number, size in enumerate(sizes)]
    del memory
    for number, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert tensor.dtype == torch.uint8 and tensor.shape == (size,)
        assert bool((tensor == number).all())
        assert not size or tensor.data_ptr() % ALIGNMENT == 0


def test_a_fork_does_not_share_the_memory():
    tensor = Arena().empty(64).fill_(1)
    child = os.fork()
    if child == 0:
        tensor.fill_(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((tensor == 1).all())


def test_pages_are_large_where_the_system_has_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text(encoding="ascii"):
        pytest.skip("this system has no large pages")
    tensor = Arena().empty(32 << 20).fill_(1)
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    at = tensor.data_ptr()
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", maps):
        first, end = (int(text, 16) for text in entry.split()[0].split("-"))
        if first <= at < end:
            assert " hg" in re.search(r"VmFlags:.*", entry).group(), "madvise(MADV_HUGEPAGE)"
            return
    raise AssertionError("the tensor is in no mapping")


def test_a_system_without_large_pages_is_no_error(monkeypatch):
    class Mapping(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(arena.mmap, "mmap", Mapping)
    assert Arena().empty(10).fill_(3).tolist() == [3] * 10
