"""Files that are hashed while they are written, and read back."""

import hashlib
import os

import pytest
import torch

from megatron_sorted.checkpoint.manifest import FileRecord
from megatron_sorted.checkpoint.writer import HashingFileSystem


def test_records_are_those_of_the_files_on_disk(tmp_path):
    files = HashingFileSystem()
    with files.create_stream(tmp_path / "a", "wb") as stream:
        torch.save(torch.arange(1000), stream)
        assert stream.tell() > 8000
    files.rename(tmp_path / "a", tmp_path / "b")
    files.write_bytes(tmp_path / "folder" / "c", b"abc")
    content = (tmp_path / "b").read_bytes()
    assert torch.equal(torch.load(tmp_path / "b"), torch.arange(1000))
    assert files.records == {
        tmp_path / "b": FileRecord(len(content), hashlib.sha256(content).hexdigest()),
        tmp_path / "folder" / "c": FileRecord(3, hashlib.sha256(b"abc").hexdigest()),
    }
    files.verify()


def test_a_file_that_reads_back_differently_is_detected(tmp_path):
    files = HashingFileSystem()
    files.write_bytes(tmp_path / "a", b"0123456789")
    with open(tmp_path / "a", "r+b") as file:
        file.seek(4)
        file.write(b"x")
    with pytest.raises(
        OSError,
        match=r"a: 10 bytes with sha256 84d89877f0d4 were written, "
        r"10 bytes with [0-9a-f]{12} came back",
    ):
        files.verify()


def test_the_reason_of_a_failed_write_is_kept_through_torch(tmp_path):
    """For a stream that fails in the middle torch.save reports "unexpected pos", not the error."""
    files = HashingFileSystem()
    os.symlink("/dev/full", tmp_path / "full")
    with (
        pytest.raises(OSError, match="No space left on device"),
        files.create_stream(tmp_path / "full", "wb") as stream,
    ):
        torch.save(torch.zeros(1_000_000), stream)
