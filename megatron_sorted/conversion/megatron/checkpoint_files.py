"""Writer of our checkpoints, one tensor at a time, in Megatron's torch_dist format.

Megatron stores a tensor of a layer as a slice of a tensor over all layers, [layers, ...]. A slice
is written for every layer, so any number of pipeline stages can read its own layers.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sorted.checkpoint.manifest import CONTENT, FileRecord
from megatron_sorted.checkpoint.writer import HashingWriter
from megatron_sorted.conversion.megatron.names import LAYER
from megatron_sorted.conversion.tensors.source import TensorInfo

SHARDS = "__0_0.distcp"


def global_name(name: str) -> tuple[str, int | None]:
    """Return the stored name of a tensor and the index of its layer; None outside of layers.

    >>> global_name("decoder.layers.3.mlp.linear_fc1.weight")
    ('decoder.layers.mlp.linear_fc1.weight', 3)
    """
    match = LAYER.fullmatch(name)
    return (name, None) if match is None else (f"decoder.layers.{match[2]}", int(match[1]))


class WeightsWriter:
    """Writes the shards of a checkpoint, one tensor at a time.

    Args:
        directory: An existing directory.
        tensors: The tensors that will be written: names with the layer's index, whole shapes.
        num_layers: The number of layers of the network.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, TensorInfo], num_layers: int):
        self.directory, self.tensors, self.num_layers = directory, tensors, num_layers
        self._writer = HashingWriter(directory, lambda: None)
        self._stored: dict[str, TensorStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._stream_context = self._writer.fs.create_stream(directory / SHARDS, "wb")
        self._stream = self._stream_context.__enter__()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            OSError: The disk is full or fails.
        """
        info = self.tensors[name]
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, (
            f"{name}: {tensor.shape} {tensor.dtype}, announced {info}"
        )
        stored, layer = global_name(name)
        tensor = tensor.contiguous() if layer is None else tensor.contiguous().unsqueeze(0)
        offset = (layer or 0, *(0,) * (tensor.dim() - 1))
        full = info.shape if layer is None else (self.num_layers, *info.shape)
        # torch.save writes the whole storage of a view.
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        begin = self._stream.tell()
        try:
            torch.save(tensor, self._stream)
        except RuntimeError as error:
            # torch's error for a stream that cannot be written hides the reason.
            raise self._stream.failure or error from None
        index = MetadataIndex(stored, offset, layer or 0)
        entry = self._stored.setdefault(
            stored, TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(full), [])
        )
        entry.chunks.append(ChunkStorageMetadata(index.offset, tensor.shape))
        self._results.append(
            WriteResult(
                index,
                self._stream.tell() - begin,
                _StorageInfo(SHARDS, begin, self._stream.tell() - begin),
            )
        )

    def close(self, small_files: Mapping[str, bytes]) -> dict[str, FileRecord]:
        """Write the descriptions and ``small_files``; return size and hash of every file.

        Raises:
            OSError: The disk is full or fails.
        """
        self._stream_context.__exit__(None, None, None)
        assert len(self._results) == len(self.tensors), "not all announced tensors were written"
        self._writer.finish(Metadata(self._stored, version=CURRENT_DCP_VERSION), [self._results])
        common = io.BytesIO()
        torch.save({"content_metadata": CONTENT, "more": {}}, common)
        description = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        for name, data in {
            "common.pt": common.getvalue(),
            "metadata.json": json.dumps(description).encode(),
            **small_files,
        }.items():
            self._writer.fs.write_bytes(self.directory / name, data)
        return {
            str(path.relative_to(self.directory)): record
            for path, record in self._writer.fs.records.items()
        }

    def abandon(self) -> None:
        """Close the file after a failure; the caller removes what was written."""
        self._stream.close()
