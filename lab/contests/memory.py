"""The memory's own speed: a plain read of more bytes than caches hold."""

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from megatron_sorted.decoding.native.arena import Arena
from megatron_sorted.decoding.native.compiler import FLAGS, find_compiler, own_targets
from megatron_sorted.errors import PlatformError

SOURCE = Path(__file__).with_name("read_memory.cpp")
NUM_BYTES = 1 << 30


class MemoryReader:
    """A buffer and a compiled loop that reads it.

    Args:
        num_bytes: Size of the buffer.

    Raises:
        PlatformError: The compiler failed.
    """

    def __init__(self, num_bytes: int = NUM_BYTES):
        # large pages, as our weights: with small ones a read is about a quarter slower
        self.numbers = Arena().empty(num_bytes // 8 * 8).view(torch.int64).fill_(1)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "read.so"
            command = [*find_compiler(), *FLAGS, *own_targets()[0], str(SOURCE), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PlatformError(
                    f"{command[0]}: it cannot compile {SOURCE.name}. Set CXX to another compiler. "
                    f"{done.stderr[:500]}"
                )
            self.read_all = ctypes.CDLL(str(target)).read_words
        self.read_all.restype = ctypes.c_uint64
        self.read_all.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]

    def read(self, threads: int) -> int:
        """Return the sum of the numbers, which are all 1, in blocks of 64 for each thread."""
        return self.read_all(threads, self.numbers.data_ptr(), self.numbers.numel())

    def bytes_a_second(self, threads: int) -> float:
        """Return the speed of one read."""
        start = time.perf_counter()
        num_numbers = self.read(threads)
        return 8 * num_numbers / (time.perf_counter() - start)
