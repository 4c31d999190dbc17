"""Hugging Face weight files: read tensor by tensor, written tensor by tensor, so that no more than one is in memory.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of a JSON header, the header with kind, shape and
place of every tensor, then their bytes. The library maps whole files into memory and saves whole dictionaries; here a tensor's bytes are
read into memory of its own, and a header is written before the tensors it describes exist.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_sorted.conversion.memory import bytes_of, new_tensor
from megatron_sorted.conversion.tensor_source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    info: TensorInfo


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict:
    """Returns the JSON object of ``pairs``; Python itself would keep the last of two equal names without a word."""
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"{name}: stands twice")
        found[name] = value
    return found


def read_header(path: Path) -> dict[str, _Place]:
    """Returns where every tensor of a safetensors file is.

    Raises:
        CheckpointError: The file is missing, cut short, not a safetensors file, holds a name twice, or a kind of numbers not known here.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > size - 8:
                raise CheckpointError(f"{path}: {size} bytes, not even its header is complete. Download it again.")
            header = json.loads(file.read(length), object_pairs_hook=_refuse_twice)
        last = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
        if 8 + length + last != size:
            state = "too short: the download did not finish" if 8 + length + last > size else "longer than its header says"
            raise CheckpointError(f"{path}: {size} bytes where its header says {8 + length + last}; it is {state}. Fetch it again.")
        with safe_open(path, "pt"):  # the library's own checks: no holes, no overlaps, lengths that fit shapes
            pass
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}. Fetch the file again.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({type(error).__name__}: {error}). Fetch it again.") from error
    places = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if value["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} is of kind {value['dtype']}; known are {', '.join(DTYPES)}. Convert quantised weights "
                                  "to one of these first.")
        info = TensorInfo(tuple(value["shape"]), DTYPES[value["dtype"]])
        places[name] = _Place(path, 8 + length + value["data_offsets"][0], info)
    return places


class SafetensorsFile(TensorSource):
    """The tensors of one file, in the order of their bytes."""

    def __init__(self, path: Path):
        places = read_header(path)
        self._places = dict(sorted(places.items(), key=lambda item: item[1].offset))
        self.tensors = {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor in memory of its own."""
        return _read(name, self._places[name])


def _read(name: str, place: _Place) -> torch.Tensor:
    tensor = new_tensor(place.info.shape, place.info.dtype)
    if not tensor.numel():
        return tensor
    target = bytes_of(tensor)
    try:
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.offset)
            while target:
                got = file.readinto(target)
                if not got:
                    raise CheckpointError(f"{place.file}: ends within {name}. Fetch it again.")
                target = target[got:]
    except OSError as error:
        raise CheckpointError(f"{place.file}: {name} could not be read ({error.strerror or error}).") from error
    return tensor


class HuggingFaceFiles(TensorSource):
    """The weights of a Hugging Face directory, one file or many; ``exits.safetensors``, where there is one, is not among them.

    Raises:
        CheckpointError: They are missing, incomplete, pickled, or contradict their index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        single, index = directory / SINGLE, directory / INDEX
        if index.is_file():
            self._places = self._of_shards(index)
        elif single.is_file():
            self._places = read_header(single)
        else:
            raise CheckpointError(self._why_none())
        self._places = dict(sorted(self._places.items(), key=lambda item: (item[1].file.name, item[1].offset)))
        self.tensors = {name: place.info for name, place in self._places.items()}

    def _why_none(self) -> str:
        pickled = sorted(path.name for pattern in PICKLES for path in self.directory.glob(pattern))
        if pickled:
            return (f"{self.directory}: its weights are pickled ({', '.join(pickled[:3])}). A pickle can run any program when it is read, "
                    "so only safetensors are taken. Save the model once with save_pretrained(..., safe_serialization=True) where you "
                    "trust it.")
        shards = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if shards:
            return f"{self.directory}: holds {', '.join(shards[:3])} but no {INDEX}; it is not complete. Fetch it again."
        return f"{self.directory}: holds no weights ({SINGLE} or {INDEX}). Give a directory that save_pretrained wrote."

    def _of_shards(self, index: Path) -> dict[str, _Place]:
        try:
            where = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_refuse_twice)["weight_map"]
            shards = sorted(set(where.values()))
        except CheckpointError as error:
            raise CheckpointError(f"{index}: {error} in the index. Fetch it again.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not readable ({type(error).__name__}: {error}). Fetch it again.") from error
        missing = [name for name in shards if not (self.directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{self.directory}: {INDEX} names {len(shards)} files and {len(missing)} are missing: "
                                  f"{', '.join(missing[:3])}. The download did not finish; fetch them.")
        places: dict[str, _Place] = {}
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: {shard!r} lies outside the directory. Fetch the index again.")
            for name, place in read_header(self.directory / shard).items():
                if name in places:
                    raise CheckpointError(f"{self.directory}: {name} stands twice, in {places[name].file.name} and in {shard}.")
                if name not in where:
                    raise CheckpointError(f"{self.directory}: {name} in {shard} is unknown to {INDEX}.")
                if where[name] != shard:
                    raise CheckpointError(f"{self.directory}: {name} is in {shard}, but {INDEX} says {where[name]}.")
                places[name] = place
        lost = [name for name in where if name not in places]
        if lost:
            raise CheckpointError(f"{self.directory}: {INDEX} names {lost[0]} in {where[lost[0]]}, which does not hold it. Fetch it again.")
        return places

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor in memory of its own."""
        return _read(name, self._places[name])


class SafetensorsWriter:
    """Writes tensors into one or several safetensors files as they come, in the order that was announced.

    Args:
        directory: Where; must exist.
        tensors: What will come, in order.
        max_shard_bytes: A new file is begun before one grows beyond this; a larger tensor gets a file of its own.
        single_name: Name of the file if there is just one; None numbers even one.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int, single_name: str = SINGLE):
        self.directory, self.tensors = directory, tensors
        shards: list[dict[str, TensorInfo]] = [{}]
        filled = 0
        for name, info in tensors.items():
            if shards[-1] and filled + info.num_bytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = info
            filled += info.num_bytes
        total = len(shards)
        names = [single_name] if total == 1 else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        self._shards = list(zip(names, shards, strict=True))
        self._expected = iter([(name, file, next(iter(shard)) == name) for file, shard in self._shards for name in shard])
        self._file = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor.

        Raises:
            OSError: The disk is full or fails.
        """
        expected, file_name, begins = next(self._expected)
        info = self.tensors[name]
        assert name == expected, f"{name} came where {expected} was announced"
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, f"{name}: {tensor.shape} {tensor.dtype}, announced {info}"
        if begins:
            self._begin(file_name)
        flat = tensor.detach().contiguous().view(-1)
        if flat.numel():
            rest = bytes_of(flat)
            while rest:
                rest = rest[self._file.write(rest):]

    def _begin(self, file_name: str) -> None:
        self._end()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
        offset = 0
        for name, info in dict(self._shards)[file_name].items():
            header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, offset + info.num_bytes]}
            offset += info.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self.directory / file_name, "wb", buffering=0)  # noqa: SIM115 - closed by _end
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _end(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Ends the last file and writes the index of several.

        Raises:
            OSError: The disk is full or fails.
        """
        left = next(self._expected, None)
        assert left is None, f"{left} was announced and did not come"
        self._end()
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(info.num_bytes for info in self.tensors.values())},
                "weight_map": {name: file for file, shard in self._shards for name in shard},
            }
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
