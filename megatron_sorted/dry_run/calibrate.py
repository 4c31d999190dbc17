"""Measurement of this machine's cores for plans."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_sorted.errors import SettingsError
from megatron_sorted.files import write_text_atomically

SIZE, BYTES, REPEATS = 768, 64 << 20, 5


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest of a few times: other programs on the machine only make it longer."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def calibrate(path: Path, cores: int) -> dict[str, float]:
    """Measure one core, write the fields of a cpu device to a JSON file and return them.

    These are matrix products in fp32 and bf16, and the rate at which an element-wise operation
    reads and writes.

    Raises:
        SettingsError: The file cannot be written.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise SettingsError(
            f"--calibrate: {path} cannot be written. Give a file in a folder that exists."
        )
    torch.set_num_threads(1)
    rates = {}
    for name, dtype in (("single_flops", torch.float32), ("half_flops", torch.bfloat16)):
        left, right = torch.randn(SIZE, SIZE, dtype=dtype), torch.randn(SIZE, SIZE, dtype=dtype)
        rates[name] = 2 * SIZE**3 / _best_seconds(lambda left=left, right=right: left @ right)
    numbers = torch.randn(BYTES // 4)
    out = torch.empty_like(numbers)
    rates["memory_rate"] = 2 * BYTES / _best_seconds(lambda: torch.mul(numbers, 1.5, out=out))
    rates["per_host"] = cores
    write_text_atomically(path, json.dumps(rates, indent=1) + "\n")
    return rates
