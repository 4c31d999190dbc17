"""Where the tensors of a file of ``torch.save`` lie in it, and reading one of them without the others."""

import ctypes
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
from megatron_sorted.conversion.tensors.memory import new_tensor
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

BLOCK_BYTES = 1 << 20  # still in a core's cache when its checksum is computed
LOCAL_HEADER_BYTES = 30
NO_CHECKSUM = 0  # what torch writes when it was told to compute none


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file: where its storage begins, how large that is, and how the tensor lies in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    file_offset: int
    storage_bytes: int


class FileSlice(io.RawIOBase):
    """A file or a piece of one, as a file of its own, so that a reader takes only the bytes it needs."""

    def __init__(self, path: Path, piece: StoredPiece | None = None):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this object
        self._begin, self._size = (
            (0, os.fstat(self._file.fileno()).st_size)
            if piece is None
            else (piece.offset, piece.num_bytes)
        )
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the piece."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Return the new position in the piece."""
        self._at = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        )
        return self._at

    def readinto(self, buffer) -> int:
        """Return how many bytes were put into ``buffer``."""
        target = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        done = 0
        while done < len(target):  # one call reads 2 GB at most
            self._file.seek(self._begin + self._at)
            got = self._file.readinto(target[done:])
            if not got:
                break
            done += got
            self._at += got
        return done

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _checksums(file: FileSlice, told: str) -> dict[int, tuple[int, int]]:
    """Return {where its bytes begin: (bytes, CRC-32)} of every record of what ``torch.save`` wrote, which is a zip file of plain bytes."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    whole = file.seek(0, io.SEEK_END)
    if (
        any(record.compress_type != zipfile.ZIP_STORED for record in records)
        or sum(record.file_size for record in records) > whole
    ):
        raise CheckpointError(
            f"{told}: its records are compressed, or have more bytes than the file, which torch.save never writes; it is "
            "damaged. Copy it again."
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
        found[begin] = (record.file_size, record.CRC)
        if record.filename.endswith(("/data.pkl", "/byteorder")):
            file.seek(begin)
            content = file.read(record.file_size)
            if zlib.crc32(content) != record.CRC != NO_CHECKSUM:
                raise _damaged(told, begin)
            if record.filename.endswith("/byteorder") and content != b"little":
                raise CheckpointError(
                    f"{told}: was written on a machine of another byte order. Save it again on this kind of machine."
                )
    return found


def _damaged(told: str, begin: int) -> CheckpointError:
    return CheckpointError(
        f"{told}: the bytes from {begin} on do not match their checksum; the file is damaged. Copy it again."
    )


class SavedFile:
    """One file of ``torch.save``, or one that lies within a larger file, whose tensors are read one at a time.

    Attributes:
        content: What was saved, every tensor without its data.
    """

    def __init__(self, path: Path, piece: StoredPiece | None = None, told: str | None = None):
        """Read everything but the tensors' data.

        Args:
            path: Of the file.
            piece: The part of it that is meant; None for all of it.
            told: What errors call it.

        Raises:
            CheckpointError: It is missing, damaged, of a format older than torch 1.6, or holds classes that are refused.
        """
        self.path, self._piece, self._told = path, piece, told or str(path)
        try:
            with FileSlice(path, piece) as file:
                self._records = _checksums(file, self._told)
                file.seek(0)
                self.content: Any = load_plain(
                    path if piece is None else file, self._told, map_location="meta"
                )
        except FileNotFoundError:
            raise CheckpointError(f"{self._told}: is missing.") from None
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise CheckpointError(
                f"{self._told}: not readable ({shown(error)}). It is damaged or was cut off, or was written by torch "
                "before 1.6: then load it and save it again with a newer one."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{self._told}: cannot be read ({error.strerror or error})."
            ) from error

    def place(self, tensor: torch.Tensor) -> SavedTensor:
        """Return where a tensor of ``content`` lies.

        Raises:
            CheckpointError: The file does not hold all of it.
        """
        storage = tensor.untyped_storage()
        begin = storage._checkpoint_offset
        size, _ = self._records.get(begin, (0, 0))
        if size < storage.nbytes():
            raise CheckpointError(
                f"{self._told}: a tensor of {storage.nbytes()} bytes lies where the file has {size}; it is damaged."
            )
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise CheckpointError(
                f"{self._told}: a tensor of shape {list(tensor.shape)} is made of {storage.nbytes()} bytes, fewer than "
                "it has; no weight is saved so. Copy it again."
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
        """Return a tensor in memory of its own, contiguous; only its storage is read, and with ``check`` compared with its checksum.

        Raises:
            CheckpointError: Its bytes cannot be read, or are not those that were saved.
        """
        if place.storage_bytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        content = new_tensor((place.storage_bytes,), torch.uint8)
        # its memory as bytes, without NumPy and without the zeros that a bytearray would write first
        target = memoryview(
            (ctypes.c_ubyte * place.storage_bytes).from_address(content.data_ptr())
        ).cast("B")
        done = checksum = 0
        try:
            with FileSlice(self.path, self._piece) as file:
                file.seek(place.file_offset)
                while done < len(target):
                    got = file.readinto(target[done : done + BLOCK_BYTES])
                    if not got:
                        raise CheckpointError(
                            f"{self._told}: ends at byte {place.file_offset + done}; it was cut off."
                        )
                    if check:
                        checksum = zlib.crc32(target[done : done + got], checksum)
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self._told}: cannot be read ({error.strerror}).") from error
        size, expected = self._records[place.file_offset]
        if check and size == done and checksum != expected != NO_CHECKSUM:
            raise _damaged(self._told, place.file_offset)
        flat = content.view(place.dtype)
        tensor = flat.as_strided(place.shape, place.stride, place.storage_offset)
        whole = tensor.is_contiguous() and tensor.numel() == flat.numel()
        return flat.view(place.shape) if whole else tensor.contiguous().clone()
