"""A model with the exits' own norms and heads as a nested Hugging Face directory."""

import json
import os
import shutil
from pathlib import Path

from megatron_sorted.errors import CheckpointError
from megatron_sorted.evaluation.json_file import read_object
from megatron_sorted.evaluation.nested_model import NestedModel

KEPT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a directory that belong to the model; others (pickles above all) stay where they are."""


def check_destination(destination: Path, overwrite: bool = False) -> None:
    """Raises CheckpointError where a directory cannot be written: something is there already, or the parent is not writable."""
    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination}: exists already. Give another directory, or --overwrite.")
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{destination}: {parent} cannot be written. Give another directory.")


def save_with_heads(model: NestedModel, source: Path, destination: Path, overwrite: bool = False) -> None:
    """Writes the directory of ``source`` with exits.safetensors beside it, whole or not at all.

    Raises:
        CheckpointError: The destination exists or cannot be written.
    """
    from safetensors.torch import save_file

    check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.absolute().with_name(f".{destination.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for path in sorted({path for pattern in KEPT for path in source.glob(pattern)}):
            shutil.copyfile(path, aside / path.name)
        config = read_object(source / "config.json")
        config |= {"exit_layer_indices": list(model.depths), "tie_exit_lm_head": False, "own_exit_norms": True}
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {}
        for depth in model.depths[:-1]:
            tensors[f"exits.{depth}.norm.weight"] = model.norms[depth].weight.detach().contiguous()
            tensors[f"exits.{depth}.lm_head.weight"] = model.heads[depth].weight.detach().contiguous()
        save_file(tensors, str(aside / "exits.safetensors"), metadata={"format": "pt"})
        if destination.exists():
            shutil.rmtree(destination)
        os.replace(aside, destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror or error}). Free some space or give another "
                              "directory.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
