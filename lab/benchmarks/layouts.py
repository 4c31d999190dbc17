"""Layouts on processes of this machine: each answers with the time and memory of its steps."""

import gc
import multiprocessing
import os
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection

from lab.benchmarks.worker import StepCost, Worker, answer_requests
from megatron_sorted.settings.run import Settings

FORK_SERVER = multiprocessing.get_context("forkserver")
# torch and megatron are imported once for all processes. The server looks for modules from the
# folder it is started in, the project's root.
FORK_SERVER.set_forkserver_preload(["lab.benchmarks.trainer"])


def serve_rank(
    connection: Connection,
    settings: Settings,
    rank: int,
    world_size: int,
    rendezvous: str,
    warm: bool,
) -> None:
    """Train the steps of one rank; the first answer is its memory before and after the build.

    Collective: the run's.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    from lab.benchmarks.trainer import Trainer, start_platform
    from megatron_sorted.parallel.groups import start_process_groups

    platform = start_platform(settings.device)
    place = start_process_groups(settings, platform, rendezvous)
    if warm:  # loads the pages of the libraries that a step needs
        small = replace(
            settings,
            hidden_size=16 * settings.num_attention_heads,
            ffn_hidden_size=64,
            vocab_size=64,
            seq_length=16,
        )
        Trainer(small, platform, place)()
        gc.collect()
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    step = Trainer(settings, platform, place)
    answer_requests(connection, {"": step}, platform, (before, platform.peak_memory_bytes()))


class MeasuredLayout:
    """The processes of one layout; each request is one step of all of them.

    Args:
        settings: The run.
        world_size: The number of processes.
        warm: Whether they run a small step before anything is measured, so that memory is that of
            the run alone.

    Attributes:
        build_bytes: Peak memory of the build on each rank, beyond what it had before.
    """

    def __init__(self, settings: Settings, world_size: int, warm: bool):
        rendezvous = f"file://{tempfile.mktemp(prefix='layout_')}"
        self.workers = [
            Worker(
                f"rank {rank}",
                serve_rank,
                settings,
                rank,
                world_size,
                rendezvous,
                warm,
                context=FORK_SERVER,
            )
            for rank in range(world_size)
        ]
        memory = [worker.answer() for worker in self.workers]
        self._before = [before for before, _ in memory]
        self.build_bytes = [built - before for before, built in memory]

    def step(self) -> list[StepCost]:
        """Return what a step took on every rank; memory is that beyond what it had before."""
        for worker in self.workers:
            worker.request("step")
        costs = [worker.answer() for worker in self.workers]
        return [
            cost._replace(peak_bytes=cost.peak_bytes - before)
            for cost, before in zip(costs, self._before, strict=True)
        ]

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.connection.send("stop")
        for worker in self.workers:
            worker.process.join()
