"""Reading of single tensors from files that ``torch.save`` wrote."""

import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.checkpoint.plain_objects import load_plain
from megatron_sorted.checkpoint.restricted_pickle import StoredPiece
from megatron_sorted.conversion.tensors.memory import bytes_of, new_tensor
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

BLOCK_BYTES = 1 << 20  # small enough to be in a core's cache when its checksum is computed
LOCAL_HEADER_BYTES = 30
NO_CHECKSUM = 0  # written by torch when checksums are switched off


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file: position and size of its storage, and its place in the storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    file_offset: int
    storage_bytes: int


class FileSlice(io.RawIOBase):
    """A file, or a piece of one that reads like a file."""

    def __init__(self, path: Path, piece: StoredPiece | None = None):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this object
        self._begin, self._size = (
            (0, os.fstat(self._file.fileno()).st_size)
            if piece is None
            else (piece.offset, piece.num_bytes)
        )
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position within the piece."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position within the piece and return it."""
        self._position = max(
            0,
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence],
        )
        return self._position

    def readinto(self, buffer) -> int:
        """Read into ``buffer`` and return the number of bytes."""
        target = memoryview(buffer).cast("B")[: max(0, self._size - self._position)]
        done = 0
        while done < len(target):  # one call reads 2 GB at most
            self._file.seek(self._begin + self._position)
            got = self._file.readinto(target[done:])
            if not got:
                break
            done += got
            self._position += got
        return done

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _checksums(file: FileSlice, label: str) -> dict[int, tuple[int, int]]:
    """Return {offset: (number of bytes, CRC-32)} of the records that ``torch.save`` wrote.

    Its files are zip archives without compression.
    """
    checksums = {}
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    whole = file.seek(0, io.SEEK_END)
    if (
        any(record.compress_type != zipfile.ZIP_STORED for record in records)
        or sum(record.file_size for record in records) > whole
    ):
        raise CheckpointError(
            f"{label}: its records are compressed, or have more bytes than the file, which "
            "torch.save never writes; it is damaged. Copy it again."
        )
    for record in records:
        file.seek(record.header_offset)
        header = file.read(LOCAL_HEADER_BYTES)
        begin = (
            record.header_offset
            + LOCAL_HEADER_BYTES
            + int.from_bytes(header[26:28], "little")
            + int.from_bytes(header[28:30], "little")
        )
        checksums[begin] = (record.file_size, record.CRC)
        if record.filename.endswith(("/data.pkl", "/byteorder")):
            file.seek(begin)
            content = file.read(record.file_size)
            if zlib.crc32(content) != record.CRC != NO_CHECKSUM:
                raise _damaged(label, begin)
            if record.filename.endswith("/byteorder") and content != b"little":
                raise CheckpointError(
                    f"{label}: was written on a machine of another byte order. Save it again on "
                    "this kind of machine."
                )
    return checksums


def _damaged(label: str, begin: int) -> CheckpointError:
    return CheckpointError(
        f"{label}: the bytes from {begin} on do not match their checksum; the file is damaged. "
        "Copy it again."
    )


class SavedFile:
    """A file of ``torch.save``, or one within a larger file, whose tensors are read one at a time.

    Attributes:
        content: The saved object; its tensors are on the meta device.
    """

    def __init__(self, path: Path, piece: StoredPiece | None = None, label: str | None = None):
        """Read everything but the tensors' data.

        Args:
            path: The path of the file.
            piece: The piece of it to read; None for all of it.
            label: The name of the file in errors; by default its path.

        Raises:
            CheckpointError: The file is missing, damaged, older than torch 1.6, or holds classes
                that are refused.
        """
        self.path, self._piece, self._label = path, piece, label or str(path)
        try:
            with FileSlice(path, piece) as file:
                self._records = _checksums(file, self._label)
                file.seek(0)
                self.content: Any = load_plain(
                    path if piece is None else file, self._label, map_location="meta"
                )
        except FileNotFoundError:
            raise CheckpointError(f"{self._label}: is missing.") from None
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise CheckpointError(
                f"{self._label}: not readable ({shown(error)}). It is damaged or was cut off, or "
                "was written by torch before 1.6: then load it and save it again with a newer one."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{self._label}: cannot be read ({error.strerror or error})."
            ) from error

    def place(self, tensor: torch.Tensor) -> SavedTensor:
        """Return the location of a tensor of ``content``.

        Raises:
            CheckpointError: The file does not hold all of it.
        """
        storage = tensor.untyped_storage()
        begin = storage._checkpoint_offset
        size, _ = self._records.get(begin, (0, 0))
        if size < storage.nbytes():
            raise CheckpointError(
                f"{self._label}: a tensor of {storage.nbytes()} bytes lies where the file has "
                f"{size}; it is damaged."
            )
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise CheckpointError(
                f"{self._label}: a tensor of shape {list(tensor.shape)} has a storage of "
                f"{storage.nbytes()} bytes, which is too small for it; no weight is saved so. Copy "
                "it again."
            )
        return SavedTensor(
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.storage_offset(),
            begin,
            storage.nbytes(),
        )

    def read(self, place: SavedTensor, check: bool = True) -> torch.Tensor:
        """Read a tensor into contiguous memory of its own.

        Args:
            place: The location of the tensor; only its storage is read.
            check: Whether to compare the storage with its checksum.

        Raises:
            CheckpointError: The bytes cannot be read, or are not those that were saved.
        """
        if place.storage_bytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        content = new_tensor((place.storage_bytes,), torch.uint8)
        target = bytes_of(content)
        done = checksum = 0
        try:
            with FileSlice(self.path, self._piece) as file:
                file.seek(place.file_offset)
                while done < len(target):
                    got = file.readinto(target[done : done + BLOCK_BYTES])
                    if not got:
                        raise CheckpointError(
                            f"{self._label}: ends at byte {place.file_offset + done}; it was cut "
                            "off."
                        )
                    if check:
                        checksum = zlib.crc32(target[done : done + got], checksum)
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self._label}: cannot be read ({error.strerror}).") from error
        size, expected = self._records[place.file_offset]
        if check and size == done and checksum != expected != NO_CHECKSUM:
            raise _damaged(self._label, place.file_offset)
        flat = content.view(place.dtype)
        tensor = flat.as_strided(place.shape, place.stride, place.storage_offset)
        whole = tensor.is_contiguous() and tensor.numel() == flat.numel()
        return flat.view(place.shape) if whole else tensor.contiguous().clone()
