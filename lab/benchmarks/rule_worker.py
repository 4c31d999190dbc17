"""Processes that train steps under rules for exits: one that times all of them in turns, and one a rule for its memory."""

import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from lab.benchmarks.rule_cases import rule_settings
from lab.benchmarks.worker import SPAWN


def make_steps(
    names: list[str], device: str, bf16: bool, platform
) -> dict[str, Callable[[], None]]:
    """Return {case: a function that trains one step}; cases that change only what is computed share one network and its optimizer.

    Collective: starts the process groups of this one process.
    """
    from dataclasses import fields, replace

    from lab.benchmarks.trainer import Trainer
    from megatron_sorted.parallel.groups import start_process_groups
    from megatron_sorted.settings.exit_parts import ExitPartSettings

    parts = [field.name for field in fields(ExitPartSettings)] + [
        "use_exit_norm",
        "untie_exit_output_weights",
        "exit_kd_teacher",
    ]
    place, networks, steps = None, {}, {}
    for name in names:
        settings = rule_settings(name, device, bf16)
        if settings.exit_kd_teacher is not None:
            settings = replace(settings, exit_kd_teacher=save_random_model(settings))
        place = place or start_process_groups(settings, platform)
        key = tuple(getattr(settings, part) for part in parts)
        steps[name] = Trainer(settings, platform, place, networks.get(key))
        networks[key] = steps[name].model
        if settings.exit_kd_teacher is not None:
            shutil.rmtree(settings.exit_kd_teacher)
    return steps


def save_random_model(settings) -> str:
    """Return a folder with a random LLaMA of the settings' network, as transformers writes it; whoever reads it removes it."""
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_sorted.settings.derived import ffn_hidden_size

    folder = tempfile.mkdtemp(prefix="random_model_")
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=settings.hidden_size,
            intermediate_size=ffn_hidden_size(settings),
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            vocab_size=settings.vocab_size,
            max_position_embeddings=settings.seq_length,
            tie_word_embeddings=not settings.untie_embeddings_and_output_weights,
        )
    ).save_pretrained(folder)
    return folder


def time_in_turns(
    connection: Connection,
    base: str,
    names: list[str],
    device: str,
    bf16: bool,
    threads: int,
    rounds: int,
) -> None:
    """Send (round, case, its times, the base's times) of every step; a round is a step of each case, a first round only warms up.

    Times are (seconds, CPU seconds). A shared machine is slower in one second than in another, so each case stands between two steps of
    the base, whose mean it is compared with.
    """
    from lab.benchmarks.trainer import start_platform

    platform = start_platform(device, threads)
    steps = make_steps([base, *names], device, bf16, platform)

    def timed(name: str) -> tuple[float, float]:
        platform.synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        steps[name]()
        platform.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu_start

    for number in range(-1, rounds):
        before = timed(base)
        for name in names:
            own, after = timed(name), timed(base)
            connection.send(
                (
                    number,
                    name,
                    own,
                    tuple((one + other) / 2 for one, other in zip(before, after, strict=True)),
                )
            )
            before = after
    connection.close()
    os._exit(0)  # one process: there are no peers to part from in order


def measure_peak(connection: Connection, name: str, device: str, bf16: bool, threads: int) -> None:
    """Send the peak memory of the second step of a case, in bytes."""
    from lab.benchmarks.trainer import start_platform

    platform = start_platform(device, threads)
    step = make_steps([name], device, bf16, platform)[name]
    step()
    platform.synchronize()
    platform.reset_peak_memory()
    step()
    platform.synchronize()
    connection.send(platform.peak_memory_bytes())
    connection.close()
    os._exit(0)


def answers(target: Callable, num_answers: int, *arguments):
    """Return an iterator over what ``target`` sends from a process of its own.

    Raises:
        RuntimeError: The process died.
    """
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        for _ in range(num_answers):
            yield ours.recv()
    except EOFError:
        raise RuntimeError(f"{target.__name__}: the process died; its error is above") from None
    process.join()


def num_timed(names: list[str], rounds: int) -> int:
    """Return how many answers ``time_in_turns`` sends."""
    return len(names) * (rounds + 1)
