"""Run a function on several gloo processes and bring the results back to the test.

The processes are forks of the preloaded server that has imported torch and megatron: a test costs
tenths of a second, not the ten it takes to import everything anew, and each starts from the same
untouched state. They find each other through a file; the first error of any rank is raised here,
and the output of ranks is the test's own output.
"""

import importlib
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from tests.support.own_warnings import raise_own_warnings
from tests.support.preloaded import session

# Servers answer device calls on the CPU, so processes for another device start from nothing.
SPAWN = multiprocessing.get_context("spawn")
FORK_SERVER = multiprocessing.get_context("forkserver")
device_context = (
    SPAWN  # tests of a device may give the fork server a preload of their own and put it here
)
TIMEOUT_SECONDS = 240


def run_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Return ``function(*arguments)`` of each of ``world_size`` processes, by rank.

    Raises:
        AssertionError: With the traceback of the first rank that failed; the others are ended.
    """
    on_device = any(str(getattr(argument, "device", "cpu")) != "cpu" for argument in arguments)
    start = _start_on_device if on_device else _start
    rendezvous = f"file://{session.new_path('rendezvous')}"
    with session.turn("ranks", alone=world_size > 2):
        return _answers(
            world_size,
            lambda rank: start(
                function,
                arguments,
                {"RANK": str(rank), "WORLD_SIZE": str(world_size), "TEST_INIT_METHOD": rendezvous},
            ),
        )


def _answers(world_size: int, start: Callable) -> list[Any]:
    """Return what the processes that ``start`` starts, by rank, answer."""
    started, results = [], {}
    try:
        for rank in range(world_size):
            started.append(start(rank))
        while len(results) < world_size:
            pending = {
                started[rank].result: rank for rank in range(world_size) if rank not in results
            }
            ready = wait(list(pending), timeout=TIMEOUT_SECONDS)
            assert ready, (
                f"ranks {sorted(pending.values())} did not answer within {TIMEOUT_SECONDS} s"
            )
            for reader in ready:
                results[pending[reader]] = started[pending[reader]].value(pending[reader])
    finally:
        for rank, process in enumerate(started):
            process.end(kill=rank not in results)
    return [results[rank] for rank in range(world_size)]


def _value(body: bytes, rank: int) -> Any:
    assert body, f"rank {rank} ended without an answer"
    status, value = pickle.loads(body)
    assert status == "done", f"rank {rank}:\n{value}"
    return value


class _Forked:
    """A rank that is a fork of the preloaded server."""

    def __init__(self, connection, result: int):
        self._connection, self.result = connection, result

    def value(self, rank: int) -> Any:
        with open(self.result, "rb", closefd=False) as stream:
            return _value(stream.read(), rank)

    def end(self, kill: bool) -> None:
        """Close the connection, which kills a process that has not answered."""
        if not kill:
            session.wait_for_end(self._connection)
        self._connection.close()
        os.close(self.result)


def _start(function: Callable, arguments: tuple, variables: dict[str, str]) -> _Forked:
    return _Forked(
        *session.call(
            "megatron", "tests.support.ranks", "run_rank", (function, arguments), variables
        )
    )


def run_rank(function: Callable, arguments: tuple) -> Any:
    """Call the function in a rank's process, with one thread."""
    import torch

    from megatron_sorted.platform.select import choose_platform

    torch.set_num_threads(1)
    choose_platform("cpu").prepare()
    return function(*arguments)


class _Spawned:
    """A rank on a device, as a process of multiprocessing."""

    def __init__(self, process, result):
        self._process, self.result = process, result

    def value(self, rank: int) -> Any:
        try:
            return _value(self.result.recv_bytes(), rank)
        except EOFError:
            return _value(b"", rank)

    def end(self, kill: bool) -> None:
        """Wait for the process, which is killed first if it has given no answer."""
        if kill:
            self._process.kill()
        self._process.join()


def _start_on_device(function: Callable, arguments: tuple, variables: dict[str, str]) -> _Spawned:
    reader, writer = device_context.Pipe(duplex=False)
    where = (
        function.__module__,
        function.__qualname__,
    )  # importing it may import Megatron, which must wait for the device
    process = device_context.Process(
        target=_device_rank, args=(writer, where, arguments, variables)
    )
    process.start()
    writer.close()
    return _Spawned(process, reader)


def _device_rank(
    connection, where: tuple[str, str], arguments: tuple, variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    raise_own_warnings()
    import torch

    torch.set_num_threads(1)
    try:
        from megatron_sorted.platform.select import load_device

        for settings in (argument for argument in arguments if hasattr(argument, "device")):
            load_device(settings)
        function = getattr(importlib.import_module(where[0]), where[1])
        # several ranks may share one accelerator
        os.environ["LOCAL_RANK"] = str(int(variables["RANK"]) % max(1, torch.cuda.device_count()))
        answer = ("done", function(*arguments))
    except BaseException:  # whatever it is, the test must see it
        answer = ("failed", traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    connection.close()
