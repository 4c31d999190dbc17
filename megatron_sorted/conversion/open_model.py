"""Any directory of weights, opened: a Hugging Face model, one of our checkpoints, or one of Megatron-LM's."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.layout import (
    HUGGING_FACE,
    TOKENIZER,
    TRACKER,
    checkpoint_directory,
    saved_steps,
    tokenizer_files_in,
)
from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    check_name,
    check_sizes,
    find_damage,
    read_manifest,
    settings_of_manifest,
)
from megatron_sorted.conversion.hugging_face.config_settings import settings_of_config
from megatron_sorted.conversion.hugging_face.families import CONFIG, EXITS, read_config
from megatron_sorted.conversion.hugging_face.safetensors_files import SafetensorsFile
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles
from megatron_sorted.conversion.megatron.directory import open_megatron
from megatron_sorted.conversion.megatron.legacy_files import EMBEDDING as EMBEDDING_OURS
from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from megatron_sorted.conversion.network import is_hugging_face
from megatron_sorted.conversion.tensors.merged_lora import MergedLora, merge_adapters
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.conversion.tensors.table import (
    OUR_LAYER_NORM,
    TensorPair,
    check_num_layers,
    check_ours,
    check_theirs,
    check_tied,
    tensor_table,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer

SHARDS = ".distcp"
FAST, SLOW, VOCABULARY = (
    f"{TOKENIZER}/{name}" for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
)
CARRIED_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class OpenModel:
    """A model on disk.

    Attributes:
        directory: Where its weights are.
        kind: "hugging_face" or "megatron": whose names its tensors go by.
        settings: Of its network, with the vocabulary resolved.
        source: Its tensors.
        pairs: Between ours and theirs.
        config: The config.json it has, or once came with.
        manifest: Of one of our checkpoints, else empty.
        files: Small files that travel with it, by name: tokenizer's, generation_config.json, chat template.
    """

    directory: Path
    kind: str
    settings: Settings
    source: TensorSource
    pairs: list[TensorPair]
    config: dict[str, Any] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def pair_of(self) -> dict[str, TensorPair]:
        """Return {our name: pair} of its tensors."""
        return {pair.ours: pair for pair in self.pairs}

    @property
    def num_bytes(self) -> int:
        """Return the size of its tensors."""
        return sum(info.num_bytes for info in self.source.tensors.values())

    def open_tokenizer(self) -> Tokenizer | None:
        """Return its tokenizer; None if it came with none.

        Raises:
            DataError: It cannot be read.
        """
        for name in (FAST, SLOW, VOCABULARY):
            if name in self.files:
                path = self.files[name]
                return open_tokenizer(path if name == SLOW else path.parent, None)
        return None

    def read_ours(self, pair: TensorPair) -> torch.Tensor:
        """Return a tensor under our name and in our form, from either kind; without padding of the vocabulary."""
        if self.kind == "megatron":
            tensor = self.source.read(pair.ours)
            return tensor if tuple(tensor.shape) == pair.shape else pair.operation.split(tensor)[0]
        return pair.operation.join((self.source.read(name) for name in pair.theirs), pair.shape)

    def read_theirs(self, pair: TensorPair) -> Iterator[torch.Tensor]:
        """Yield the tensors of a pair under their names and in their form, from either kind."""
        if self.kind == "megatron":
            yield from pair.operation.split(self.source.read(pair.ours))
        else:
            yield from (self.source.read(name) for name in pair.theirs)

    def dtype_of(self, pair: TensorPair) -> torch.dtype:
        """Return the kind of numbers a tensor is stored in."""
        return self.source.tensors[pair.ours if self.kind == "megatron" else pair.theirs[0]].dtype


class _JoinedSource(TensorSource):
    """The tensors of two sources."""

    def __init__(self, first: TensorSource, second: TensorSource):
        self.first, self.second = first, second
        self.tensors: dict[str, TensorInfo] = {**first.tensors, **second.tensors}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of either."""
        return (self.first if name in self.first.tensors else self.second).read(name)


def open_model(
    path: Path,
    ckpt_step: int | None = None,
    vocab_size: int | None = None,
    rank_used: int | None = None,
) -> OpenModel:
    """Return the model in a directory, its names and shapes checked; no tensor is read.

    Args:
        path: A Hugging Face directory, a directory of checkpoints, or one checkpoint.
        ckpt_step: Of a directory of checkpoints, which; by default the newest complete one.
        vocab_size: Number of real tokens; only for a checkpoint of Megatron-LM, whose arguments may know the padded number alone.
        rank_used: Of a checkpoint with adapters, how many of their ranks are merged into its matrices; by default all.

    Raises:
        CheckpointError: It is no model, is incomplete, is of an unsupported kind, or contradicts itself or ``vocab_size``.
    """
    model = _open(path, ckpt_step, vocab_size, rank_used)
    if vocab_size not in (None, model.settings.vocab_size):
        raise CheckpointError(
            f"--vocab-size: {vocab_size}, but {model.directory} says that it has {model.settings.vocab_size} tokens. "
            "Leave the option out."
        )
    if rank_used is not None and not isinstance(model.source, MergedLora):
        raise CheckpointError(
            f"--lora-rank-used: {rank_used}, but {model.directory} has no adapters. Leave the option out."
        )
    return model


def _open(
    path: Path, ckpt_step: int | None, vocab_size: int | None, rank_used: int | None
) -> OpenModel:
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a directory. Give a Hugging Face directory or a directory of checkpoints."
        )
    if is_hugging_face(path):
        return _open_hugging_face(path)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        check_name(path.absolute(), manifest)
        return _open_ours(path, manifest, rank_used)
    if any((checkpoint_directory(path, step) / MANIFEST).is_file() for step in saved_steps(path)):
        found = find_candidates(path, ckpt_step)
        if not found.usable:
            raise CheckpointError(
                f"{path}: holds no complete checkpoint: {' '.join(found.passed_over(None))}"
            )
        return _open_ours(found.usable[0].directory, found.usable[0].manifest, rank_used)
    if (
        (path / TRACKER).is_file()
        or any(path.glob("mp_rank_*"))
        or (path / "metadata.json").is_file()
    ):
        return _open_foreign(path, vocab_size)
    raise CheckpointError(
        f"{path}: neither a Hugging Face model ({CONFIG} and safetensors) nor a checkpoint ({TRACKER}, iter_*). "
        f"It holds {', '.join(shown(entry.name, 60) for entry in sorted(path.iterdir())[:5]) or 'nothing'}."
    )


def _open_hugging_face(path: Path) -> OpenModel:
    config = read_config(path)
    settings = settings_of_config(config, str(path / CONFIG))
    source: TensorSource = HuggingFaceFiles(path)
    check_num_layers(settings.num_layers, source.tensors, str(path))
    pairs = tensor_table(settings)
    if any(pair.is_own_exit for pair in pairs):
        if not (path / EXITS).is_file():
            raise CheckpointError(
                f"{path}: {CONFIG} says that exits have norms, heads or parts of their own, but {EXITS} is missing. "
                "Fetch it."
            )
        source = _JoinedSource(source, SafetensorsFile(path / EXITS))
    if check_theirs(pairs, source.tensors, shown(path)):
        check_tied(source, shown(path))
    return OpenModel(path, "hugging_face", settings, source, pairs, config, {}, files_beside(path))


def files_beside(path: Path) -> dict[str, Path]:
    """Return the small files of a Hugging Face directory that travel with its model, by name within a checkpoint."""
    return tokenizer_files_in(path) | {
        f"{HUGGING_FACE}/{name}": path / name for name in CARRIED_FILES if (path / name).is_file()
    }


def _open_ours(directory: Path, manifest: Mapping[str, Any], rank_used: int | None) -> OpenModel:
    check_sizes(directory, manifest)
    # of the files of tensors, those that are read are compared with their own checksums on the way
    damaged = find_damage(
        directory, manifest, [name for name in manifest["files"] if not name.endswith(SHARDS)]
    )
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}. Copy the checkpoint again, or take another step of it with --ckpt-step."
        )
    settings = settings_of_manifest(manifest, str(directory / MANIFEST))
    origin = directory / HUGGING_FACE / CONFIG
    config = read_config(origin.parent) if origin.is_file() else None
    files = {
        name: directory / name
        for name in manifest["files"]
        if name.split("/")[0] in (TOKENIZER, HUGGING_FACE)
    }
    pieces = [name for name in files if name.startswith("tokenizer/") and name.endswith(".model")]
    if (
        len(pieces) == 1 and FAST not in files
    ):  # a run keeps the name it was given; others look for the usual one
        files[SLOW] = files.pop(pieces[0])
    source, settings = merge_adapters(
        TorchDistFiles(directory), settings, rank_used, str(directory)
    )
    pairs = _table(settings, source, directory)
    return OpenModel(directory, "megatron", settings, source, pairs, config, manifest, files)


def _table(settings: Settings, source: TensorSource, directory: Path) -> list[TensorPair]:
    """Return the pairs of a Megatron checkpoint, compared with the tensors that it holds."""
    check_num_layers(
        settings.num_layers, source.tensors, shown(directory), "num_layers", OUR_LAYER_NORM
    )
    pairs = tensor_table(settings)
    check_ours(pairs, source.tensors, shown(directory))
    return pairs


def _open_foreign(path: Path, vocab_size: int | None) -> OpenModel:
    source, said = open_megatron(path)
    if said is None:
        raise CheckpointError(
            f"{path}: this checkpoint holds no arguments, so the shape of its network is unknown."
        )
    settings = Settings(**said)
    rows = source.tensors[EMBEDDING_OURS].shape[0]
    if (
        vocab_size is not None and settings.vocab_size == rows
    ):  # it may have been padded, and does not say
        if not 1 <= vocab_size <= rows:
            raise CheckpointError(
                f"--vocab-size: {vocab_size}, but the embedding of {path} has {rows} rows. Give 1..{rows}."
            )
        settings = dataclasses.replace(settings, vocab_size=vocab_size)
    pairs = _table(settings, source, path)
    return OpenModel(path, "megatron", settings, source, pairs)
