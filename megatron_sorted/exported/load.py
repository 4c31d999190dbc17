"""Loading of a Hugging Face directory with its exits into a transformers model."""

from pathlib import Path

import torch
from torch import nn

from megatron_sorted.conversion.hugging_face.exit_keys import exits_of_config
from megatron_sorted.conversion.hugging_face.families import (
    CONFIG_FILE,
    EXITS_FILE,
    GENERATION_FILE,
    num_layers_of_config,
    read_config,
)
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit, read_exits
from megatron_sorted.conversion.hugging_face.safetensors_files import read_header
from megatron_sorted.conversion.hugging_face.transformers_network import (
    fill_network,
    network_of_config,
)
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles
from megatron_sorted.conversion.tensors.table import check_num_layers
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_optional_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.prompt_form import end_tokens

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Data types in which a model may be loaded as it is stored."""


def load_with_exits(
    directory: Path, dtype: torch.dtype | None
) -> tuple[nn.Module, dict[int, NestedExit]]:
    """Load a model and its exits, {depth: exit}.

    A model that names no exits has its last layer alone.

    transformers never reads the directory: it is given the keys of config.json that describe a
    network, and tensors. So no key makes it run code or download files, and every tensor of the
    files is used, as in all other commands.

    Args:
        directory: The directory.
        dtype: Data type of the weights; None for the one that all tensors of the files have, or
            float32 if they have several.

    Raises:
        CheckpointError: Files are missing or damaged, config.json names exits that are no layers,
            or tensors are missing or have another shape than config.json says.
        DataError: An end token of generation_config.json is no token of the model.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{shown(directory)}: not a directory. Give one with config.json and "
            "model*.safetensors."
        )
    config, where = read_config(directory), shown(directory / CONFIG_FILE)
    layers = num_layers_of_config(config, where)
    exits_of_config(config, where)
    source = HuggingFaceFiles(directory)
    check_num_layers(layers, source.tensors, shown(directory))
    stored = {info.dtype for info in source.tensors.values()}
    if (directory / EXITS_FILE).is_file():  # checked before a library reads it
        stored |= {place.info.dtype for place in read_header(directory / EXITS_FILE).values()}
    if dtype is None:
        dtype = stored.pop() if len(stored) == 1 and stored <= {*STORED_DTYPES} else torch.float32
    model = network_of_config(config, where, dtype, "sdpa")
    fill_network(model, source, shown(directory))
    model.config.name_or_path = str(directory)
    _set_special_tokens(model, directory)
    try:
        return model, read_exits(directory, model, config)
    except ValueError as error:
        raise CheckpointError(
            f"{shown(error)}. Export the model again, or copy the whole directory."
        ) from error


def _set_special_tokens(model: nn.Module, directory: Path) -> None:
    """Set bos, eos and padding tokens from generation_config.json, if there is one."""
    path = directory / GENERATION_FILE
    if not path.is_file():
        return
    generation, rows = read_optional_object(path), model.config.vocab_size
    ends = end_tokens(generation.get("eos_token_id"), shown(path), rows)
    model.generation_config.eos_token_id = (
        list(ends) if len(ends) > 1 else ends[0] if ends else None
    )
    for name in ("bos_token_id", "pad_token_id"):
        value = generation.get(name)
        is_row = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows
        setattr(model.generation_config, name, value if is_row else None)
