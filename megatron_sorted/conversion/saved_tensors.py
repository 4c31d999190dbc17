"""Where the tensors of a file of ``torch.save`` lie in it, and reading one of them without the others."""

import ctypes
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.checkpoint.plain_objects import load_plain
from megatron_sorted.errors import CheckpointError

BLOCK_BYTES = 1 << 24
LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file: where its storage begins, how large that is, and how the tensor lies in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    file_offset: int
    storage_bytes: int


def _checksums(path: Path) -> dict[int, tuple[int, int]]:
    """Returns {where its bytes begin: (bytes, CRC-32)} of every record of a file of ``torch.save``, which is a zip file of plain bytes."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise CheckpointError(f"{path}: was written on a machine of another byte order. Save it again on this kind of machine.")
            file.seek(record.header_offset)
            header = file.read(LOCAL_HEADER_BYTES)
            begin = record.header_offset + LOCAL_HEADER_BYTES + int.from_bytes(header[26:28], "little") + int.from_bytes(
                header[28:30], "little")
            found[begin] = (record.file_size, record.CRC)
    return found


class SavedFile:
    """One file of ``torch.save`` whose tensors are read one at a time.

    Attributes:
        content: What was saved, every tensor without its data.
    """

    def __init__(self, path: Path):
        """Reads everything but the tensors' data.

        Raises:
            CheckpointError: It is missing, damaged, of a format older than torch 1.6, or holds classes that are refused.
        """
        self.path = path
        try:
            self._records = _checksums(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing.") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise CheckpointError(f"{path}: not readable ({error}). It is damaged or was cut off, or was written by torch before 1.6: then "
                                  "load it and save it again with a newer one.") from error
        self.content: Any = load_plain(path, str(path), map_location="meta")

    def place(self, tensor: torch.Tensor) -> SavedTensor:
        """Returns where a tensor of ``content`` lies.

        Raises:
            CheckpointError: The file does not hold all of it.
        """
        storage = tensor.untyped_storage()
        begin = storage._checkpoint_offset
        size, _ = self._records.get(begin, (0, 0))
        if size < storage.nbytes():
            raise CheckpointError(f"{self.path}: a tensor of {storage.nbytes()} bytes lies where the file has {size}; it is damaged.")
        return SavedTensor(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), begin, storage.nbytes())

    def read(self, place: SavedTensor) -> torch.Tensor:
        """Returns a tensor in memory of its own, contiguous; only its storage is read.

        Raises:
            CheckpointError: Its bytes cannot be read, or are not those that were saved.
        """
        if place.storage_bytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        content = torch.empty(place.storage_bytes, dtype=torch.uint8)
        # its memory as bytes, without NumPy and without the zeros that a bytearray would write first
        target = memoryview((ctypes.c_ubyte * place.storage_bytes).from_address(content.data_ptr())).cast("B")
        done = checksum = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(place.file_offset)
                while done < len(target):
                    got = file.readinto(target[done : done + BLOCK_BYTES])
                    if not got:
                        raise CheckpointError(f"{self.path}: ends at byte {place.file_offset + done}; it was cut off.")
                    checksum = zlib.crc32(target[done : done + got], checksum)
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}).") from error
        size, expected = self._records[place.file_offset]
        if size == done and checksum != expected:
            raise CheckpointError(f"{self.path}: the bytes from {place.file_offset} on do not match their checksum; the file is damaged. "
                                  "Copy it again.")
        flat = content.view(place.dtype)
        tensor = flat.as_strided(place.shape, place.stride, place.storage_offset)
        whole = tensor.is_contiguous() and tensor.numel() == flat.numel()
        return flat.view(place.shape) if whole else tensor.contiguous().clone()
