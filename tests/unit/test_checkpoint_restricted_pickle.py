"""Metadata of a checkpoint is read, and nothing that it asks for is run."""

import os
import pickle
import re

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sorted.checkpoint.restricted_pickle import (
    StoredChunk,
    StoredPiece,
    StoredTensor,
    read_stored_names,
)
from megatron_sorted.errors import CheckpointError


def metadata(**changes) -> Metadata:
    """Return metadata of one bfloat16 tensor in two pieces."""
    chunks = [
        ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 3))),
        ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((2, 3))),
    ]
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16), torch.Size((4, 3)), chunks
    )
    storage = {
        MetadataIndex("w", (2 * n, 0)): _StorageInfo(f"__{n}_0.distcp", 10 * n, 12) for n in (0, 1)
    }
    return Metadata(**{"state_dict_metadata": {"w": tensor}, "storage_data": storage, **changes})


class Calls:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write(tmp_path, content) -> None:
    (tmp_path / ".metadata").write_bytes(
        content if isinstance(content, bytes) else pickle.dumps(content)
    )


def test_metadata_that_torch_writes_is_read(tmp_path):
    write(tmp_path, metadata())
    stored = read_stored_names(tmp_path)
    pieces = (StoredPiece("__0_0.distcp", 0, 12), StoredPiece("__1_0.distcp", 10, 12))
    chunks = (StoredChunk((0, 0), (2, 3), pieces[0]), StoredChunk((2, 0), (2, 3), pieces[1]))
    assert (
        stored.tensors == {"w": StoredTensor(torch.bfloat16, (4, 3), chunks)}
        and stored.objects == {}
    )


@pytest.mark.parametrize(("function", "arguments", "name"), [
    (os.system, ("touch {}",), f"{os.system.__module__}.system"),
    (eval, ("open('{}', 'w')",), "builtins.eval"),
    (os.mkdir, ("{}",), f"{os.mkdir.__module__}.mkdir"),
    (torch.load, ("{}",), "torch.serialization.load"),
    (getattr, (torch, "load"), "builtins.getattr"),
])  # fmt: skip
def test_a_call_is_refused_by_name_and_does_not_run(function, arguments, name, tmp_path):
    trace = tmp_path / "ran"
    call = Calls(
        function,
        *(
            argument.format(trace) if isinstance(argument, str) else argument
            for argument in arguments
        ),
    )
    if function is getattr:
        call = Calls(getattr, Metadata, "__init__")
    write(tmp_path, metadata(planner_data=call))
    with pytest.raises(CheckpointError, match=re.escape(f"refused: pickle asks for {name}")):
        read_stored_names(tmp_path)
    assert not trace.exists()


def test_a_permitted_class_cannot_be_changed(tmp_path):
    # c: class, then state (None, {"x": 1}), then BUILD, which would set an attribute of the class
    write(
        tmp_path,
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}(X\x01\x00\x00\x00xK\x01utb.",
    )
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_stored_names(tmp_path)


def stored_at(info):
    """Return a pickled metadata whose only piece is at ``info``."""
    return pickle.dumps(metadata(storage_data={MetadataIndex("w", (0, 0)): info}))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not readable"), (b"\x80\x04garbage", "damaged"),
    (pickle.dumps({"a": 1}), "not readable"),
    (pickle.dumps(metadata())[:-40], "damaged"),
    (stored_at(_StorageInfo("../secret", 0, 1)), "not a file of this directory"),
    (stored_at(_StorageInfo("a", 0, 1, ["zstd"])), "transformed"),
])  # fmt: skip
def test_damage_is_reported(content, message, tmp_path):
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        read_stored_names(tmp_path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        read_stored_names(tmp_path)
