"""Batches that do not fit are refused before the host's memory is exhausted, in one line."""

import pytest
import torch

from megatron_sorted.decoding.cache import capacity as capacity_module
from megatron_sorted.decoding.cache.capacity import (
    as_memory_error,
    bytes_needed,
    check_cache_memory,
    free_host_bytes,
)
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.strategies import SelfSpeculative
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.errors import MemoryExhaustedError
from tests.support.decoding import nested, plain_network


@pytest.mark.parametrize(
    ("kind", "stops"), [("block", (1, 4)), ("mlp", (3,)), ("adapter and block", (1, 3, 4))]
)
def test_needed_bytes_are_those_of_the_cache(kind, stops, tmp_path):
    _, network = nested(tmp_path, "qwen3", kind)
    state = DecodingState(network, 3, 100, stops)
    assert bytes_needed(network, 3, state.capacity, stops) == state.memory.num_bytes


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000 kB\n"}, 2_048_000),
        (
            {
                "proc/meminfo": "MemAvailable: 2000 kB\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "5\n",
                "sys/fs/cgroup/memory.stat": "anon 5\n",
            },
            2_048_000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 2000 kB\n",
                "sys/fs/cgroup/memory.max": "1000000\n",
                "sys/fs/cgroup/memory.current": "900000\n",
                "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 300000\n",
            },
            400_000,
        ),
    ],
)
def test_free_bytes_are_the_smaller_of_host_and_container(files, free, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == free


def test_a_batch_that_does_not_fit_is_refused_before_it_starts(monkeypatch):
    _, network = plain_network("llama")
    monkeypatch.setattr(capacity_module, "free_host_bytes", lambda: 1_000_000)
    check_cache_memory(network, 1, 64, (4,))
    with pytest.raises(
        MemoryExhaustedError,
        match=r"out of memory: 500 texts of 208 tokens need 0\.\d\d GB of KV cache, 0.00 GB",
    ):
        generate(network, [[1] * 7] * 500, limits=Limits(200))
    monkeypatch.setattr(capacity_module, "free_host_bytes", lambda: None)
    check_cache_memory(network, 500, 1 << 30, (4,))


def test_the_memory_of_a_draft_model_counts_too(monkeypatch):
    (_, network), (_, draft) = plain_network("llama"), plain_network("qwen3")
    free = bytes_needed(network, 1, 7 + 8 + 3 + 1, (4,))
    monkeypatch.setattr(capacity_module, "free_host_bytes", lambda: free)
    assert len(generate(network, [[1] * 7], limits=Limits(8))[0].tokens) == 8
    with pytest.raises(MemoryExhaustedError, match="out of memory: 1 texts of 19 tokens"):
        generate(network, [[1] * 7], SelfSpeculative(2, 3), limits=Limits(8), draft=draft)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_errors_of_all_allocators_are_reported_alike(error):
    with (
        pytest.raises(MemoryExhaustedError, match=r"^out of memory \([^\n]+\)\. Shorten prompts"),
        as_memory_error(),
    ):
        raise error


def test_other_errors_are_unchanged():
    with pytest.raises(RuntimeError, match="broken"), as_memory_error():
        raise RuntimeError("broken")
