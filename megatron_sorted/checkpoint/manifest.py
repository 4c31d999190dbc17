"""What a checkpoint says of itself: settings, progress, tokenizer, data, versions, and the size and hash of every file."""

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
from megatron_sorted.settings.derived import (
    exit_depths,
    ffn_hidden_size,
    kv_channels,
    num_query_groups,
    step_coefficients,
)
from megatron_sorted.settings.load import settings_from_dict
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import base_rule

MANIFEST = "manifest.json"
FORMAT = 2
BLOCK_BYTES = 1 << 20
MOST_BYTES = 256 << 20  # of a manifest; 100,000 files take 15 MB
NAMED_FOR_STEP = re.compile(r"\.?iter_([0-9]{7,18})(?:\.complete)?")
# What must agree between a checkpoint and the run that loads it: what the network computes of its weights.
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
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rope_scaling_low_freq_factor",
    "rope_scaling_high_freq_factor",
    "rope_scaling_original_max_position_embeddings",
    "sliding_window",
    "norm_epsilon",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "vocab_size",
)
# These name parameters, so they must agree too; exits that share norm and head may change freely.
OWN_PART_FIELDS = (
    "use_exit_norm",
    "untie_exit_output_weights",
    "use_exit_block",
    "use_exit_mlp",
    "exit_adapter_rank",
)
# What a manifest says under "contents" where there are no optimizer, schedule and random state, as in an imported model.
WEIGHTS_ONLY = "weights"
# What Megatron's loader is told of the content; the form of the distributed optimizer's state is the one that survives a change of layout.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


@dataclass(frozen=True)
class Progress:
    """How far training was when a checkpoint was taken."""

    step: int
    samples: int


@dataclass(frozen=True)
class FileRecord:
    """Size and content of one file of a checkpoint."""

    num_bytes: int
    sha256: str


def record_file(path: Path, progress_mark: Callable[[], None] = lambda: None) -> FileRecord:
    """Return size and hash of a file, read from disk; ``progress_mark`` is called as it gets on.

    Raises:
        OSError: It cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
            progress_mark()
    return FileRecord(num_bytes, digest.hexdigest())


def _own_hash(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def manifest_text(
    description: Mapping[str, Any], progress: Progress, files: Mapping[str, FileRecord]
) -> str:
    """Return the manifest of a checkpoint as JSON.

    Args:
        description: What the run says of itself (``training.describe.description``); plain data.
        progress: How far training is.
        files: By name relative to the checkpoint's directory.
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
    return (
        json.dumps(
            {**manifest, "sha256": _own_hash(parse_json(json.dumps(manifest), "manifest"))},
            indent=1,
        )
        + "\n"
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, its form checked.

    Raises:
        CheckpointError: It is missing, damaged, or of another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: {MANIFEST} is missing, so this is no complete checkpoint of ours."
        )
    manifest = read_json(path, "The file was damaged or edited.", CheckpointError, MOST_BYTES)
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
            f"{path}: {wrong} is missing or not of its kind; no version of ours wrote it."
        )
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _wrong_entry(manifest: Mapping[str, Any]) -> str | None:
    """Return the name of an entry that readers rely on and that is not of its kind; None where all are."""
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
    for name, said in manifest["files"].items():
        inside = (
            name and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")
        )
        whole = (
            isinstance(said, dict)
            and _is_count(said.get("bytes"))
            and isinstance(said.get("sha256"), str)
        )
        if not inside or not whole:
            return f"files.{name[:40]!r}"
    return None


def check_name(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the folder of a checkpoint is named for the step that its manifest says.

    Raises:
        CheckpointError: It was copied or renamed, and would be taken for a checkpoint of another step.
    """
    named, step = NAMED_FOR_STEP.fullmatch(directory.name), manifest["progress"]["step"]
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"{directory}: its manifest says step {step}, so it is a copy under another name. Take it away, or name it iter_{step:07d}."
        )


def check_sizes(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every file of the checkpoint is there with its right size; contents are not read.

    Raises:
        CheckpointError: Naming the first file that is not.
    """
    for name, said in manifest["files"].items():
        try:
            num_bytes = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror or error}.") from None
        if num_bytes != said["bytes"]:
            state = "truncated" if num_bytes < said["bytes"] else "too long"
            raise CheckpointError(
                f"{directory / name}: {num_bytes} bytes where the manifest says {said['bytes']}; it is {state}."
            )


def find_damage(directory: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return a sentence for each of the files ``names`` whose content is not what the manifest says."""
    problems = []
    for name in names:
        said = manifest["files"][name]
        try:
            found = record_file(directory / name)
        except OSError as error:
            problems.append(f"{directory / name}: not readable ({error.strerror or error})")
            continue
        if found != FileRecord(said["bytes"], said["sha256"]):
            problems.append(
                f"{directory / name}: damaged (sha256 {found.sha256[:12]}, the manifest says {said['sha256'][:12]})"
            )
    return problems


def network_shape(settings: Settings, vocab_size: int) -> dict[str, Any]:
    """Return the fields that fix what the network computes of its weights, defaults resolved: "shape" of a manifest."""
    shape = {name: getattr(settings, name) for name in (*SHAPE_FIELDS, *OWN_PART_FIELDS)}
    return shape | {
        "ffn_hidden_size": ffn_hidden_size(settings),
        "kv_channels": kv_channels(settings),
        "num_query_groups": num_query_groups(settings),
        "vocab_size": vocab_size,
        "exit_layer_nums": list(exit_depths(settings)),
    }


def exits_description(settings: Settings) -> dict[str, Any]:
    """Return what a manifest says of exits: "exits"."""
    coefficients = step_coefficients(
        settings, base_rule(settings), settings.exit_layer_weight_warmup_iters
    )
    return {
        "depths": list(exit_depths(settings)),
        "own_norm": settings.use_exit_norm,
        "own_output_weights": settings.untie_exit_output_weights,
        # of the rule alone: a curriculum switches exits on later, and a rule that learns has moved (its state is saved beside)
        "coefficients": {str(depth): value for depth, value in coefficients.items()},
    }


def with_new_parts(manifest: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the manifest as that of a model whose exits have the parts that the run gives them, where the model's have none.

    For a run that takes weights only: the new parts begin as copies (``conversion.origins.origin_of``). Parts that the model has name the
    depths of its exits, which then stay.
    """
    shape, said = dict(manifest["shape"]), manifest.get("settings", {})
    has = {name: shape.get(name, said.get(name)) for name in OWN_PART_FIELDS}
    new = {
        name: getattr(settings, name)
        for name in OWN_PART_FIELDS
        if getattr(settings, name) and not has[name]
    }
    depths = (
        {"exit_layer_nums": list(exit_depths(settings))} if new and not any(has.values()) else {}
    )
    return {**manifest, "shape": shape | new | depths}


def settings_of_manifest(manifest: Mapping[str, Any], source: str) -> Settings:
    """Return the settings a checkpoint was saved with, vocabulary and exits resolved.

    Args:
        manifest: Of the checkpoint.
        source: Its name, for messages.
    """
    shape = manifest["shape"]
    resolved = {"vocab_size": shape["vocab_size"], "exit_layer_nums": shape["exit_layer_nums"]}
    return settings_from_dict({**manifest["settings"], **resolved}, source)


def check_same_shape(
    directory: Path, manifest: Mapping[str, Any], settings: Settings, shape: Mapping[str, Any]
) -> None:
    """Check that the checkpoint holds a network of the shape the run asks for.

    Args:
        directory: The checkpoint.
        manifest: Its manifest.
        settings: The run, for messages.
        shape: {field: value} of the run, with defaults resolved (``network_shape``).

    Raises:
        CheckpointError: Naming every field that differs.
    """
    absent = {field.name: field.default for field in dataclasses.fields(Settings)}
    before = {
        **absent,
        **manifest.get("settings", {}),
        **manifest["shape"],
    }  # what an older version did not write is as it was then
    now = {**absent, **shape}
    names = (*SHAPE_FIELDS, *OWN_PART_FIELDS)
    if any(getattr(settings, name) for name in OWN_PART_FIELDS):
        names += ("exit_layer_nums",)
    different = [name for name in names if before[name] != now[name]]
    if different:
        rows = "; ".join(
            f"--{name.replace('_', '-')}: {before[name]} in the checkpoint, {now[name]} in this run"
            for name in different
        )
        raise CheckpointError(
            f"{directory}: made with other sizes. {rows}. Use the checkpoint's values, or train anew without --load."
        )
