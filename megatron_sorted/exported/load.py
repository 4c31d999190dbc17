"""A Hugging Face directory as a model of transformers with its exits, every tensor accounted for."""

from pathlib import Path

import torch
from torch import nn

from megatron_sorted.conversion.nested_exits import Exit, read_exits
from megatron_sorted.errors import CheckpointError


def load_with_exits(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[int, Exit]]:
    """Returns the model and {depth: exit}; of a model without exits its last layer alone. Nothing in the directory is executed.

    Raises:
        CheckpointError: Files are missing or damaged, or tensors are missing or have another shape than config.json says.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory. Give one with config.json and model*.safetensors.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
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
