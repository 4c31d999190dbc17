"""The settings of a network, from the directory of a model that a run starts from. Needs no torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, find_candidates
from megatron_sorted.checkpoint.layout import TOKENIZER
from megatron_sorted.checkpoint.manifest import MANIFEST, OWN_PART_FIELDS, settings_of_manifest
from megatron_sorted.conversion.hugging_face.config_settings import settings_of_config
from megatron_sorted.conversion.hugging_face.families import CONFIG, read_config
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.model import ModelSettings
from megatron_sorted.settings.run import Settings

EXITS = ("exit_layer_nums", *OWN_PART_FIELDS)
# Of the network's settings, those that say how it is run and not what it is.
OF_THE_RUN = (
    "seq_length",
    "transformer_impl",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "moe_token_dispatcher_type",
    "moe_aux_loss_coeff",
    "hidden_dropout",
    "attention_dropout",
)


def is_hugging_face(path: str | Path) -> bool:
    """Return whether a directory is a Hugging Face model and not one of checkpoints."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / MANIFEST).is_file()


def network_fields(settings: Settings) -> dict[str, Any]:
    """Return the settings that say what the network is, by field name."""
    names = [
        field.name for field in dataclasses.fields(ModelSettings) if field.name not in OF_THE_RUN
    ]
    return {name: getattr(settings, name) for name in (*names, *EXITS)}


def network_to_start_from(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the model a run starts from brings, for those that the user did not give.

    A Hugging Face directory always brings its network and its tokenizer; a checkpoint does with --use-checkpoint-args.

    Args:
        given: Settings that the user gave, by field name.

    Raises:
        CheckpointError: The directory is no model, or not one that can be trained here.
    """
    for path in (given.get("load"), given.get("pretrained_checkpoint")):
        if path is None or not Path(path).is_dir():
            continue
        if is_hugging_face(path):
            settings = settings_of_config(read_config(Path(path)), str(Path(path) / CONFIG))
            _check_size(settings, Path(path))
            return {**network_fields(settings), **_tokenizer_fields(Path(path), given)}
        if (
            given.get("use_checkpoint_args")
            and (found := find_candidates(path, given.get("ckpt_step"))).usable
        ):
            newest = found.usable[0]
            return {
                **network_fields(settings_of_manifest(newest.manifest, str(path))),
                **_saved_tokenizer(newest, given),
            }
    return {}


def _check_size(settings: Settings, path: Path) -> None:
    """Check that weight files can hold so many layers, before anything is planned for each; their tensors are compared later.

    Raises:
        CheckpointError: They have less than a byte for every channel of every layer.
    """
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if settings.num_layers * settings.hidden_size > size:
        raise CheckpointError(
            f"{shown(path / CONFIG)}: num_hidden_layers is {settings.num_layers:,} (of {settings.hidden_size:,} "
            f"channels), and its weight files have {size:,} bytes in all. Fetch the files again, or mend the number."
        )


def _saved_tokenizer(candidate: Candidate, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the tokenizer that lies in a checkpoint, where the user gave none."""
    kind, folder = (
        candidate.manifest["settings"].get("tokenizer_type"),
        candidate.directory / TOKENIZER,
    )
    if candidate.manifest.get("tokenizer") is None or kind is None or not folder.is_dir():
        return {}
    if given.get("tokenizer_model") is not None or given.get("tokenizer_type") is not None:
        return {}
    named = folder / "tokenizer.model"
    return {
        "tokenizer_type": kind,
        "tokenizer_model": str(
            named if kind == "SentencePieceTokenizer" and named.is_file() else folder
        ),
    }


def _tokenizer_fields(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("tokenizer_model") is not None or given.get("tokenizer_type") is not None:
        return {}
    for name, kind in (
        ("tokenizer.json", "HuggingFaceTokenizer"),
        ("tokenizer.model", "SentencePieceTokenizer"),
        ("merges.txt", "HuggingFaceTokenizer"),
    ):
        if (path / name).is_file():
            return {"tokenizer_type": kind, "tokenizer_model": str(path)}
    return {}
