"""The two directions: a model into one of our checkpoints, and a model into a Hugging Face directory. Verified before it gets its name."""

import dataclasses
import json
import platform
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from megatron_sorted import __version__
from megatron_sorted.checkpoint.layout import TRACKER, iteration_directory
from megatron_sorted.checkpoint.manifest import MANIFEST, WEIGHTS_ONLY, Progress, exits_description, manifest_text, network_shape
from megatron_sorted.conversion.aside import written_aside
from megatron_sorted.conversion.checkpoint_files import WeightsWriter
from megatron_sorted.conversion.families import CONFIG, EXITS, config_of_settings
from megatron_sorted.conversion.nested_card import nested_files
from megatron_sorted.conversion.open_model import OpenModel, open_model
from megatron_sorted.conversion.prompt_form_files import form_of, trained_ends, write_form, write_generation_config
from megatron_sorted.conversion.safetensors_files import SafetensorsWriter
from megatron_sorted.conversion.tensor_source import Renamed, TensorInfo
from megatron_sorted.conversion.tensor_table import Pair, tensor_table
from megatron_sorted.conversion.tokenizer_export import write_for_transformers
from megatron_sorted.conversion.transformers_states import require_transformers
from megatron_sorted.conversion.verify import TOLERANCE, Comparison, compare, require_same
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.settings.check_exit_parts import check_exit_parts
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings

SHARD_BYTES = 5_000_000_000
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Watch = Callable[[str, int], Callable[[int], None]]


def silent(_title: str, _num_bytes: int) -> Callable[[int], None]:
    """Returns a progress that shows nothing. A watch is called with a title and the bytes to come, and returns what counts them."""
    return lambda _done: None


@dataclasses.dataclass(frozen=True)
class Exits:
    """Exits to give a model that is imported; None keeps those it has. New parts of their own begin as ``origin_of`` says."""

    depths: tuple[int, ...] | None = None
    own_norms: bool | None = None
    own_heads: bool | None = None
    own_blocks: bool | None = None
    own_mlps: bool | None = None

    def on(self, settings: Settings) -> Settings:
        """Returns the settings with these exits.

        Raises:
            SettingsError: A depth is not a layer of the model, or exits cannot have these parts.
        """
        changes = {"exit_layer_nums": self.depths, "use_exit_norm": self.own_norms, "untie_exit_output_weights": self.own_heads,
                   "use_exit_block": self.own_blocks, "use_exit_mlp": self.own_mlps}
        changed = dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})
        check_exit_parts(dataclasses.replace(changed, tune_exit=False))
        return changed


@dataclasses.dataclass(frozen=True)
class Part:
    """What is exported: a whole model, or a sub-model cut out of it.

    Attributes:
        model: Where the tensors come from.
        settings: Of the network to write.
        origins: For every tensor of it, the model's own that it is made of, by our name.
        exits: {depth in the network to write: the model's exit that stands there}, where the two differ.
    """

    model: OpenModel
    settings: Settings
    origins: Mapping[str, Pair]
    exits: Mapping[int, int] = dataclasses.field(default_factory=dict)


def import_model(model: OpenModel, destination: Path, exits: Exits, overwrite: bool = False, verify: bool = True,
                 tolerance: float = TOLERANCE, watch: Watch = silent) -> Comparison | None:
    """Returns how the checkpoint written to ``destination`` compares with the model it is made of; None if it was not verified.

    The checkpoint holds weights only and loads in any layout.

    Raises:
        CheckpointError: The destination exists, the disk is full, or the two do not match; nothing is left there then.
        SettingsError: An exit is not a layer of the model.
    """
    if verify and model.kind == "hugging_face":
        require_transformers()
    settings = exits.on(model.settings)
    pairs, origins = tensor_table(settings), origins_of(model, settings)
    if left := [pair.ours for pair in model.pairs if pair not in origins.values()]:
        raise CheckpointError(f"{model.directory}: the exits asked for leave {', '.join(left[:3])} unused. Keep the exits it has.")
    if new := [pair.ours for pair in pairs if pair.ours not in origins]:
        raise CheckpointError(f"{model.directory}: {', '.join(new[:3])} would be made of nothing. Keep the exits it has; a run that loads "
                              "the model makes new adapters (--exit-adapter-rank).")
    tensors = {pair.ours: TensorInfo(pair.shape, model.dtype_of(origins[pair.ours])) for pair in pairs}
    total = sum(info.num_bytes for info in tensors.values())
    with written_aside(destination, overwrite, total, model.directory) as aside:
        directory = iteration_directory(aside, 0)
        directory.mkdir()
        writer, count = WeightsWriter(directory, tensors, settings.num_layers), watch("converting", total)
        try:
            for pair in pairs:
                writer.write(pair.ours, model.read_ours(origins[pair.ours]))
                count(tensors[pair.ours].num_bytes)
            files = writer.close({name: path.read_bytes() for name, path in model.files.items()})
        except BaseException:
            writer.abandon()
            raise
        text = manifest_text(_description(model, settings), Progress(0, 0), files)
        (directory / MANIFEST).write_text(text, encoding="utf-8")
        write_text_atomically(aside / TRACKER, "0")
        comparison = None
        if verify:
            comparison = compare(_with_parts(model, settings, origins), open_model(aside), origins, tolerance, watch("verifying", total))
            require_same(comparison, destination)
    return comparison


def _with_parts(model: OpenModel, settings: Settings, origins: Mapping[str, Pair]) -> OpenModel:
    """Returns the model with the parts of exits that ``settings`` add to it: exits then say something else, which is to be compared."""
    pairs, own = tensor_table(settings), {pair.ours for pair in model.pairs}
    names: dict[str, str] = {}
    for pair in (pair for pair in pairs if pair.ours not in own):
        origin = origins[pair.ours]
        names |= {pair.ours: origin.ours} if model.kind == "megatron" else dict(zip(pair.theirs, origin.theirs, strict=True))
    return dataclasses.replace(model, settings=settings, pairs=pairs, source=Renamed(model.source, names))


def origins_of(model: OpenModel, settings: Settings) -> dict[str, Pair]:
    """Returns, for every tensor of a network of ``settings``, the model's own that it is made of, by our name.

    The network may have exits with parts that the model has not (``origin_of``). It may end at an exit of the model: what that is read by
    then stands in the last place. An adapter that the model has not is made of nothing, and absent.
    """
    found = {pair.ours: origin_of(pair.ours, model, settings) for pair in tensor_table(settings)}
    return {name: pair for name, pair in found.items() if pair is not None}


def origin_of(name: str, model: OpenModel, settings: Settings) -> Pair | None:
    """Returns the model's own tensor that a tensor of a network of ``settings`` is made of, or None where it is made of nothing.

    Parts of exits that the model has not begin as copies: norm and head of the last exit's, a block of the model's last layer (Balcony),
    an MLP of that layer's with its norm (EE-Tuning). An adapter begins as it was made: it adds nothing.

    Args:
        name: Ours.
        model: Where the network begins.
        settings: Of the network.
    """
    own = model.pair_of
    depth = settings.num_layers
    kind = name.split(".", 1)[0]
    if name == "decoder.final_layernorm.weight" or (kind == "exit_norms" and name not in own):
        return own.get(f"exit_norms.{depth}.weight", own["decoder.final_layernorm.weight"])
    if name == "output_layer.weight" or (kind == "exit_output_layers" and name not in own):
        return own.get(f"exit_output_layers.{depth}.weight", own.get("output_layer.weight", own["embedding.word_embeddings.weight"]))
    if name in own:
        return own[name]
    last = f"decoder.layers.{model.settings.num_layers - 1}."
    if kind == "exit_blocks":
        return own[last + name.split(".", 2)[2]]
    if kind == "exit_mlps":
        return own[f"{last}mlp.{name.split('.', 2)[2]}"]
    if kind == "exit_adapters":
        return None
    return own[name]


def tokenizer_description(model: OpenModel) -> dict[str, Any] | None:
    """Returns what a manifest says of a model's tokenizer; None if it has none.

    Raises:
        DataError: It cannot be read.
    """
    found = model.open_tokenizer()
    if found is None:
        return model.manifest["tokenizer"] if model.manifest else None
    said = {"type": type(found).__name__, "name": found.name, "sha256": found.sha256}
    return said | ({"hashes": sorted(found.hashes)} if len(found.hashes) > 1 else {})  # several forms of one tokenizer


def _description(model: OpenModel, settings: Settings) -> dict[str, Any]:
    """Returns what the manifest of an imported checkpoint says."""
    tokenizer = tokenizer_description(model)
    if tokenizer is not None:
        settings = dataclasses.replace(settings, tokenizer_type=tokenizer["type"])
    return {
        "contents": WEIGHTS_ONLY, "run_id": uuid.uuid4().hex[:8], "saved_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "origin": {"name": model.directory.name, "kind": model.kind},
        "versions": {"megatron_sorted": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "exits": exits_description(settings),
        "shape": network_shape(settings, settings.vocab_size), "settings": settings_as_dict(settings),
        "layout": {"world_size": 1, "tensor": 1, "stages": 1, "data": 1, "chunks": 1, "random_place": [1, 1]},
        "samples_a_step": 1, "tokenizer": tokenizer, "data": None,
    }


def export_model(model: OpenModel, destination: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES, overwrite: bool = False,
                 verify: bool = True, tolerance: float = TOLERANCE, watch: Watch = silent, part: Part | None = None,
                 more_files: Mapping[str, str] | None = None, notes: list[str] | None = None) -> Comparison | None:
    """Returns how the Hugging Face directory written to ``destination`` compares with the model; None if it was not verified.

    Args:
        model: Of any kind.
        destination: A new directory.
        dtype: Kind of numbers to write, of ``families.DTYPES``; by default as stored.
        shard_bytes: Size of one file at most.
        overwrite: Replace what is there.
        verify: Compare every tensor, and the logits of every exit with transformers'.
        tolerance: Of logits, relative to the largest.
        watch: Shows progress.
        part: What to write of it where it is not the whole model (``submodel``).
        more_files: Texts to write beside, by name.
        notes: Gets a line about the tokenizer, if there is one to show.

    Raises:
        CheckpointError: No Hugging Face family computes this network, the destination exists, the disk is full, or the two do not match;
            nothing is left there then.
    """
    if verify:
        require_transformers()
    part = part or Part(model, model.settings, origins_of(model, model.settings))
    model, settings, origins, cast = part.model, part.settings, part.origins, None if dtype is None else KINDS[dtype]
    pairs = tensor_table(settings)
    more_files = {**nested_files(destination.absolute().name, settings), **(more_files or {})}
    stored = model.dtype_of(model.pairs[0])
    config = config_of_settings(settings, dtype or str(stored).removeprefix("torch."), model.config)
    _add_token_ids(config, model)
    form = form_of(model)
    ends = trained_ends(model, form)
    main, own = ({name: TensorInfo(shape, cast or model.dtype_of(origins[pair.ours])) for pair in pairs if pair.is_own_exit == is_own
                  for name, shape in zip(pair.theirs, pair.shapes, strict=True)} for is_own in (False, True))
    total = sum(info.num_bytes for info in (*main.values(), *own.values()))
    with written_aside(destination, overwrite, total, model.directory) as aside:
        writers = {False: SafetensorsWriter(aside, main, shard_bytes, always_index=bool(own))}
        if own:
            writers[True] = SafetensorsWriter(aside, own, total + 1, EXITS)
        count = watch("converting", total)
        for pair in pairs:
            for name, tensor in zip(pair.theirs, model.read_theirs(origins[pair.ours]), strict=True):
                writers[pair.is_own_exit].write(name, tensor if cast is None else tensor.to(cast))
                count((own if pair.is_own_exit else main)[name].num_bytes)
        for writer in writers.values():
            writer.close()
        write_config(aside, config)
        write_small_files(aside, model.files, config)
        lines = write_for_transformers(aside)
        if notes is not None:
            notes += lines
        if form is not None:
            write_form(aside, form, notes)
            write_generation_config(aside, config, ends)
        for name, text in more_files.items():
            (aside / name).write_text(text, encoding="utf-8")
        comparison = None
        if verify:
            comparison = compare(model, open_model(aside), origins, tolerance, watch("verifying", total), cast, part.exits)
            require_same(comparison, destination)
    return comparison


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json."""
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_small_files(directory: Path, files: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """Write tokenizer, chat template and generation config into a Hugging Face directory."""
    for name, path in files.items():
        short = name.split("/", 1)[1]
        if short != CONFIG:
            (directory / short).parent.mkdir(exist_ok=True)
            (directory / short).write_bytes(path.read_bytes())
    if not (directory / "generation_config.json").exists():
        write_generation_config(directory, config, ())


def _add_token_ids(config: dict[str, Any], model: OpenModel) -> None:
    """Puts the ids of the special tokens into a config that has none, as a model trained from scratch."""
    if model.config is not None:
        return
    tokenizer = model.open_tokenizer()
    # left out, transformers would take LLaMA's own ids, and generation would stop at a token that means something else
    config |= {"bos_token_id": tokenizer and tokenizer.bos_id, "eos_token_id": tokenizer and tokenizer.eos_id}
