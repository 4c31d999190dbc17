"""Weights of a ``torch_dist`` checkpoint, ours or Megatron-LM's or MindSpeed's, of any layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.checkpoint.layout import AVERAGED
from megatron_sorted.checkpoint.restricted_pickle import (
    StoredChunk,
    StoredPiece,
    StoredTensor,
    read_stored_names,
)
from megatron_sorted.conversion.megatron.common_state import read_common_states
from megatron_sorted.conversion.megatron.names import STACKED, is_no_weight, plain_name
from megatron_sorted.conversion.megatron.saved_tensors import SavedFile
from megatron_sorted.conversion.tensors.memory import new_tensor
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

MAX_LAYERS = 1 << 16
"""Limit for layers of one stored tensor: far more than any network has."""


@dataclass(frozen=True)
class _Place:
    """The stored tensor that holds a tensor, and the index of the layer if it holds all layers."""

    stored: str
    layer: int | None


def _overlap(
    chunk: StoredChunk, layer: int | None
) -> tuple[tuple[slice, ...], tuple[slice, ...], int] | None:
    """Return a chunk's share of a tensor; None if it has none.

    Returns:
        The slices in the tensor, the slices in the chunk, and the number of elements.
    """
    offsets, sizes = chunk.offsets, chunk.sizes
    source = tuple(slice(0, size) for size in sizes)
    if layer is not None:
        if not offsets[0] <= layer < offsets[0] + sizes[0]:
            return None
        source = (slice(layer - offsets[0], layer - offsets[0] + 1), *source[1:])
        offsets, sizes = offsets[1:], sizes[1:]
    target = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    return target, source, torch.Size(sizes).numel()


def _intersect(one: tuple[slice, ...], other: tuple[slice, ...]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


class TorchDistFiles(TensorSource):
    """The weights of one checkpoint directory, in the names of ``TensorSource``.

    Tensors of layers have names of their own, even if one stored tensor holds all layers. Reading
    takes the memory of one tensor and one stored piece of it.

    Attributes:
        tensors: Shapes and data types, in the order of their positions in the files.
    """

    def __init__(self, directory: str | Path, averaged: bool = False):
        """Read the metadata, and check that every file exists and is long enough.

        With ``averaged`` the averages of weights are read, under the weights' names.

        Raises:
            CheckpointError: It is no such checkpoint, names a class that is refused, or lacks files
                or parts of tensors.
        """
        self.directory = Path(directory)
        names = read_stored_names(self.directory)
        self._objects = names.objects
        # Pieces whose checksums matched; they are not compared again.
        self._verified: set[StoredPiece] = set()
        prefix = f"{AVERAGED}." if averaged else ""
        self._stored = {
            name.removeprefix(prefix): stored
            for name, stored in names.tensors.items()
            if name.startswith(prefix) and not is_no_weight(name.removeprefix(prefix))
        }
        tensors: dict[str, tuple[tuple[str, int], TensorInfo, _Place]] = {}
        sizes: dict[str, int] = {}
        for stored_name, stored in self._stored.items():
            self._check_pieces(stored_name, stored, sizes)
            for name, place in self._offers(stored_name, stored):
                if name in tensors:
                    raise CheckpointError(
                        f"{shown(self.directory)}: {shown(name)} is there twice, as "
                        f"{shown(tensors[name][2].stored)} and as {shown(stored_name)}."
                    )
                shape = stored.shape if place.layer is None else stored.shape[1:]
                pieces = [chunk.piece for chunk in stored.chunks if _overlap(chunk, place.layer)]
                if not pieces:
                    raise self._incomplete(name, place)
                position = min((piece.file, piece.offset) for piece in pieces)
                tensors[name] = position, TensorInfo(shape, stored.dtype), place
        if not tensors:
            what = "averages of weights" if averaged else "weights of a GPT model"
            raise CheckpointError(f"{self.directory}: holds no {what}.")
        order = sorted(tensors, key=lambda name: tensors[name][0])
        self.tensors: Mapping[str, TensorInfo] = {name: tensors[name][1] for name in order}
        self._places = {name: tensors[name][2] for name in order}

    @staticmethod
    def _offers(name: str, stored: StoredTensor) -> list[tuple[str, _Place]]:
        if match := STACKED.fullmatch(name):
            return [
                (plain_name(f"decoder.layers.{layer}.{match[1]}"), _Place(name, layer))
                for layer in range(stored.shape[0])
            ]
        return [(plain_name(name), _Place(name, None))]

    def _incomplete(self, name: str, place: _Place) -> CheckpointError:
        files = sorted(
            {chunk.piece.file for chunk in self._stored[place.stored].chunks if chunk.piece}
        )
        return CheckpointError(
            f"{shown(self.directory)}: {shown(name)}: parts of it are in no file (those of "
            f"{place.stored} lie in {', '.join(files) or 'none'}). The save was not complete, or "
            "the files are of different saves."
        )

    def _check_pieces(self, name: str, stored: StoredTensor, sizes: dict[str, int]) -> None:
        """Check shape, size and file of every piece of a stored tensor."""
        if 0 in stored.shape or (
            STACKED.fullmatch(name) and (not stored.shape or stored.shape[0] > MAX_LAYERS)
        ):
            raise CheckpointError(
                f"{shown(self.directory)}: {shown(name)} is of shape "
                f"{shown(list(stored.shape), 60)}, which no weight has (layers: {MAX_LAYERS:,} at "
                "most). The metadata is damaged; copy the directory again."
            )
        for chunk in stored.chunks:
            if chunk.piece is None:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(name)}: the metadata does not say where its "
                    f"part at {list(chunk.offsets)} lies."
                )
            file = chunk.piece.file
            if file not in sizes:
                path = self.directory / file
                sizes[file] = path.stat().st_size if path.is_file() else -1
            if sizes[file] < 0:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(file)} is missing; it holds {shown(name)}. "
                    "Copy the whole directory again."
                )
            if math.prod(chunk.sizes) * stored.dtype.itemsize > chunk.piece.num_bytes:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(name)} has a part of shape "
                    f"{shown(list(chunk.sizes), 60)} in {chunk.piece.num_bytes} bytes, which do "
                    "not hold it. The metadata is damaged; copy the directory again."
                )
            end = chunk.piece.offset + chunk.piece.num_bytes
            if sizes[file] < end:
                raise CheckpointError(
                    f"{shown(self.directory)}: {shown(file)} has {sizes[file]} bytes, but "
                    f"{shown(name)} lies up to byte {end}; it was cut off. Copy it again."
                )

    def common_states(self) -> dict[str, dict[str, Any]]:
        """Read what all ranks share: arguments, step and whatever else was saved.

        Returns:
            {file or object: its content}; ``common_state`` says which there may be.

        Raises:
            CheckpointError: One of them is damaged, or holds a class that is not on the list of
                plain ones.
        """
        return read_common_states(self.directory, self._objects)

    def _load(self, name: str, stored: StoredTensor, chunk: StoredChunk) -> torch.Tensor:
        """Read one piece, checked against the metadata."""
        label = f"{self.directory}: {name} in {chunk.piece.file}"
        saved = SavedFile(self.directory / chunk.piece.file, chunk.piece, label)
        tensor = saved.content
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype != stored.dtype
            or tuple(tensor.shape) != chunk.sizes
        ):
            actual = (
                f"{tensor.dtype} {list(tensor.shape)}"
                if isinstance(tensor, torch.Tensor)
                else type(tensor).__name__
            )
            raise CheckpointError(
                f"{label}: {actual} lies where the metadata says {stored.dtype} "
                f"{list(chunk.sizes)}; the files are of different saves."
            )
        result = saved.read(saved.place(tensor), check=chunk.piece not in self._verified)
        self._verified.add(chunk.piece)
        return result

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own.

        Raises:
            CheckpointError: A part of it is missing or damaged.
        """
        place, info = self._places[name], self.tensors[name]
        stored = self._stored[place.stored]
        parts = [(chunk, part) for chunk in stored.chunks if (part := _overlap(chunk, place.layer))]
        rectangles = [target for _, (target, _, _) in parts]
        count = sum(numel for *_, (_, _, numel) in parts)
        if count != torch.Size(info.shape).numel() or any(
            _intersect(a, b) for i, a in enumerate(rectangles) for b in rectangles[:i]
        ):
            raise self._incomplete(name, place)
        if len(parts) == 1:
            chunk, (_, source, numel) = parts[0]
            whole = self._load(name, stored, chunk)
            part = whole[source].reshape(info.shape)
            return (
                part
                if whole.untyped_storage().nbytes() == numel * info.dtype.itemsize
                else part.clone()
            )
        result = new_tensor(info.shape, info.dtype)
        for chunk, (target, source, _) in sorted(
            parts, key=lambda part: (part[0].piece.file, part[0].piece.offset)
        ):
            result[target] = self._load(name, stored, chunk)[source].reshape(
                [s.stop - s.start for s in target]
            )
        return result
