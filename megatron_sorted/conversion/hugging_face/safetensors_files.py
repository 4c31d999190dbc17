"""Safetensors files, read and written one tensor at a time.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of a JSON
header, the header with data type, shape and position of every tensor, then their bytes. The library
maps whole files into memory and saves whole dictionaries. Here no more than one tensor is in
memory: its bytes are read into memory of its own, and a header is written before its tensors exist.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.conversion.tensors.memory import bytes_of, new_tensor
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.json_text import parse_json
from megatron_sorted.reading.shown import shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""Largest size of a header: the limit of the format."""
MAX_DIMENSIONS, MAX_NAME = 8, 100
AGAIN = "Fetch it again."


@dataclass(frozen=True)
class TensorLocation:
    """The position of a tensor's bytes: file, offset, shape and data type."""

    file: Path
    offset: int
    info: TensorInfo


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Return the location of every tensor of a safetensors file, in the order of their bytes.

    The header is checked against the size of the file: the tensors lie within the file, leave
    neither holes nor overlaps, and have as many bytes as their shapes need.

    Raises:
        CheckpointError: The file is missing, cut short, not a safetensors file, holds a name twice,
            or a data type not known here.
    """
    header, begin, size = _header_object(path)
    header.pop("__metadata__", None)
    try:
        spans = sorted((*_span(value), name) for name, value in header.items())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{shown(path)}: not a safetensors file (a tensor's data_offsets: {shown(error)}). "
            f"{AGAIN}"
        ) from error
    last = max((end for _, end, _ in spans), default=0)
    if begin + last != size:
        state = (
            "too short: the download did not finish"
            if begin + last > size
            else "longer than its header says"
        )
        raise CheckpointError(
            f"{shown(path)}: {size} bytes where its header says {begin + last}; it is {state}. "
            f"{AGAIN}"
        )
    places, expected_offset = {}, 0
    for offset, end, name in spans:
        label = f"{shown(path)}: {shown(name, MAX_NAME)}"
        info = _info(header[name], label)
        if offset != expected_offset or end - offset != info.num_bytes:
            raise CheckpointError(
                f"{label} of shape {list(info.shape)} has bytes {offset} to {end} by its header, "
                f"which should be {info.num_bytes} bytes from {expected_offset} on. {AGAIN}"
            )
        places[name], expected_offset = TensorLocation(path, begin + offset, info), end
    return places


def _header_object(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header of a file, the offset of its first tensor, and the size of the file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if size >= 8 and length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{shown(path)}: not a safetensors file: its header would have {length:,} "
                    f"bytes, more than the format allows ({MAX_HEADER_BYTES:,}). {AGAIN}"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{shown(path)}: {size} bytes, not even its header is complete. {AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{shown(path)}: cannot be read ({error.strerror or error}). {AGAIN}"
        ) from error
    header = parse_json(
        text, f"{path}: not a safetensors file", AGAIN, CheckpointError, unique_names=True
    )
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{shown(path)}: not a safetensors file: its header is no object. {AGAIN}"
        )
    return header, 8 + length, size


def _span(value: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = value["data_offsets"]
    if not (_is_size(begin) and _is_size(end) and begin <= end):
        raise ValueError(f"{begin!r:.40}, {end!r:.40}")
    return begin, end


def _info(value: Mapping[str, Any], label: str) -> TensorInfo:
    """Return shape and data type of an entry of the header, checked."""
    dtype, shape = value.get("dtype"), value.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{label} is of kind {shown(dtype, MAX_NAME)}; known are {', '.join(DTYPES)}. Convert "
            "quantised weights to one of these first."
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(map(_is_size, shape))
        or math.prod(shape) >= 1 << 60
    ):
        raise CheckpointError(
            f"{label} is of shape {shown(repr(shape), MAX_NAME)}, which no tensor has. {AGAIN}"
        )
    return TensorInfo(tuple(shape), DTYPES[dtype])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


class SafetensorsFile(TensorSource):
    """The tensors of one file, in the order of their bytes."""

    def __init__(self, path: Path):
        self._places = read_header(path)
        self.tensors = {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own."""
        return read_tensor(name, self._places[name])


def read_tensor(name: str, place: TensorLocation) -> torch.Tensor:
    """Read a tensor into memory of its own.

    Raises:
        CheckpointError: The file cannot be read, or has become shorter.
    """
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
                    raise CheckpointError(
                        f"{shown(place.file)}: ends within {shown(name, MAX_NAME)}. Fetch it again."
                    )
                target = target[got:]
    except OSError as error:
        raise CheckpointError(
            f"{shown(place.file)}: {shown(name, MAX_NAME)} could not be read "
            f"({error.strerror or error})."
        ) from error
    return tensor


class SafetensorsWriter:
    """Writes tensors into one or several safetensors files, in an order announced beforehand.

    Args:
        directory: An existing directory.
        tensors: The tensors that will be written, in order.
        max_shard_bytes: A new file is begun before one grows beyond this; a larger tensor gets a
            file of its own.
        single_name: The name of the file if there is just one.
        always_index: Whether to write an index of a single file too. Programs that read every
            ``*.safetensors`` (vLLM) then leave out what it does not name, such as
            ``exits.safetensors``.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, TensorInfo],
        max_shard_bytes: int,
        single_name: str = SINGLE,
        always_index: bool = False,
    ):
        self.directory, self.tensors, self._always_index = directory, tensors, always_index
        shards: list[dict[str, TensorInfo]] = [{}]
        filled = 0
        for name, info in tensors.items():
            if shards[-1] and filled + info.num_bytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = info
            filled += info.num_bytes
        total = len(shards)
        names = (
            [single_name]
            if total == 1
            else [
                f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)
            ]
        )
        self._shards = list(zip(names, shards, strict=True))
        self._expected = iter(
            [
                (name, file, next(iter(shard)) == name)
                for file, shard in self._shards
                for name in shard
            ]
        )
        self._file = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor.

        Raises:
            OSError: The disk is full or fails.
        """
        expected, file_name, begins = next(self._expected)
        info = self.tensors[name]
        assert name == expected, f"{name} came where {expected} was announced"
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, (
            f"{name}: {tensor.shape} {tensor.dtype}, announced {info}"
        )
        if begins:
            self._begin(file_name)
        flat = tensor.detach().contiguous().view(-1)
        if flat.numel():
            rest = bytes_of(flat)
            while rest:
                rest = rest[self._file.write(rest) :]

    def _begin(self, file_name: str) -> None:
        """Open the next file and write its header."""
        self._end()
        # transformers refuses files without this entry.
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, info in dict(self._shards)[file_name].items():
            header[name] = {
                "dtype": NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.num_bytes],
            }
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
        """Finish the last file, and write the index if there are several.

        Raises:
            OSError: The disk is full or fails.
        """
        left = next(self._expected, None)
        assert left is None, f"{left} was announced but not written"
        self._end()
        if len(self._shards) > 1 or self._always_index:
            index = {
                "metadata": {"total_size": sum(info.num_bytes for info in self.tensors.values())},
                "weight_map": {name: file for file, shard in self._shards for name in shard},
            }
            (self.directory / INDEX).write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )
