"""torch's checkpoint writer, which also hashes its files and can verify them from disk."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_sorted.checkpoint.manifest import FileRecord, record_file


class _HashingStream(io.RawIOBase):
    """A stream that writes bytes to a file and adds them to a hash."""

    def __init__(self, file, progress_mark: Callable[[], None]):
        self.file, self.progress_mark = file, progress_mark
        self.digest, self.num_bytes = hashlib.sha256(), 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.digest.update(data)
        try:
            written = self.file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.num_bytes += written
        self.progress_mark()
        return written

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def tell(self) -> int:
        return self.num_bytes

    def fileno(self) -> int:
        self.file.flush()  # the caller is about to sync
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
        super().close()


class HashingFileSystem(FileSystem):
    """torch's local file system with a record of every file written.

    Attributes:
        records: {path: size and hash} of every file written.
        progress_mark: Called as files are written and verified, for a watchdog.
    """

    def __init__(self, progress_mark: Callable[[], None] = lambda: None) -> None:
        self.records: dict[Path, FileRecord] = {}
        self.progress_mark = progress_mark

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """Yield a stream of the file; a file opened for writing is on disk when the block ends."""
        with open(path, mode) as file:
            if "w" not in mode:
                yield file
                return
            stream = _HashingStream(file, self.progress_mark)
            try:
                yield stream
            except Exception as error:
                # torch reports "unexpected pos" for a stream that could not be written
                if stream.failure is not None:
                    raise stream.failure from error
                raise
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
            self.records[Path(path)] = FileRecord(stream.num_bytes, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file and its record."""
        super().rename(path, new_path)
        self.records[Path(new_path)] = self.records.pop(Path(path))

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write a file with this content."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.create_stream(path, "wb") as stream:
            stream.write(data)

    def verify(self) -> None:
        """Check that every file on disk has the content that was written.

        Raises:
            OSError: A file differs or cannot be read.
        """
        for path, record in self.records.items():
            with open(path, "rb") as file:
                # otherwise the kernel's cache would be compared, not the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            on_disk = record_file(path, self.progress_mark)
            if on_disk != record:
                raise OSError(
                    f"{path}: {record.num_bytes} bytes with sha256 {record.sha256[:12]} were "
                    f"written, {on_disk.num_bytes} bytes with {on_disk.sha256[:12]} came back"
                )


class HashingWriter(FileSystemWriter):
    """torch's writer of one file per rank, on a `HashingFileSystem`.

    It uses a single thread: with several, torch loses the errors of all but the first, and the
    checkpoint would silently lack tensors.
    """

    def __init__(self, directory: Path, progress_mark: Callable[[], None]):
        super().__init__(
            directory,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=1,
            per_thread_copy_ahead=0,
        )
        self.fs = HashingFileSystem(progress_mark)
