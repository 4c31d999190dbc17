"""Describes the run as plain data and as text.

For checkpoints, for ``evaluation.json`` and for the first lines on the console.
"""

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from megatron_sorted import __version__
from megatron_sorted.checkpoint.manifest import exits_description, network_shape
from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.files import write_text_atomically
from megatron_sorted.monitoring.json_lines import finite_or_none
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers
from megatron_sorted.parallel.groups import Place
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.versions import megatron_version
from megatron_sorted.settings.costs import forward_flops_per_token, sub_model_parameters
from megatron_sorted.settings.derived import exit_depths, global_batch_size, num_micro_batches
from megatron_sorted.settings.layout import layout_of, num_virtual_chunks
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.adapters import adapter_lines


def description(
    settings: Settings,
    vocab_size: int,
    run_id: str,
    place: Place,
    tokenizer: Tokenizer | None,
    data: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest that describe the run, as plain data.

    Args:
        settings: The run.
        vocab_size: Number of real tokens, before padding.
        run_id: The run's name, the same after every resume.
        place: This process.
        tokenizer: The tokenizer of the data, if there is one.
        data: The identity of the data (``data.identity.data_identity``).
    """
    return {
        "run_id": run_id,
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "versions": {
            "megatron_sorted": __version__,
            "megatron_core": megatron_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "exits": exits_description(settings),
        "shape": network_shape(settings, vocab_size),
        "settings": settings_as_dict(settings),
        "layout": {
            "world_size": place.world_size,
            "tensor": settings.tensor_model_parallel_size,
            "stages": place.num_stages,
            "data": place.data_size,
            "chunks": num_virtual_chunks(settings),
            "random_place": [place.num_stages, settings.tensor_model_parallel_size],
        },
        "samples_a_step": global_batch_size(settings, place.world_size),
        "tokenizer": None
        if tokenizer is None
        else {
            "type": settings.tokenizer_type,
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            **({"hashes": sorted(tokenizer.hashes)} if len(tokenizer.hashes) > 1 else {}),
        },
        "data": data,
    }


def exit_costs(settings: Settings, vocab_size: int) -> dict[str, dict[str, int]]:
    """Return {depth: {"parameters", "flops_per_token"}} of every sub-model, depths as text."""
    parameters = sub_model_parameters(settings, vocab_size)
    flops = forward_flops_per_token(settings, vocab_size)
    return {
        str(depth): {"parameters": parameters[depth], "flops_per_token": flops[depth]}
        for depth in exit_depths(settings)
    }


def evaluation_results(
    settings: Settings, vocab_size: int, step: int, reports: list[EvaluationReport]
) -> dict[str, Any]:
    """Return the content of ``evaluation.json``: costs and results of every sub-model.

    "sets" are of the last weights, "averaged" of averaged ones where they were evaluated.
    """
    names = ("loss", "token_accuracy", "exact_match")

    def by_depth(exits: dict[int, ExitNumbers]) -> dict[str, dict[str, float | None]]:
        return {
            str(depth): {name: getattr(numbers, name) for name in names}
            for depth, numbers in sorted(exits.items())
        }

    averaged = {report.name: by_depth(report.averaged) for report in reports if report.averaged}
    return {
        "run": Path(settings.save).name,
        "step": step,
        "exits": exit_costs(settings, vocab_size),
        "sets": {report.name: by_depth(report.exits) for report in reports},
        **({"averaged": averaged} if averaged else {}),
    }


def write_evaluation(
    settings: Settings, vocab_size: int, step: int, reports: list[EvaluationReport]
) -> Path:
    """Write the last evaluation of every exit into --save, and return the file."""
    path = Path(settings.save) / "evaluation.json"
    results = evaluation_results(settings, vocab_size, step, reports)
    write_text_atomically(path, json.dumps(finite_or_none(results), indent=1) + "\n")
    return path


def short_count(count: int) -> str:
    """Return a count with three digits.

    >>> short_count(6_738_415_616)
    '6.74B'
    """
    for power, unit in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.{max(0, 3 + power - len(str(count)))}f}{unit}"
    return str(count)


def opening_lines(
    settings: Settings, devices: Platform, place: Place, vocab_size: int
) -> list[str]:
    """Return a few lines that describe the run and the devices it runs on."""
    depths = exit_depths(settings)
    parameters = sub_model_parameters(settings, vocab_size)
    chunks = num_virtual_chunks(settings)
    layout = (
        f"tp {settings.tensor_model_parallel_size} x pp {settings.pipeline_model_parallel_size}"
    )
    layout += f" ({chunks} chunks)" if chunks > 1 else ""
    layout += f" x dp {place.data_size}"
    stages = []
    if place.num_stages > 1:
        for chunk in layout_of(settings).chunks:
            name = f"stage {chunk.stage}" + (f" chunk {chunk.chunk}" if chunks > 1 else "")
            stages.append(
                f"{name}: layers {chunk.layers_before + 1}-{chunk.layers_through}, "
                f"exits {' '.join(map(str, chunk.exits)) or 'none'}"
            )
    precision = "bf16" if settings.bf16 else "fp16" if settings.fp16 else "fp32"
    return [
        f"{place.world_size} process{'es' * (place.world_size > 1)} on {devices.name}: {layout}, "
        f"{precision}, {global_batch_size(settings, place.world_size)} samples of "
        f"{settings.seq_length} tokens a step ({num_micro_batches(settings, place.world_size)} "
        f"micro-batches of {settings.micro_batch_size} on each data parallel rank)",
        f"{settings.num_layers} layers, hidden {settings.hidden_size}, vocabulary {vocab_size}; "
        "parameters of the sub-model at each exit: "
        + ", ".join(f"@{depth} {short_count(parameters[depth])}" for depth in depths),
        *adapter_lines(settings, parameters[settings.num_layers]),
        *stages,
    ]
