"""Export of any model as a Hugging Face directory, verified before it gets its name."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.conversion.hugging_face.config_settings import config_of_settings
from megatron_sorted.conversion.hugging_face.families import (
    CONFIG_FILE,
    EXITS_FILE,
    GENERATION_FILE,
)
from megatron_sorted.conversion.hugging_face.model_card import nested_files
from megatron_sorted.conversion.hugging_face.safetensors_files import SafetensorsWriter
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import NetworkOrigin, whole_network
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.conversion.tensors.source import TensorInfo
from megatron_sorted.conversion.tensors.table import tensor_table
from megatron_sorted.conversion.tokenizers.export import write_for_transformers
from megatron_sorted.conversion.tokenizers.prompt_form_files import (
    form_of,
    trained_ends,
    write_form,
    write_generation_config,
)
from megatron_sorted.conversion.verifying.transformers_states import require_transformers
from megatron_sorted.conversion.writing import ConversionResult, WriteOptions

SHARD_BYTES = 5_000_000_000
DTYPES_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    model: OpenModel | NetworkOrigin,
    destination: Path,
    writing: WriteOptions | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    more_files: Mapping[str, str] | None = None,
) -> ConversionResult:
    """Write a Hugging Face directory.

    Args:
        model: A model of any kind, or a sub-model cut out of one (``submodel``).
        destination: A new directory.
        writing: Options; by default the result is verified and nothing is overwritten.
        dtype: Data type to write, a key of ``DTYPES_BY_NAME``; by default as stored, and averaged
            weights as the last ones are.
        shard_bytes: Largest size of one file.
        more_files: Further text files to write, {name: text}.

    Raises:
        CheckpointError: No Hugging Face family computes this network, the destination exists, the
            disk is full, or the two models differ. The destination is then left as it was.
    """
    writing = writing or WriteOptions()
    if writing.verify:
        require_transformers()
    network = model if isinstance(model, NetworkOrigin) else whole_network(model)
    written_as = network.model.written_as if dtype is None else DTYPES_BY_NAME[dtype]
    network = dataclasses.replace(network, cast=written_as)
    model, settings, origins, cast = network.model, network.settings, network.origins, network.cast
    pairs = tensor_table(settings)
    more_files = {**nested_files(destination.absolute().name, settings), **(more_files or {})}
    dtype_name = str(cast or model.dtype_of(model.pairs[0])).removeprefix("torch.")
    config = config_of_settings(settings, dtype_name, model.config)
    _add_token_ids(config, model)
    trained_ends(model, form_of(model))  # their faults are reported before anything is read
    model_tensors, exit_tensors = (
        {
            name: TensorInfo(shape, cast or model.dtype_of(origins[pair.ours]))
            for pair in pairs
            if pair.is_own_exit == is_own
            for name, shape in zip(pair.theirs, pair.shapes, strict=True)
        }
        for is_own in (False, True)
    )
    total = sum(info.num_bytes for info in (*model_tensors.values(), *exit_tensors.values()))
    with staged_directory(destination, writing.overwrite, total, model.directory) as staged:
        writers = {
            False: SafetensorsWriter(
                staged, model_tensors, shard_bytes, always_index=bool(exit_tensors)
            )
        }
        if exit_tensors:
            writers[True] = SafetensorsWriter(staged, exit_tensors, total + 1, EXITS_FILE)
        count = writing.watch("converting", total)
        for pair in pairs:
            tensors = model.read_theirs(origins[pair.ours])
            for name, tensor in zip(pair.theirs, tensors, strict=True):
                writers[pair.is_own_exit].write(name, tensor if cast is None else tensor.to(cast))
                count((exit_tensors if pair.is_own_exit else model_tensors)[name].num_bytes)
        for writer in writers.values():
            writer.close()
        notes = write_descriptions(staged, model, config)
        for name, text in more_files.items():
            (staged / name).write_text(text, encoding="utf-8")
        return ConversionResult(
            writing.verify_written(network, staged, total, destination), tuple(notes)
        )


def write_descriptions(directory: Path, model: OpenModel, config: Mapping[str, Any]) -> list[str]:
    """Write all files of a directory but the weights; return lines about tokenizer and template.

    Raises:
        DataError: The tokenizer or the prompt template cannot be used.
    """
    form = form_of(model)
    write_config(directory, config)
    _write_small_files(directory, model.files, config)
    notes = write_for_transformers(directory)
    if form is not None:
        notes += write_form(directory, form)
        write_generation_config(directory, config, trained_ends(model, form))
    return notes


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _write_small_files(
    directory: Path, files: Mapping[str, Path], config: Mapping[str, Any]
) -> None:
    """Copy tokenizer, chat template and generation config into a Hugging Face directory."""
    for name, path in files.items():
        short = name.split("/", 1)[1]
        if short != CONFIG_FILE:
            (directory / short).parent.mkdir(exist_ok=True)
            (directory / short).write_bytes(path.read_bytes())
    if not (directory / GENERATION_FILE).exists():
        write_generation_config(directory, config, ())


def _add_token_ids(config: dict[str, Any], model: OpenModel) -> None:
    """Set the ids of special tokens in the config of a model that came without a config.json."""
    if model.config is not None:
        return
    tokenizer = model.open_tokenizer()
    # Without these keys transformers assumes LLaMA's ids, and generation would stop at a token
    # that means something else.
    config |= {
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and tokenizer.eos_id,
    }
