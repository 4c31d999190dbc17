"""Runs layouts on processes of this machine and asks them for memory and times."""

import gc
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_sorted.settings.run import Settings

FORK_SERVER = multiprocessing.get_context("forkserver")
# torch and megatron are imported once for all processes; the server looks for modules from where it is started, the project's root
FORK_SERVER.set_forkserver_preload(["lab.benchmarks.trainer"])


def _resident_bytes() -> int:
    """Return this process's resident memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def _serve(
    connection: Connection,
    settings: Settings,
    rank: int,
    world_size: int,
    rendezvous: str,
    warm: bool,
) -> None:
    """Answer questions about one rank's steps.

    Collective: the run's.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    from lab.benchmarks.trainer import Trainer, start_platform
    from megatron_sorted.parallel.groups import start_process_groups

    platform = start_platform("cpu")
    place = start_process_groups(settings, platform, rendezvous)
    small = replace(
        settings,
        hidden_size=16 * settings.num_attention_heads,
        ffn_hidden_size=64,
        vocab_size=64,
        seq_length=16,
    )
    if warm:
        Trainer(
            small, platform, place
        )()  # the pages of libraries that a step needs are there afterwards
        gc.collect()
    before = _resident_bytes()
    step = Trainer(settings, platform, place)
    connection.send("ready")
    while (question := connection.recv()) != "stop":
        platform.reset_peak_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        times = (time.perf_counter() - wall, time.process_time() - cpu)
        connection.send({"peak": platform.peak_memory_bytes() - before, "times": times}[question])
    connection.close()
    os._exit(0)  # without parting from peers that may have left


class MeasuredLayout:
    """The processes of one layout; each question is one step of all of them.

    Args:
        settings: The run.
        world_size: Processes.
        warm: Whether they run a small step before anything is measured, so that memory is that of the run alone.
    """

    def __init__(self, settings: Settings, world_size: int, warm: bool):
        rendezvous = f"file://{tempfile.mktemp(prefix='plan_')}"
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = FORK_SERVER.Pipe()
            process = FORK_SERVER.Process(
                target=_serve,
                args=(theirs, settings, rank, world_size, rendezvous, warm),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        for connection in self.connections:
            assert connection.recv() == "ready"

    def ask(self, question: str) -> list:
        """Return every rank's answer: "peak", bytes beyond what it had before the model was built; "times", (wall, CPU) seconds."""
        for connection in self.connections:
            connection.send(question)
        return [connection.recv() for connection in self.connections]

    def stop(self) -> None:
        """End the processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send("stop")
            process.join()
