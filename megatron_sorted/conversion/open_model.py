"""A model opened from any directory: Hugging Face, one of our checkpoints, or Megatron-LM's."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.layout import HUGGING_FACE, TOKENIZER, tokenizer_files_in
from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    check_name,
    check_sizes,
    find_damage,
    read_manifest,
    settings_of_manifest,
)
from megatron_sorted.conversion.directory_kind import kind_of
from megatron_sorted.conversion.hugging_face.config_settings import settings_of_config
from megatron_sorted.conversion.hugging_face.families import (
    CONFIG_FILE,
    EXITS_FILE,
    GENERATION_FILE,
    read_config,
)
from megatron_sorted.conversion.hugging_face.safetensors_files import SafetensorsFile
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles
from megatron_sorted.conversion.megatron.common_state import COMMON_FILE, COMMON_OBJECT
from megatron_sorted.conversion.megatron.directory import open_megatron
from megatron_sorted.conversion.megatron.legacy_files import EMBEDDING as EMBEDDING_OURS
from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from megatron_sorted.conversion.tensors.averaged import averaged_tensors
from megatron_sorted.conversion.tensors.merged_lora import MergedLora, merge_adapters
from megatron_sorted.conversion.tensors.source import Overlay, TensorSource
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
from megatron_sorted.settings.averaging import holds_averages
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer

SHARDS = ".distcp"
FAST, SLOW, VOCABULARY = (
    f"{TOKENIZER}/{name}" for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
)
CARRIED_FILES = (CONFIG_FILE, GENERATION_FILE)


@dataclass(frozen=True)
class OpenModel:
    """A model on disk.

    Attributes:
        directory: The directory of its weights.
        kind: "hugging_face" or "megatron": the naming scheme of its tensors.
        settings: The settings of its network, with the vocabulary size resolved.
        source: The tensors.
        pairs: The correspondence of our tensors and Hugging Face's.
        config: The content of its config.json, or of the one it was imported with.
        manifest: The manifest of one of our checkpoints, else empty.
        files: Small files to keep with the weights, {name in a checkpoint: path}: the tokenizer's,
            generation_config.json and the chat template.
        written_as: The data type in which an export writes averaged weights, that of the last
            weights; None for other weights, which are written as they are stored.
    """

    directory: Path
    kind: str
    settings: Settings
    source: TensorSource
    pairs: list[TensorPair]
    config: dict[str, Any] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    written_as: torch.dtype | None = None

    @cached_property
    def pair_of(self) -> dict[str, TensorPair]:
        """{our name: pair} of its tensors."""
        return {pair.ours: pair for pair in self.pairs}

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(info.num_bytes for info in self.source.tensors.values())

    def open_tokenizer(self) -> Tokenizer | None:
        """Return its tokenizer; None if it has none.

        Raises:
            DataError: The tokenizer cannot be read.
        """
        for name in (FAST, SLOW, VOCABULARY):
            if name in self.files:
                path = self.files[name]
                return open_tokenizer(path if name == SLOW else path.parent, None)
        return None

    def read_ours(self, pair: TensorPair) -> torch.Tensor:
        """Read a tensor in our layout, without padded vocabulary rows."""
        if self.kind == "megatron":
            tensor = self.source.read(pair.ours)
            return tensor if tuple(tensor.shape) == pair.shape else pair.operation.split(tensor)[0]
        return pair.operation.join((self.source.read(name) for name in pair.theirs), pair.shape)

    def read_theirs(self, pair: TensorPair) -> Iterator[torch.Tensor]:
        """Yield a pair's tensors in Hugging Face's layout, from a model of either kind."""
        if self.kind == "megatron":
            yield from pair.operation.split(self.source.read(pair.ours))
        else:
            yield from (self.source.read(name) for name in pair.theirs)

    def dtype_of(self, pair: TensorPair) -> torch.dtype:
        """Return the data type in which a tensor is stored."""
        return self.source.tensors[pair.ours if self.kind == "megatron" else pair.theirs[0]].dtype


def open_model(
    path: Path,
    ckpt_step: int | None = None,
    vocab_size: int | None = None,
    rank_used: int | None = None,
    weights: str = "last",
) -> OpenModel:
    """Open the model in a directory and check its names and shapes; no tensor is read.

    Args:
        path: A Hugging Face directory, a directory of checkpoints, or one checkpoint.
        ckpt_step: Step to open in a directory of checkpoints; by default the newest complete one.
        vocab_size: Number of real tokens; only for a checkpoint of Megatron-LM, whose arguments may
            hold the padded number alone.
        rank_used: Number of ranks of low-rank adapters that are merged into the matrices; by
            default all.
        weights: "last", or "averaged" for the averaged weights of one of our checkpoints.

    Raises:
        CheckpointError: The directory holds no model, or one that is incomplete, of an unsupported
            kind, or in contradiction with itself or with ``vocab_size``.
    """
    model = _open(path, ckpt_step, vocab_size, rank_used)
    if weights == "averaged":
        model = _averaged(model)
    if vocab_size not in (None, model.settings.vocab_size):
        raise CheckpointError(
            f"--vocab-size: {vocab_size}, but {model.directory} says that it has "
            f"{model.settings.vocab_size} tokens. Leave the option out."
        )
    if rank_used is not None and not isinstance(model.source, MergedLora):
        raise CheckpointError(
            f"--lora-rank-used: {rank_used}, but {model.directory} has no adapters. Leave the "
            "option out."
        )
    return model


def _open(
    path: Path, ckpt_step: int | None, vocab_size: int | None, rank_used: int | None
) -> OpenModel:
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a directory. Give a Hugging Face directory or a directory of checkpoints."
        )
    kind = kind_of(path)
    if kind == "hugging_face":
        return _open_hugging_face(path)
    if kind == "checkpoint":
        manifest = read_manifest(path)
        check_name(path.absolute(), manifest)
        return _open_ours(path, manifest, rank_used)
    if kind == "megatron":
        return _open_foreign(path, ckpt_step, vocab_size)
    candidates = find_candidates(path, ckpt_step)
    if not candidates.usable:
        raise CheckpointError(
            f"{path}: holds no complete checkpoint: {' '.join(candidates.passed_over(None))}"
        )
    newest = candidates.usable[0]
    return _open_ours(newest.directory, newest.manifest, rank_used)


def _open_hugging_face(path: Path) -> OpenModel:
    config = read_config(path)
    settings = settings_of_config(config, str(path / CONFIG_FILE))
    source: TensorSource = HuggingFaceFiles(path)
    check_num_layers(settings.num_layers, source.tensors, str(path))
    pairs = tensor_table(settings)
    if any(pair.is_own_exit for pair in pairs):
        if not (path / EXITS_FILE).is_file():
            raise CheckpointError(
                f"{path}: {CONFIG_FILE} says that exits have norms, heads or parts of their own, "
                f"but {EXITS_FILE} is missing. Fetch it."
            )
        exits = SafetensorsFile(path / EXITS_FILE)
        source = Overlay(
            source,
            {name: (info, partial(exits.read, name)) for name, info in exits.tensors.items()},
        )
    if check_theirs(pairs, source.tensors, shown(path)):
        check_tied(source, shown(path))
    return OpenModel(path, "hugging_face", settings, source, pairs, config, {}, files_beside(path))


def files_beside(path: Path) -> dict[str, Path]:
    """Return {name in a checkpoint: path} of the files to copy beside a directory's weights."""
    return tokenizer_files_in(path) | {
        f"{HUGGING_FACE}/{name}": path / name for name in CARRIED_FILES if (path / name).is_file()
    }


def _open_ours(directory: Path, manifest: Mapping[str, Any], rank_used: int | None) -> OpenModel:
    check_sizes(directory, manifest)
    # Files of tensors are left out: their own checksums are compared when they are read.
    damaged = find_damage(
        directory, manifest, [name for name in manifest["files"] if not name.endswith(SHARDS)]
    )
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}. Copy the checkpoint again, or take another step of it with --ckpt-step."
        )
    settings = settings_of_manifest(manifest, str(directory / MANIFEST))
    origin = directory / HUGGING_FACE / CONFIG_FILE
    config = read_config(origin.parent) if origin.is_file() else None
    files = {
        name: directory / name
        for name in manifest["files"]
        if name.split("/")[0] in (TOKENIZER, HUGGING_FACE)
    }
    sentencepiece_names = [
        name for name in files if name.startswith("tokenizer/") and name.endswith(".model")
    ]
    # A run keeps the name of the sentencepiece file it was given; readers expect the usual one.
    if len(sentencepiece_names) == 1 and FAST not in files:
        files[SLOW] = files.pop(sentencepiece_names[0])
    source, settings = merge_adapters(
        TorchDistFiles(directory), settings, rank_used, str(directory)
    )
    pairs = _table(settings, source, directory)
    return OpenModel(directory, "megatron", settings, source, pairs, config, manifest, files)


def _averaged(model: OpenModel) -> OpenModel:
    """Return the averaged weights of a checkpoint.

    Raises:
        CheckpointError: It holds none.
    """
    if not (model.manifest and holds_averages(model.manifest)):
        raise CheckpointError(
            f"--weights: averaged, but {model.directory} holds no averaged weights. Give a "
            "checkpoint that a run with --average-weights-from saved after its first averaged "
            "step, or use last."
        )
    source = averaged_tensors(model.source, model.settings)
    return dataclasses.replace(model, source=source, written_as=model.dtype_of(model.pairs[0]))


def _table(settings: Settings, source: TensorSource, directory: Path) -> list[TensorPair]:
    """Return the tensor pairs of a Megatron checkpoint; check that it holds their tensors."""
    check_num_layers(
        settings.num_layers, source.tensors, shown(directory), "num_layers", OUR_LAYER_NORM
    )
    pairs = tensor_table(settings)
    check_ours(pairs, source.tensors, shown(directory))
    return pairs


def _open_foreign(path: Path, ckpt_step: int | None, vocab_size: int | None) -> OpenModel:
    source, fields = open_megatron(path, ckpt_step)
    if fields is None:
        raise CheckpointError(
            f"{path}: this checkpoint holds no arguments, so the shape of its network is unknown. "
            f"Megatron-LM writes them into {COMMON_FILE}, from 0.19 on into {COMMON_OBJECT} of the "
            "*.distcp files; copy the whole directory again, or save it again with Megatron-LM."
        )
    settings = Settings(**fields)
    rows = source.tensors[EMBEDDING_OURS].shape[0]
    # The number of rows may be the padded one; the checkpoint does not tell.
    if vocab_size is not None and settings.vocab_size == rows:
        if not 1 <= vocab_size <= rows:
            raise CheckpointError(
                f"--vocab-size: {vocab_size}, but the embedding of {path} has {rows} rows. Give "
                f"1..{rows}."
            )
        settings = dataclasses.replace(settings, vocab_size=vocab_size)
    pairs = _table(settings, source, path)
    return OpenModel(path, "megatron", settings, source, pairs)
