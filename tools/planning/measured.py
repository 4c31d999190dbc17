"""Runs layouts on processes of this machine and asks them for memory and times."""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_sorted.settings.run import Settings

FORK_SERVER = multiprocessing.get_context("forkserver")
# torch and megatron are imported once for all processes; the server looks for modules from where it is started, the project's root
FORK_SERVER.set_forkserver_preload(["tools.planning.preload"])


def _resident_bytes() -> int:
    """Returns this process's resident memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _prepare(settings: Settings, platform, place) -> Callable[[], object]:
    """Returns a function that does a step of a new model on random tokens.

    Collective: that of ``build_model`` and ``build_optimizer``; the function's, that of ``train_step``.
    """
    import torch

    from megatron_sorted.data.batches import Batch
    from megatron_sorted.planning.work import trained_depths
    from megatron_sorted.settings.derived import num_micro_batches
    from megatron_sorted.training.build import build_model, build_optimizer
    from megatron_sorted.training.forward_step import ForwardStep
    from megatron_sorted.training.step import train_step

    model = build_model(settings, platform, place, settings.vocab_size)
    build_optimizer(model, settings, place.world_size)
    forward_step = ForwardStep(settings, model, platform)
    coefficients = dict.fromkeys(trained_depths(settings), 1.0)
    tokens = torch.randint(0, settings.vocab_size, (settings.micro_batch_size, settings.seq_length + 1))
    positions = torch.arange(settings.seq_length).expand(settings.micro_batch_size, -1)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones_like(positions, dtype=torch.float32), None, positions)
    batches = [batch] * num_micro_batches(settings, place.world_size)
    return lambda: train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)


def _serve(connection: Connection, settings: Settings, rank: int, world_size: int, rendezvous: str, warm: bool) -> None:
    """Answers questions about one rank's steps.

    Collective: the run's.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    import warnings

    warnings.simplefilter("ignore")
    import torch

    from megatron_sorted.parallel.groups import start_process_groups
    from megatron_sorted.platform.select import choose_platform

    torch.set_num_threads(1)
    platform = choose_platform("cpu")
    platform.prepare()
    place = start_process_groups(settings, platform, rendezvous)
    small = replace(settings, hidden_size=16 * settings.num_attention_heads, ffn_hidden_size=64, vocab_size=64, seq_length=16)
    if warm:
        _prepare(small, platform, place)()  # the pages of libraries that a step needs are there afterwards
        gc.collect()
    before = _resident_bytes()
    step = _prepare(settings, platform, place)
    connection.send("ready")
    while (question := connection.recv()) != "stop":
        platform.reset_peak_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        times = (time.perf_counter() - wall, time.process_time() - cpu)
        connection.send({"peak": platform.peak_memory_bytes() - before, "times": times}[question])
    connection.close()
    os._exit(0)  # without parting from peers that may have left


class Layout:
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
            process = FORK_SERVER.Process(target=_serve, args=(theirs, settings, rank, world_size, rendezvous, warm), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        for connection in self.connections:
            assert connection.recv() == "ready"

    def ask(self, question: str) -> list:
        """Returns every rank's answer: "peak", bytes beyond what it had before the model was built; "times", (wall, CPU) seconds."""
        for connection in self.connections:
            connection.send(question)
        return [connection.recv() for connection in self.connections]

    def stop(self) -> None:
        """Ends the processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send("stop")
            process.join()
