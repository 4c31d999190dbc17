"""A reader of GGUF files: metadata, and tensors where they are plain numbers.

Source: docs/gguf.md of ggml, version 3 of the format, little-endian.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from megatron_sorted.errors import DataError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_COUNT = 1 << 24
"""Most entries of a header or elements of an array that are believed."""
MAX_TEXT = 1 << 26
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Type of a value in the metadata -> its letter in `struct`."""
KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 30: ("BF16", 1, 2),
}  # fmt: skip
"""Type of a tensor -> its name, and the elements and bytes of a block (ggml-common.h)."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: Sizes of the axes as torch writes it, the slowest axis first.
        kind: Name of its type.
        offset: First byte within the file.
        num_bytes: Number of its bytes.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int


class GgufFile:
    """The content of a GGUF file.

    Attributes:
        path: The file.
        metadata: Values by name.
        tensors: Tensors by name.

    Raises:
        DataError: It is no GGUF file, or is damaged or short.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as stream:
                self.metadata, self.tensors = _Header(stream, path.stat().st_size).read()
        except (OSError, struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: no complete GGUF file ({error}). Convert again.") from error

    @cached_property
    def num_bytes(self) -> int:
        """Number of bytes of all its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def kinds(self) -> dict[str, int]:
        """Return {type: number of matrices that are stored so}."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                counts[tensor.kind] = counts.get(tensor.kind, 0) + 1
        return counts

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor whose type is one of ``DTYPES``."""
        tensor = self.tensors[name]
        data = numpy.fromfile(self.path, numpy.uint8, tensor.num_bytes, offset=tensor.offset)
        return torch.from_numpy(data).view(DTYPES[tensor.kind]).view(tensor.shape)


class _Header:
    """The reader of what stands before the tensors; every size is compared with the file."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size = stream, size

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Return metadata and tensors.

        Raises:
            ValueError, KeyError, struct.error: The file is damaged.
        """
        if self.stream.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"version {version} is not one of {VERSIONS}")
        num_tensors, num_values = self._count(), self._count()
        metadata = {}
        for _ in range(num_values):
            name = self._text()
            metadata[name] = self._value(self._number("I"))
        listed = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"its alignment is {alignment}")
        begin = -(-self.stream.tell() // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in listed:
            if kind not in KINDS:
                raise ValueError(f"{name} is of the unknown type {kind}")
            kind_name, block, block_bytes = KINDS[kind]
            num_bytes = math.prod(shape) // block * block_bytes
            if math.prod(shape) % block or begin + offset + num_bytes > self.size:
                raise ValueError(f"{name} does not fit into the file")
            tensors[name] = GgufTensor(shape, kind_name, begin + offset, num_bytes)
        if len(tensors) != num_tensors:
            raise ValueError("it names a tensor twice")
        return metadata, tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        num_axes = self._number("I")
        if not 1 <= num_axes <= 8:
            raise ValueError(f"{name} has {num_axes} axes")
        shape = tuple(self._number("Q") for _ in range(num_axes))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self._number(NUMBERS[kind])
        kind = self._number("I")
        read: Callable[[], Any] = self._text if kind == STRING else self._plain(kind)
        return [read() for _ in range(self._count())]

    def _plain(self, kind: int) -> Callable[[], Any]:
        letter = NUMBERS[kind]
        return lambda: self._number(letter)

    def _number(self, letter: str) -> Any:
        layout = struct.Struct(f"<{letter}")
        return layout.unpack(self.stream.read(layout.size))[0]

    def _count(self) -> int:
        if (count := self._number("Q")) > min(MAX_COUNT, self.size):
            raise ValueError(f"it announces {count} entries")
        return count

    def _text(self) -> str:
        if (length := self._number("Q")) > min(MAX_TEXT, self.size):
            raise ValueError(f"it announces a text of {length} bytes")
        data = self.stream.read(length)
        if len(data) < length:
            raise ValueError("it ends within a text")
        return data.decode("utf-8", "replace")
