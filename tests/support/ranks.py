"""Runs a function on several gloo processes and brings the results back to the test.

Processes come from a fork server that has imported torch, megatron and our packages once: a test costs tenths of a second, not
the ten it takes to import everything anew. Processes find each other through a file; the first error of any rank is raised here.
"""

import importlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.support.preload"])
# The fork server has its device calls redirected to the CPU, so processes for another device start from nothing.
SPAWN = multiprocessing.get_context("spawn")
device_context = SPAWN  # tests of a device may give the fork server their own preload and put it here
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class _Later:
    """A function by name: its module may import Megatron, which must wait until the device of the settings is loaded."""

    module: str
    name: str

    def load(self, arguments: tuple) -> Callable:
        from megatron_sorted.platform.select import load_device

        for settings in (argument for argument in arguments if hasattr(argument, "device")):
            load_device(settings)
        return getattr(importlib.import_module(self.module), self.name)


def _child(connection, function: Callable, rank: int, world_size: int, rendezvous: str, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), TEST_INIT_METHOD=rendezvous)
    import torch

    torch.set_num_threads(1)
    try:
        if isinstance(function, _Later):
            function = function.load(arguments)
        # several ranks may share one accelerator
        os.environ["LOCAL_RANK"] = str(rank % max(1, torch.cuda.device_count()))
        answer = ("done", function(*arguments))
    except BaseException:  # whatever it is, the test must see it
        answer = ("failed", traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    connection.close()


def run_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Returns ``function(*arguments)`` of each of ``world_size`` processes, by rank.

    Raises:
        AssertionError: With the traceback of the first rank that failed; the others are ended.
    """
    rendezvous = f"file://{tempfile.mktemp(prefix='rendezvous_')}"
    on_device = any(str(getattr(argument, "device", "cpu")) != "cpu" for argument in arguments)
    context = device_context if on_device else FORK_SERVER
    if on_device:
        function = _Later(function.__module__, function.__qualname__)
    readers, processes = [], []
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(writer, function, rank, world_size, rendezvous, arguments))
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            ready = wait([r for rank, r in enumerate(readers) if rank not in results], timeout=TIMEOUT_SECONDS)
            assert ready, f"ranks {sorted(set(range(world_size)) - set(results))} did not answer within {TIMEOUT_SECONDS} s"
            for reader in ready:
                rank = readers.index(reader)
                try:
                    status, value = pickle.loads(reader.recv_bytes())
                except EOFError:
                    raise AssertionError(f"rank {rank} died without a word") from None
                assert status == "done", f"rank {rank}:\n{value}"
                results[rank] = value
    finally:
        for process in processes:
            if len(results) < world_size:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]
