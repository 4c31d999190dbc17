"""The manifest of a checkpoint: its description, and the size and hash of every file.

The description holds settings, progress, tokenizer, data and versions.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import parse_json, read_json
from megatron_sorted.settings.coefficient_rule import base_rule
from megatron_sorted.settings.derived import (
    exit_depths,
    ffn_hidden_size,
    kv_channels,
    num_query_groups,
    step_coefficients,
)
from megatron_sorted.settings.load import settings_from_dict
from megatron_sorted.settings.rope import RopeSettings
from megatron_sorted.settings.rope_scaling import Rope, names_scaling, rope_of
from megatron_sorted.settings.run import Settings

MANIFEST = "manifest.json"
FORMAT = 2
BLOCK_BYTES = 1 << 20
MAX_BYTES = 256 << 20  # largest size of a manifest; 100,000 files take 15 MB
NAMED_FOR_STEP = re.compile(r"\.?iter_([0-9]{7,18})(?:\.complete)?")

SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "normalization",
    "use_sandwich_norm",
    "swiglu",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "sliding_window",
    "norm_epsilon",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "vocab_size",
)
"""Settings that fix the function of the weights; checkpoint and run must agree on them."""

ROPE_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(RopeSettings)
    if field.name not in ("rotary_base", "rotary_percent")
)
"""Settings of rotary scaling. They must agree in what they mean, however it is spelled; a run that
takes weights only may name another scaling.
"""

EXIT_OWNED_FIELDS = (
    "use_exit_norm",
    "untie_exit_output_weights",
    "use_exit_block",
    "use_exit_mlp",
    "exit_adapter_rank",
)
"""Settings that give exits their own parameters, so they must agree too.

Exits that share norm and output matrix may change freely.
"""

WEIGHTS_ONLY = "weights"
"""Value of "contents" in the manifest of a checkpoint without optimizer, schedule and random state.

An imported model is one.
"""

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""Megatron's metadata of the content.

This form of the distributed optimizer's state can be loaded in every layout.
"""


@dataclass(frozen=True)
class Progress:
    """The progress of training at a checkpoint: finished steps and trained samples."""

    step: int
    samples: int


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file of a checkpoint."""

    num_bytes: int
    sha256: str


def record_file(path: Path, progress_mark: Callable[[], None] = lambda: None) -> FileRecord:
    """Read a file from disk and return its size and hash; call ``progress_mark`` for each block.

    Raises:
        OSError: The file cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
            progress_mark()
    return FileRecord(num_bytes, digest.hexdigest())


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a manifest's other entries, which it holds under "sha256"."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def manifest_text(
    description: Mapping[str, Any], progress: Progress, files: Mapping[str, FileRecord]
) -> str:
    """Return the manifest of a checkpoint as JSON.

    Args:
        description: Description of the run (``training.run.describe.description``), plain data.
        progress: Progress of training.
        files: {name relative to the checkpoint's directory: size and hash}.
    """
    manifest = {
        "format": FORMAT,
        **description,
        "progress": {"step": progress.step, "samples": progress.samples},
        "files": {
            name: {"bytes": record.num_bytes, "sha256": record.sha256}
            for name, record in sorted(files.items())
        },
    }
    own_hash = _own_hash(parse_json(json.dumps(manifest), "manifest"))
    return json.dumps({**manifest, "sha256": own_hash}, indent=1) + "\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check its form.

    Raises:
        CheckpointError: The manifest is missing, damaged, or of another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: {MANIFEST} is missing, "
            "so this is no complete checkpoint of megatron_sorted."
        )
    manifest = read_json(path, "The file was damaged or edited.", CheckpointError, MAX_BYTES)
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if number != FORMAT or isinstance(number, (bool, float)):
        newer = isinstance(number, int) and number > FORMAT
        remedy = "A newer megatron_sorted wrote it: update." if newer else "It is not one of ours."
        raise CheckpointError(
            f"{path}: format {str(number)[:40]}, but this version reads format {FORMAT}. {remedy}"
        )
    if manifest.get("sha256") != _own_hash(manifest):
        raise CheckpointError(
            f"{path}: its content does not match its own hash; the file was damaged or edited."
        )
    if wrong := _wrong_entry(manifest):
        raise CheckpointError(
            f"{path}: {wrong} is missing or not of its kind; "
            "no version of megatron_sorted wrote it."
        )
    return manifest


def _is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0 to 2^63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _wrong_entry(manifest: Mapping[str, Any]) -> str | None:
    """Return the name of an entry that readers need and that has a wrong type; None if all fit."""
    kinds = {
        "progress": dict,
        "files": dict,
        "settings": dict,
        "shape": dict,
        "layout": dict,
        "tokenizer": (dict, type(None)),
        "run_id": str,
        "saved_at": str,
    }
    for name, kind in kinds.items():
        if name in manifest and not isinstance(manifest[name], kind):
            return name
    if "files" not in manifest:
        return "files"
    for name in ("step", "samples"):
        if not _is_count(manifest.get("progress", {}).get(name)):
            return f"progress.{name}"
    for name, record in manifest["files"].items():
        is_inside = (
            name and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")
        )
        is_complete = (
            isinstance(record, dict)
            and _is_count(record.get("bytes"))
            and isinstance(record.get("sha256"), str)
        )
        if not is_inside or not is_complete:
            return f"files.{name[:40]!r}"
    return None


def check_name(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check that a checkpoint's directory has the name of the step in its manifest.

    Raises:
        CheckpointError: The directory was copied or renamed, and would be taken for a checkpoint of
            another step.
    """
    named, step = NAMED_FOR_STEP.fullmatch(directory.name), manifest["progress"]["step"]
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"{directory}: its manifest says step {step}, so it is a copy under another name. "
            f"Move it elsewhere, or rename it to iter_{step:07d}."
        )


def check_sizes(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every file of the checkpoint exists and has its size; contents are not read.

    Raises:
        CheckpointError: A file is missing or has another size; the message names the first.
    """
    for name, record in manifest["files"].items():
        try:
            num_bytes = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror or error}.") from None
        if num_bytes != record["bytes"]:
            state = "truncated" if num_bytes < record["bytes"] else "too long"
            raise CheckpointError(
                f"{directory / name}: {num_bytes} bytes where the manifest says "
                f"{record['bytes']}; it is {state}."
            )


def find_damage(directory: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return a sentence for each of the files ``names`` whose content differs from the manifest."""
    problems = []
    for name in names:
        expected = manifest["files"][name]
        try:
            record = record_file(directory / name)
        except OSError as error:
            problems.append(f"{directory / name}: not readable ({error.strerror or error})")
            continue
        if record != FileRecord(expected["bytes"], expected["sha256"]):
            problems.append(
                f"{directory / name}: damaged (sha256 {record.sha256[:12]}, "
                f"the manifest says {expected['sha256'][:12]})"
            )
    return problems


def network_shape(settings: Settings, vocab_size: int) -> dict[str, Any]:
    """Return the settings that fix the function of the weights, with defaults resolved.

    They are the entry "shape" of a manifest.
    """
    names = (*SHAPE_FIELDS, *ROPE_FIELDS, *EXIT_OWNED_FIELDS)
    shape = {name: getattr(settings, name) for name in names}
    return shape | {
        "ffn_hidden_size": ffn_hidden_size(settings),
        "kv_channels": kv_channels(settings),
        "num_query_groups": num_query_groups(settings),
        "vocab_size": vocab_size,
        "exit_layer_nums": list(exit_depths(settings)),
    }


def exits_description(settings: Settings) -> dict[str, Any]:
    """Return the description of the exits: the entry "exits" of a manifest."""
    coefficients = step_coefficients(
        settings, base_rule(settings), settings.exit_layer_weight_warmup_iters
    )
    return {
        "depths": list(exit_depths(settings)),
        "own_norm": settings.use_exit_norm,
        "own_output_weights": settings.untie_exit_output_weights,
        # of the rule alone: a curriculum switches exits on later, and a learned rule changes them
        # (its state is saved too)
        "coefficients": {str(depth): value for depth, value in coefficients.items()},
    }


def with_new_parts(manifest: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the manifest as if the model's exits had the parts that the run adds.

    A run that takes weights only may add parts that the model has not; they are initialised as
    copies (``conversion.origins.origin_of``). Parts that the model has are named by the depths of
    its exits, so these stay.
    """
    shape, stored = dict(manifest["shape"]), manifest.get("settings", {})
    has = {name: shape.get(name, stored.get(name)) for name in EXIT_OWNED_FIELDS}
    wanted = {name: getattr(settings, name) for name in EXIT_OWNED_FIELDS}
    new = {name: value for name, value in wanted.items() if value and not has[name]}
    if new and not any(has.values()):
        new["exit_layer_nums"] = list(exit_depths(settings))
    return {**manifest, "shape": shape | new}


def settings_of_manifest(manifest: Mapping[str, Any], source: str) -> Settings:
    """Return the settings that a checkpoint was saved with, vocabulary and exits resolved.

    Args:
        manifest: The checkpoint's manifest.
        source: Name of the checkpoint, for messages.
    """
    shape = manifest["shape"]
    resolved = {"vocab_size": shape["vocab_size"], "exit_layer_nums": shape["exit_layer_nums"]}
    return settings_from_dict({**manifest["settings"], **resolved}, source)


def stored_rope(manifest: Mapping[str, Any]) -> Rope | None:
    """Return the rotary positions of a checkpoint, with the scaling that an older version wrote."""
    stored = {**manifest.get("settings", {}), **manifest["shape"]}
    heads = ("hidden_size", "num_attention_heads", "kv_channels", "position_embedding_type")
    names = (*ROPE_FIELDS, "rotary_base", "rotary_percent", *heads)
    given = {name: stored[name] for name in names if name in stored}
    return rope_of(settings_from_dict(given, "the checkpoint's settings"))


def check_same_shape(
    directory: Path,
    manifest: Mapping[str, Any],
    settings: Settings,
    shape: Mapping[str, Any],
    weights_only: bool = False,
) -> None:
    """Check that the checkpoint holds a network of the run's shape.

    Args:
        directory: The checkpoint.
        manifest: The checkpoint's manifest.
        settings: The run's settings.
        shape: {field: value} of the run, with defaults resolved (``network_shape``).
        weights_only: Whether the run takes weights only, so that it may name another scaling of
            rotary positions.

    Raises:
        CheckpointError: Fields differ; the message names them all.
    """
    # fields that an older version did not write have their defaults
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    before = {**defaults, **manifest.get("settings", {}), **manifest["shape"]}
    now = {**defaults, **shape}
    names = (*SHAPE_FIELDS, *EXIT_OWNED_FIELDS)
    if any(getattr(settings, name) for name in EXIT_OWNED_FIELDS):
        names += ("exit_layer_nums",)
    different = [name for name in names if before[name] != now[name]]
    rows = [
        f"--{name.replace('_', '-')}: {before[name]} in the checkpoint, {now[name]} in this run"
        for name in different
    ]
    scalings = stored_rope(manifest), rope_of(settings)
    if not different and scalings[0] != scalings[1]:
        if weights_only and names_scaling(settings):
            return
        rows.append(
            f"--rope-scaling-type and its parameters: {scalings[0]} in the checkpoint, "
            f"{scalings[1]} in this run (a run that starts from weights alone, as with --finetune, "
            "may name another)"
        )
    if rows:
        raise CheckpointError(
            f"{directory}: made with other sizes. {'; '.join(rows)}. "
            "Use the checkpoint's values, or train anew without --load."
        )
