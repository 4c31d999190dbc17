"""Which weight files of a Hugging Face directory are the model: chosen once, as transformers chooses them, for whoever opens it."""

import functools
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_sorted.conversion.hugging_face.families import CONFIG, EXITS
from megatron_sorted.conversion.hugging_face.safetensors_files import (
    AGAIN,
    INDEX,
    MOST_NAME,
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
MOST_SHOWN = 3


class HuggingFaceFiles(TensorSource):
    """The weights of a Hugging Face directory, one file or many; ``exits.safetensors``, where there is one, is not among them.

    Of a whole ``model.safetensors`` and an index of shards the file is taken, as transformers does; the directory then holds
    two models perhaps, so a line says which one is read. (Links to files elsewhere are followed: the Hub's cache consists of them.)

    Attributes:
        notes: Lines about weight files that are there and not read.

    Raises:
        CheckpointError: They are missing, incomplete, pickled, or contradict their index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        single, index = directory / SINGLE, directory / INDEX
        named = self._read_index(index) if index.is_file() else {}
        if single.is_file():
            self._places = read_header(single)
            if set(named.values()) == {SINGLE}:
                self._compare(named, self._places)
        elif named:
            self._places = self._of_shards(named)
        else:
            raise CheckpointError(missing_weights_reason(directory))
        self.tensors = {name: place.info for name, place in self._places.items()}
        self.notes = tuple(self._notes(named))
        for note in self.notes:
            _say_once(note)

    def _read_index(self, index: Path) -> dict[str, str]:
        found = read_json_object(index, AGAIN, CheckpointError, unique_names=True).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(
                f"{shown(index)}: has no weight_map of tensors and files. {AGAIN}"
            )
        for name, file in found.items():
            if not isinstance(file, str) or Path(file).name != file or "\0" in file:
                raise CheckpointError(
                    f"{shown(index)}: {shown(name, MOST_NAME)} is said to lie in {shown(repr(file), MOST_NAME)}, which "
                    f"lies outside the directory or is no name of a file. {AGAIN}"
                )
        return found

    def _of_shards(self, named: Mapping[str, str]) -> dict[str, TensorLocation]:
        shards = sorted(set(named.values()))
        missing = [
            name for name in shards if not os.path.isfile(self.directory / name)
        ]  # also for a name too long
        if missing:
            raise CheckpointError(
                f"{shown(self.directory)}: {INDEX} names {len(shards)} files and {len(missing)} are missing: "
                f"{_few(missing)}. The download did not finish; fetch them."
            )
        places: dict[str, TensorLocation] = {}
        for shard in shards:
            for name, place in read_header(self.directory / shard).items():
                if name in places:
                    raise CheckpointError(
                        f"{shown(self.directory)}: {shown(name, MOST_NAME)} stands twice, in "
                        f"{shown(places[name].file.name)} and in {shown(shard)}."
                    )
                places[name] = place
        self._compare(named, places)
        return places

    def _compare(self, named: Mapping[str, str], places: Mapping[str, TensorLocation]) -> None:
        for name, place in places.items():
            if name not in named:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(name, MOST_NAME)} in {shown(place.file.name)} is unknown to "
                    f"{INDEX}."
                )
            if named[name] != place.file.name:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(name, MOST_NAME)} is in {shown(place.file.name)}, but {INDEX} says "
                    f"{shown(named[name])}."
                )
        lost = [name for name in named if name not in places]
        if lost:
            raise CheckpointError(
                f"{shown(self.directory)}: {INDEX} names {shown(lost[0], MOST_NAME)} in {shown(named[lost[0]])}, which "
                f"does not hold it. {AGAIN}"
            )

    def _notes(self, named: Mapping[str, str]) -> Iterable[str]:
        read = {place.file.name for place in self._places.values()}
        left = sorted(
            path.name
            for path in self.directory.glob("*.safetensors")
            if path.name not in {*read, EXITS, *ADAPTERS}
        )
        if read == {SINGLE} and set(named.values()) - read:
            yield (
                f"note: {shown(self.directory)} holds {SINGLE} and {INDEX} of {len(set(named.values()))} other files; {SINGLE} is "
                "read, as transformers does. Remove the one that is not meant."
            )
        elif left:
            yield f"note: {shown(self.directory)} also holds {_few(left)}, which {'the index' if named else 'transformers'} leaves out."
        if any((self.directory / name).is_file() for name in ADAPTERS):
            yield (
                f"note: {shown(self.directory)} also holds an adapter ({_few(ADAPTERS)}), which is not read. Merge it first "
                "if it is meant."
            )

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own."""
        return read_tensor(name, self._places[name])


def missing_weights_reason(directory: Path) -> str:
    """Return what is to be said of a directory that holds neither ``model.safetensors`` nor an index."""
    found = sorted(path.name for path in directory.glob("*.safetensors") if path.name != EXITS)
    pickled = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if (directory / ADAPTERS[1]).is_file() and found == [ADAPTERS[1]]:
        return f"{shown(directory)}: holds an adapter and no model ({SINGLE}). Merge it into the model that it was made for, and give that."
    if pickled and not found:
        return (
            f"{shown(directory)}: its weights are pickled ({_few(pickled)}). A pickle can run any program when it is read, "
            "so only safetensors are taken. Save the model once with save_pretrained(..., safe_serialization=True) where you "
            "trust it."
        )
    if found:
        return f"{shown(directory)}: holds {_few(found)} but neither {SINGLE} nor {INDEX}; it is not complete. {AGAIN}"
    return f"{shown(directory)}: holds no weights ({SINGLE} or {INDEX}, beside {CONFIG}). Give a directory that save_pretrained wrote."


def check_has_weights(directory: Path) -> None:
    """Check that a directory holds weight files that can be read; they are not opened.

    Raises:
        CheckpointError: It holds none.
    """
    if not (directory / SINGLE).is_file() and not (directory / INDEX).is_file():
        raise CheckpointError(missing_weights_reason(directory))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(shown(name, MOST_NAME) for name in names[:MOST_SHOWN]) + (
        " ..." if len(names) > MOST_SHOWN else ""
    )


@functools.cache
def _say_once(line: str) -> None:
    """Print a line about a directory on standard error, once a run: it may be opened often, by many ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
