"""Export of a checkpoint's adapters in the format of Hugging Face's peft, for their base model.

The export is exact: queries, keys and values are rows of one matrix of ours, so they share A, and
each gets its rows of B. The same holds for gate and up projections.
"""

import json
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.layout import TOKENIZER
from megatron_sorted.conversion.hugging_face.safetensors_files import SafetensorsWriter
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.conversion.tensors.merged_lora import AdapterOf, MergedLora
from megatron_sorted.conversion.tensors.source import TensorInfo
from megatron_sorted.conversion.tensors.table import TensorPair
from megatron_sorted.conversion.tokenizers.prompt_form_files import (
    form_of,
    trained_ends,
    write_form,
    write_generation_config,
)
from megatron_sorted.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's name for the model it wraps


def _config(adapters: AdapterOf, targets: list[str], base: str) -> dict[str, Any]:
    """Return the configuration of a finished adapter that peft's ``LoraConfig`` reads."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank_used,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def export_adapter(
    model: OpenModel, destination: Path, base: str, overwrite: bool = False
) -> tuple[int, int]:
    """Write an adapter to ``destination`` and return its number of tensors and of bytes.

    Peft adds ``lora_alpha / r`` times B A to a matrix, as we do. Numbers keep their data type.

    Args:
        model: A checkpoint with adapters, opened with the number of ranks to use.
        destination: A new directory.
        base: Name or path of the Hugging Face model that the adapters were trained on, for peft's
            configuration.
        overwrite: Whether to replace an existing directory.

    Raises:
        CheckpointError: The model has no adapters, its exits have trained parts that peft cannot
            hold, the destination exists, or the disk is full. The destination is then left as it
            was.
    """
    source = model.source
    if not isinstance(source, MergedLora) or not source.adapters.rank_used:
        raise CheckpointError(
            f"{model.directory}: has no adapters to write (a checkpoint of a run with --lora-rank "
            "has). Use export for the whole model."
        )
    if exit_tensors := [pair.ours for pair in model.pairs if pair.is_own_exit]:
        raise CheckpointError(
            f"{model.directory}: {exit_tensors[0]} was trained beside the adapters, and peft has "
            "no place for it. Use export, which merges the adapters and keeps what exits own."
        )
    prompt_form = form_of(model)
    end_ids = trained_ends(model, prompt_form)
    # (peft's name, our matrix, index of the projection in it, whether it is A)
    matrices: list[tuple[str, TensorPair, int, bool]] = []
    tensors: dict[str, TensorInfo] = {}
    pairs = [pair for pair in model.pairs if source.is_adapted(pair.ours)]
    for pair in pairs:
        dtype = source.source.tensors[pair.ours.removesuffix("weight") + "lora_a"].dtype
        for part, (name, (rows, columns)) in enumerate(zip(pair.theirs, pair.shapes, strict=True)):
            for letter, shape in (
                ("A", (source.adapters.rank_used, columns)),
                ("B", (rows, source.adapters.rank_used)),
            ):
                theirs = f"{PREFIX}{name.removesuffix('weight')}lora_{letter}.weight"
                tensors[theirs] = TensorInfo(shape, dtype)
                matrices.append((theirs, pair, part, letter == "A"))
    targets = sorted({name.split(".")[-2] for pair in pairs for name in pair.theirs})
    total = sum(info.num_bytes for info in tensors.values())
    with staged_directory(destination, overwrite, total, model.directory) as staged:
        writer = SafetensorsWriter(staged, tensors, total + 1, ADAPTER_WEIGHTS)
        for theirs, pair, part, is_a in matrices:
            a_rc, b_or = source.pair(pair.ours)
            half = a_rc if is_a else pair.operation.split(b_or)[part]
            writer.write(theirs, half.to(tensors[theirs].dtype))
        writer.close()
        for name, path in model.files.items():
            folder, short = name.split("/", 1)
            # As peft does: whoever loads the adapter also gets the tokenizer and chat template.
            if folder == TOKENIZER:
                (staged / short).parent.mkdir(exist_ok=True)
                (staged / short).write_bytes(path.read_bytes())
        if prompt_form is not None:
            write_form(staged, prompt_form)
            write_generation_config(staged, {}, end_ids)
        (staged / ADAPTER_CONFIG).write_text(
            json.dumps(_config(source.adapters, targets, base), indent=2) + "\n", encoding="utf-8"
        )
    return len(tensors), total
