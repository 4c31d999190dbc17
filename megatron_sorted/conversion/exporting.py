"""A model of any kind into a Hugging Face directory, verified before it gets its name."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.conversion.hugging_face.config_settings import config_of_settings
from megatron_sorted.conversion.hugging_face.families import CONFIG, EXITS
from megatron_sorted.conversion.hugging_face.model_card import nested_files
from megatron_sorted.conversion.hugging_face.safetensors_files import SafetensorsWriter
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import Part, whole
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.conversion.tensors.source import TensorInfo
from megatron_sorted.conversion.tensors.table import tensor_table
from megatron_sorted.conversion.tokenizers.export import write_for_transformers
from megatron_sorted.conversion.tokenizers.prompt_form_files import (
    GENERATION,
    form_of,
    trained_ends,
    write_form,
    write_generation_config,
)
from megatron_sorted.conversion.verifying.transformers_states import require_transformers
from megatron_sorted.conversion.writing import Writing, Written

SHARD_BYTES = 5_000_000_000
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    model: OpenModel | Part,
    destination: Path,
    writing: Writing | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    more_files: Mapping[str, str] | None = None,
) -> Written:
    """Write a Hugging Face directory.

    Args:
        model: Of any kind, or a sub-model cut out of one (``submodel``).
        destination: A new directory.
        writing: How it is written; by default verified, to a place where nothing is.
        dtype: Kind of numbers to write, of ``KINDS``; by default as stored.
        shard_bytes: Size of one file at most.
        more_files: Texts to write beside, by name.

    Raises:
        CheckpointError: No Hugging Face family computes this network, the destination exists, the
            disk is full, or the two do not match; nothing is left there then.
    """
    writing = writing or Writing()
    if writing.verify:
        require_transformers()
    part = model if isinstance(model, Part) else whole(model)
    part = dataclasses.replace(part, cast=None if dtype is None else KINDS[dtype])
    model, settings, origins, cast = part.model, part.settings, part.origins, part.cast
    pairs = tensor_table(settings)
    more_files = {**nested_files(destination.absolute().name, settings), **(more_files or {})}
    kind = dtype or str(model.dtype_of(model.pairs[0])).removeprefix("torch.")
    config = config_of_settings(settings, kind, model.config)
    _add_token_ids(config, model)
    form = form_of(model)
    ends = trained_ends(model, form)
    main, own = (
        {
            name: TensorInfo(shape, cast or model.dtype_of(origins[pair.ours]))
            for pair in pairs
            if pair.is_own_exit == is_own
            for name, shape in zip(pair.theirs, pair.shapes, strict=True)
        }
        for is_own in (False, True)
    )
    total = sum(info.num_bytes for info in (*main.values(), *own.values()))
    with staged_directory(destination, writing.overwrite, total, model.directory) as aside:
        writers = {False: SafetensorsWriter(aside, main, shard_bytes, always_index=bool(own))}
        if own:
            writers[True] = SafetensorsWriter(aside, own, total + 1, EXITS)
        count = writing.watch("converting", total)
        for pair in pairs:
            tensors = model.read_theirs(origins[pair.ours])
            for name, tensor in zip(pair.theirs, tensors, strict=True):
                writers[pair.is_own_exit].write(name, tensor if cast is None else tensor.to(cast))
                count((own if pair.is_own_exit else main)[name].num_bytes)
        for writer in writers.values():
            writer.close()
        write_config(aside, config)
        _write_small_files(aside, model.files, config)
        notes = write_for_transformers(aside)
        if form is not None:
            notes += write_form(aside, form)
            write_generation_config(aside, config, ends)
        for name, text in more_files.items():
            (aside / name).write_text(text, encoding="utf-8")
        return Written(writing.compared(part, aside, total, destination), tuple(notes))


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _write_small_files(
    directory: Path, files: Mapping[str, Path], config: Mapping[str, Any]
) -> None:
    """Write tokenizer, chat template and generation config into a Hugging Face directory."""
    for name, path in files.items():
        short = name.split("/", 1)[1]
        if short != CONFIG:
            (directory / short).parent.mkdir(exist_ok=True)
            (directory / short).write_bytes(path.read_bytes())
    if not (directory / GENERATION).exists():
        write_generation_config(directory, config, ())


def _add_token_ids(config: dict[str, Any], model: OpenModel) -> None:
    """Put the ids of special tokens into a config that has none, as of a model from scratch."""
    if model.config is not None:
        return
    tokenizer = model.open_tokenizer()
    # left out, transformers would take LLaMA's own ids, and generation would stop at a token that
    # means something else
    config |= {
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and tokenizer.eos_id,
    }
