"""A Hugging Face directory as a model of transformers with its exits, every tensor accounted for."""

from pathlib import Path

import torch
from torch import nn

from megatron_sorted.conversion.exit_keys import exits_of_config
from megatron_sorted.conversion.families import CONFIG, num_layers_of_config, read_config
from megatron_sorted.conversion.nested_exits import Exit, read_exits
from megatron_sorted.errors import CheckpointError

MOST_REASON = 300
"""Letters of another library's words that are passed on."""


def load_with_exits(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[int, Exit]]:
    """Returns the model and {depth: exit}; of a model without exits its last layer alone. Nothing in the directory is executed.

    Raises:
        CheckpointError: Files are missing or damaged, config.json names exits that are no layers, or tensors are missing or have another
            shape than config.json says.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory. Give one with config.json and model*.safetensors.")
    config, where = read_config(directory), str(directory / CONFIG)
    num_layers_of_config(config, where)
    exits_of_config(config, where)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # transformers and what it calls raise what they like, also ZeroDivisionError and AttributeError
        reason = " ".join(str(error).split())[:MOST_REASON] or type(error).__name__
        raise CheckpointError(f"{directory}: transformers cannot load it: {reason}. Give an intact directory.") from error
    # transformers fills what is missing with random numbers and only warns
    for kind, what in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape than config.json says"),
                       ("unexpected_keys", "is not part of the model")):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise CheckpointError(f"{directory}: tensor {first} {what} ({len(found[kind])} such). Give an intact directory.")
    try:
        return model, read_exits(directory, model)
    except ValueError as error:
        raise CheckpointError(f"{error}. Export the model again, or copy the whole directory.") from error
