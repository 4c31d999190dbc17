"""Choice of the weight files of a Hugging Face directory, the same as transformers' choice."""

import functools
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, EXITS_FILE
from megatron_sorted.conversion.hugging_face.safetensors_files import (
    AGAIN,
    INDEX,
    MAX_NAME,
    SINGLE,
    TensorLocation,
    read_header,
    read_tensor,
)
from megatron_sorted.conversion.tensors.source import TensorSource
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
MAX_SHOWN = 3


class HuggingFaceFiles(TensorSource):
    """The weights of a Hugging Face directory, in one file or many, without ``exits.safetensors``.

    If there are both ``model.safetensors`` and an index of shards, the file is read, as
    transformers does. As they may be two models, a note names the one that is read. (Links to files
    elsewhere are followed: the Hub's cache consists of them.)

    Attributes:
        notes: Lines about weight files that are not read.

    Raises:
        CheckpointError: The files are missing, incomplete, pickled, or contradict their index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        whole_file, index = directory / SINGLE, directory / INDEX
        file_of = self._read_index(index) if index.is_file() else {}
        if whole_file.is_file():
            self._places = read_header(whole_file)
            if set(file_of.values()) == {SINGLE}:
                self._compare(file_of, self._places)
        elif file_of:
            self._places = self._of_shards(file_of)
        else:
            raise CheckpointError(missing_weights_reason(directory))
        self.tensors = {name: place.info for name, place in self._places.items()}
        self.notes = tuple(self._notes(file_of))
        for note in self.notes:
            _print_once(note)

    def _read_index(self, index: Path) -> dict[str, str]:
        """Return {tensor: file} from an index, checked."""
        weight_map = read_json_object(index, AGAIN, CheckpointError, unique_names=True).get(
            "weight_map"
        )
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{shown(index)}: has no weight_map of tensors and files. {AGAIN}"
            )
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or "\0" in file:
                raise CheckpointError(
                    f"{shown(index)}: {shown(name, MAX_NAME)} is assigned to "
                    f"{shown(repr(file), MAX_NAME)}, which lies outside the directory or is no "
                    f"name of a file. {AGAIN}"
                )
        return weight_map

    def _of_shards(self, file_of: Mapping[str, str]) -> dict[str, TensorLocation]:
        """Return the location of every tensor of the files that the index names."""
        shards = sorted(set(file_of.values()))
        # Unlike Path.is_file, isfile also returns False for a name that is too long.
        missing = [name for name in shards if not os.path.isfile(self.directory / name)]
        if missing:
            raise CheckpointError(
                f"{shown(self.directory)}: {INDEX} names {len(shards)} files and {len(missing)} "
                f"are missing: {_few(missing)}. The download did not finish; fetch them."
            )
        places: dict[str, TensorLocation] = {}
        for shard in shards:
            for name, place in read_header(self.directory / shard).items():
                if name in places:
                    raise CheckpointError(
                        f"{shown(self.directory)}: {shown(name, MAX_NAME)} occurs twice, in "
                        f"{shown(places[name].file.name)} and in {shown(shard)}."
                    )
                places[name] = place
        self._compare(file_of, places)
        return places

    def _compare(self, file_of: Mapping[str, str], places: Mapping[str, TensorLocation]) -> None:
        """Check that index and files name the same tensors in the same files."""
        for name, place in places.items():
            if name not in file_of:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(name, MAX_NAME)} in "
                    f"{shown(place.file.name)} is unknown to {INDEX}."
                )
            if file_of[name] != place.file.name:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(name, MAX_NAME)} is in "
                    f"{shown(place.file.name)}, but {INDEX} says {shown(file_of[name])}."
                )
        absent = [name for name in file_of if name not in places]
        if absent:
            raise CheckpointError(
                f"{shown(self.directory)}: {INDEX} names {shown(absent[0], MAX_NAME)} in "
                f"{shown(file_of[absent[0]])}, which does not hold it. {AGAIN}"
            )

    def _notes(self, file_of: Mapping[str, str]) -> Iterable[str]:
        """Yield lines about files that are not read."""
        read = {place.file.name for place in self._places.values()}
        left = sorted(
            path.name
            for path in self.directory.glob("*.safetensors")
            if path.name not in {*read, EXITS_FILE, *ADAPTERS}
        )
        if read == {SINGLE} and set(file_of.values()) - read:
            yield (
                f"note: {shown(self.directory)} holds {SINGLE} and {INDEX} of "
                f"{len(set(file_of.values()))} other files; {SINGLE} is read, as transformers "
                "does. Remove the one that is not meant."
            )
        elif left:
            leaves_out = "the index" if file_of else "transformers"
            yield (
                f"note: {shown(self.directory)} also holds {_few(left)}, which {leaves_out} leaves "
                "out."
            )
        if any((self.directory / name).is_file() for name in ADAPTERS):
            yield (
                f"note: {shown(self.directory)} also holds an adapter ({_few(ADAPTERS)}), which is "
                "not read. Merge it first if it is meant."
            )

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own."""
        return read_tensor(name, self._places[name])


def missing_weights_reason(directory: Path) -> str:
    """Explain why a directory with neither ``model.safetensors`` nor an index cannot be read."""
    present = sorted(
        path.name for path in directory.glob("*.safetensors") if path.name != EXITS_FILE
    )
    pickled = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if (directory / ADAPTERS[1]).is_file() and present == [ADAPTERS[1]]:
        return (
            f"{shown(directory)}: holds an adapter and no model ({SINGLE}). Merge it into the "
            "model that it was made for, and give that."
        )
    if pickled and not present:
        return (
            f"{shown(directory)}: its weights are pickled ({_few(pickled)}). A pickle can run any "
            "program when it is read, so only safetensors are taken. Save the model once with "
            "save_pretrained(..., safe_serialization=True) where you trust it."
        )
    if present:
        return (
            f"{shown(directory)}: holds {_few(present)} but neither {SINGLE} nor {INDEX}; it is "
            f"not complete. {AGAIN}"
        )
    return (
        f"{shown(directory)}: holds no weights ({SINGLE} or {INDEX}, beside {CONFIG_FILE}). Give a "
        "directory that save_pretrained wrote."
    )


def check_has_weights(directory: Path) -> None:
    """Check that a directory holds weight files of a supported format, without opening them.

    Raises:
        CheckpointError: It holds none.
    """
    if not (directory / SINGLE).is_file() and not (directory / INDEX).is_file():
        raise CheckpointError(missing_weights_reason(directory))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(shown(name, MAX_NAME) for name in names[:MAX_SHOWN]) + (
        " ..." if len(names) > MAX_SHOWN else ""
    )


@functools.cache
def _print_once(line: str) -> None:
    """Print a line on standard error once a run: many ranks may open a directory many times."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
