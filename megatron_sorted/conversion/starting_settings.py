"""Settings that a run takes over from the model directory it starts from. Needs no torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, find_candidates
from megatron_sorted.checkpoint.layout import TOKENIZER
from megatron_sorted.checkpoint.manifest import EXIT_OWNED_FIELDS, ROPE_FIELDS, settings_of_manifest
from megatron_sorted.conversion.directory_kind import is_hugging_face
from megatron_sorted.conversion.hugging_face.config_settings import settings_of_config
from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, read_config
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.model import ModelSettings
from megatron_sorted.settings.rope import RopeSettings
from megatron_sorted.settings.run import Settings

EXIT_FIELDS = ("exit_layer_nums", *EXIT_OWNED_FIELDS)
# Fields of ModelSettings that describe how the network is run, not what it is.
RUN_FIELDS = (
    "seq_length",
    "transformer_impl",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "moe_token_dispatcher_type",
    "moe_aux_loss_coeff",
    "hidden_dropout",
    "attention_dropout",
)


def network_fields(settings: Settings) -> dict[str, Any]:
    """Return the settings that define the network, {field name: value}."""
    names = [
        field.name
        for group in (ModelSettings, RopeSettings)
        for field in dataclasses.fields(group)
        if field.name not in RUN_FIELDS
    ]
    return {name: getattr(settings, name) for name in (*names, *EXIT_FIELDS)}


def starting_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run takes over from the model it starts from.

    A Hugging Face directory always brings its network and its tokenizer; a checkpoint does with
    --use-checkpoint-args.

    Args:
        given: Settings that the user gave, {field name: value}. The tokenizer of the model is not
            taken over if one is among them.

    Raises:
        CheckpointError: The directory holds no model, or one that cannot be trained here.
    """
    return without_scaling(_of_model(given), given)


def without_scaling(network: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model without its rotary scaling if the user named another type.

    The parameters of one type mean nothing to another. A single parameter, or --rope-resonance,
    joins those of the model.
    """
    names = ("rope_scaling_type", "use_rope_scaling", "rotary_seq_len_interpolation_factor")
    if all(given.get(name) in (None, False) for name in names):
        return network
    return {name: value for name, value in network.items() if name not in ROPE_FIELDS}


def _of_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of the model that a run starts from."""
    for path in (given.get("load"), given.get("pretrained_checkpoint")):
        if path is None or not Path(path).is_dir():
            continue
        if is_hugging_face(path):
            settings = settings_of_config(read_config(Path(path)), str(Path(path) / CONFIG_FILE))
            _check_size(settings, Path(path))
            return {**network_fields(settings), **_tokenizer_fields(Path(path), given)}
        if (
            given.get("use_checkpoint_args")
            and (candidates := find_candidates(path, given.get("ckpt_step"))).usable
        ):
            newest = candidates.usable[0]
            return {
                **network_fields(settings_of_manifest(newest.manifest, str(path))),
                **_saved_tokenizer(newest, given),
            }
    return {}


def _check_size(settings: Settings, path: Path) -> None:
    """Check that the weight files are large enough for the number of layers in config.json.

    This precedes all work that is done for each layer; the tensors are compared later.

    Raises:
        CheckpointError: They have less than a byte for every channel of every layer.
    """
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if settings.num_layers * settings.hidden_size > size:
        raise CheckpointError(
            f"{shown(path / CONFIG_FILE)}: num_hidden_layers is {settings.num_layers:,} (of "
            f"{settings.hidden_size:,} channels), and its weight files have {size:,} bytes in all. "
            "Fetch the files again, or correct the number."
        )


def _saved_tokenizer(candidate: Candidate, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint's tokenizer; empty if the user gave a tokenizer."""
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
    """Return the settings of a Hugging Face directory's tokenizer; empty if the user gave one."""
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
