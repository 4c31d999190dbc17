"""A directory of Megatron checkpoints, whoever wrote it and in whichever of its formats, as one source of weights."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sorted.checkpoint.layout import ITERATION, TRACKER
from megatron_sorted.checkpoint.manifest import MANIFEST, read_manifest
from megatron_sorted.checkpoint.restricted_pickle import METADATA
from megatron_sorted.conversion.legacy_files import EMBEDDING, LegacyFiles
from megatron_sorted.conversion.legacy_layout import plain_arguments
from megatron_sorted.conversion.megatron_arguments import settings_of
from megatron_sorted.conversion.torch_dist_files import COMMON, TorchDistFiles
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_json
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.exit_parts import ExitPartSettings
from megatron_sorted.settings.exits import ExitSettings
from megatron_sorted.settings.model import ModelSettings

RELEASE = "release"
MOST_METADATA_BYTES, MOST_DIGITS = 4 << 20, 18
KINDS = "our own or Megatron-LM's torch_dist checkpoints, and legacy mp_rank_* directories"


class MegatronCheckpoint(NamedTuple):
    """A checkpoint ready to be read: its weights, the settings of its network (None where it does not say), and the step it is of."""

    source: TorchDistFiles | LegacyFiles
    settings: dict[str, Any] | None
    step: int

    @property
    def kind(self) -> str:
        """Returns "ours", "torch_dist" or "legacy"."""
        if isinstance(self.source, LegacyFiles):
            return "legacy"
        return "ours" if (self.source.directory / MANIFEST).exists() else "torch_dist"


def find_megatron(path: str | Path) -> tuple[Path, int]:
    """Returns the directory of one checkpoint and its step: the path itself, or the one that the tracker in it names.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no directory. Give a checkpoint ({KINDS}), or the directory of several.")
    if (path / METADATA).exists() or any(path.glob("mp_rank_*")) or (path / MANIFEST).exists():
        match = ITERATION.fullmatch(path.name)
        return path, int(match[1]) if match else 0
    try:
        said = (path / TRACKER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        hint = " It looks like a Hugging Face directory." if (path / "config.json").exists() else ""
        steps = sorted(entry.name for entry in path.iterdir() if ITERATION.fullmatch(entry.name) or entry.name == RELEASE)
        inside = f" Give one of those in it: {', '.join(steps[-5:])}." if steps else ""
        raise CheckpointError(f"{path}: holds neither {TRACKER} nor a checkpoint ({KINDS}).{hint}{inside}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / TRACKER}: not readable ({error}).") from error
    if said == RELEASE:
        directory, step = path / RELEASE, 0
    elif re.fullmatch(r"[0-9]+", said) and len(said) <= MOST_DIGITS:
        directory, step = path / f"iter_{int(said):07d}", int(said)
    else:
        raise CheckpointError(f"{path / TRACKER}: says {shown(repr(said), 60)}, which is neither a number nor {RELEASE!r}.")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is missing, though {TRACKER} names it. Copy it too, or give another checkpoint's directory.")
    return directory, step


def _backend(directory: Path) -> str | None:
    """Returns how metadata.json says that the checkpoint is stored; None if it does not say."""
    path = directory / "metadata.json"
    if not path.is_file():
        return None
    said = read_json(path, "Copy it again.", CheckpointError, MOST_METADATA_BYTES)
    return said.get("sharded_backend") if isinstance(said, dict) else None


def _settings(arguments: dict[str, Any] | None, keep_exits: bool, directory: Path) -> dict[str, Any] | None:
    """Return the settings that a checkpoint's arguments describe; None where it holds none."""
    if arguments is None:
        return None
    try:
        return settings_of(arguments, keep_exits)
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{shown(directory)}: its arguments are not those of Megatron ({shown(error, 100)}). "
                              "Copy it again.") from error


def open_megatron(path: str | Path, keep_exits: bool = True) -> MegatronCheckpoint:
    """Returns weights, settings and step of a checkpoint of ours, Megatron-LM, MindSpeed or EE-LLM.

    Settings are those of the network (and of exits where it has any), in our words; whatever cannot be represented is refused.

    Raises:
        CheckpointError: It is no checkpoint of a GPT model, or is damaged or refused.
    """
    directory, step = find_megatron(path)
    settings = None
    if (directory / METADATA).exists() or (directory / MANIFEST).exists():
        backend = _backend(directory)
        if backend not in (None, "torch_dist"):
            raise CheckpointError(f"{directory}: is stored as {shown(repr(backend), 60)}, which cannot be read. Load it in Megatron-LM and "
                                  "save it with --ckpt-format torch_dist.")
        source: TorchDistFiles | LegacyFiles = TorchDistFiles(directory)
        if (directory / MANIFEST).exists():
            manifest = read_manifest(directory)
            known = {field.name for part in (ModelSettings, ExitSettings, ExitPartSettings) for field in dataclasses.fields(part)}
            settings = {name: value for name, value in manifest["settings"].items() if name in known}
            step = manifest["progress"]["step"]
        elif (directory / COMMON).exists():
            common = source.common()
            arguments, said = plain_arguments(common.get("args")), common.get("iteration")
            settings = _settings(arguments, keep_exits, directory)
            step = said if isinstance(said, int) else step
    elif any(directory.glob("mp_rank_*")):
        source = LegacyFiles(directory)
        settings = _settings(source.arguments, keep_exits, directory)
        step = source.step or step
    else:
        raise CheckpointError(f"{directory}: holds neither {METADATA} nor mp_rank_* directories, so it is none of {KINDS}.")
    if EMBEDDING not in source.tensors:
        some = ", ".join(shown(name, 60) for name in list(source.tensors)[:3])
        raise CheckpointError(f"{directory}: holds no {EMBEDDING} (but {some}, ...), so it is no GPT model of Megatron.")
    return MegatronCheckpoint(source, settings, step)
