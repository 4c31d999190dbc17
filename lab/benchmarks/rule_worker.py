"""Processes that train steps under rules for exits."""

import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection

from lab.benchmarks.rule_cases import rule_settings
from lab.benchmarks.worker import answer_requests


def make_steps(
    names: list[str], device: str, bf16: bool, platform
) -> dict[str, Callable[[], None]]:
    """Build {case: a function that trains one step}.

    Cases that change only what is computed share one network and its optimizer.

    Collective: starts the process groups of this one process.
    """
    from dataclasses import fields, replace

    from lab.benchmarks.trainer import Trainer
    from megatron_sorted.parallel.groups import start_process_groups
    from megatron_sorted.settings.exit_parts import ExitPartSettings

    parts = [field.name for field in fields(ExitPartSettings)]
    parts += ["use_exit_norm", "untie_exit_output_weights", "exit_kd_teacher"]
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
    """Write a random LLaMA of the settings' network with transformers; return its folder.

    The caller removes the folder.
    """
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


def serve_rules(
    connection: Connection, names: list[str], device: str, bf16: bool, threads: int
) -> None:
    """Train steps of these cases, after a first step of each."""
    from lab.benchmarks.trainer import start_platform

    platform = start_platform(device, threads)
    steps = make_steps(names, device, bf16, platform)
    for step in steps.values():
        step()
    answer_requests(connection, steps, platform)
