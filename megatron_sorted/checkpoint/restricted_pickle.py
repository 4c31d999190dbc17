"""A safe reader of a checkpoint's ``.metadata``.

The file is a raw pickle, and unpickling can call any function that the pickle names. Only the names
below are permitted, and stand-ins of this file replace the real classes: they hold values and do
nothing. Any other name is refused before code of the pickle has run. Unlike the rest of this folder
this file needs torch alone.
"""

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

METADATA = ".metadata"
MAX_BYTES = 1 << 30
"""Largest size of the file; that of a thousand ranks takes some 100 MB."""


@dataclass(frozen=True)
class StoredPiece:
    """The place of one piece of a checkpoint: a file of its directory, and a range of bytes."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a tensor; ``piece`` is None if the checkpoint does not record its place."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    piece: StoredPiece | None


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, shape and stored rectangles of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class StoredNames:
    """Content of a sharded checkpoint by name: tensors, and objects that are not tensors."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredPiece | None]


class _Fixed(type):
    def __setattr__(cls, name, value):
        # a pickle may request to set attributes of anything that it can name, even of a class
        raise pickle.UnpicklingError(f"refused: pickle changes {cls.__name__}.{name}")


class _Record(metaclass=_Fixed):
    """A stand-in that accepts any arguments and keeps its state."""

    def __new__(cls, *_arguments, **_named):
        return super().__new__(cls)

    def __init__(self, *_arguments, **_named):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _TensorRecord(_Record): ...


class _BytesRecord(_Record): ...


class _Anything(_Record): ...


TORCH_METADATA = "torch.distributed.checkpoint.metadata"
TORCH_FILES = "torch.distributed.checkpoint.filesystem"
TORCH_PLANNER = "torch.distributed.checkpoint.planner"
MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
DTYPES = {
    name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)
}
PERMITTED: dict[tuple[str, str], Any] = {
    **{
        (TORCH_METADATA, name): _Anything
        for name in (
            "Metadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (TORCH_METADATA, "TensorStorageMetadata"): _TensorRecord,
    (TORCH_METADATA, "BytesStorageMetadata"): _BytesRecord,
    (TORCH_FILES, "_StorageInfo"): _Anything,
    (TORCH_FILES, "_StoragePrefix"): _Anything,
    # Megatron also stores the plan of the save, and once had its own classes for both
    **{
        (TORCH_PLANNER, name): _Anything
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    },
    **{(MEGATRON, name): _Anything for name in ("MCoreMetadata", "MCoreSavePlan")},
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Anything,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{
        ("torch", name): _Anything
        for name in ("strided", "contiguous_format", "preserve_format", "channels_last")
    },
    **{
        (module, name): _Anything
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath")
    },
    ("collections", "OrderedDict"): OrderedDict,
}
"""{(module, name) that a ``.metadata`` may request: its stand-in}."""


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that accepts permitted names only.

    It derives from the reader in Python: the one in C allocates memory for any number of memoised
    values that a pickle states, 32 GB for ten bytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a permitted name.

        Raises:
            UnpicklingError: The name is not permitted.
        """
        try:
            return PERMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused: pickle asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Raise UnpicklingError: metadata has no references to objects outside it."""
        raise pickle.UnpicklingError(f"refused: pickle asks for the outside object {pid!r}")


def _piece(info: Any) -> StoredPiece:
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"pieces are stored transformed ({info.transform_descriptors})")
    if (
        not isinstance(info.relative_path, str)
        or Path(info.relative_path).name != info.relative_path
    ):
        raise ValueError(
            f"a piece is recorded in {info.relative_path!r}, which is not a file of this directory"
        )
    if not all(isinstance(number, int) and number >= 0 for number in (info.offset, info.length)):
        raise ValueError(
            f"a piece of {info.relative_path} begins at {info.offset} and has {info.length} bytes"
        )
    return StoredPiece(info.relative_path, info.offset, info.length)


def _tensor(name: str, record: Any, pieces: dict) -> StoredTensor:
    dtype, shape = record.properties.state[0], tuple(map(int, record.size))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is of no kind that torch has ({dtype!r})")
    chunks = []
    for chunk in record.chunks:
        offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"{name} {shape} has a chunk of other dimensions ({offsets}, {sizes})")
        if any(
            o < 0 or n < 0 or o + n > whole
            for o, n, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"{name} {shape} has a chunk outside it (at {offsets} of {sizes})")
        chunks.append(StoredChunk(offsets, sizes, pieces.get((name, offsets))))
    return StoredTensor(dtype, shape, tuple(chunks))


def read_stored_names(directory: str | Path) -> StoredNames:
    """Read the list of contents of a ``torch_dist`` checkpoint, without running code of the file.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or requests a name that a checkpoint's
            metadata does not need.
    """
    path = Path(directory) / METADATA
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        metadata = RestrictedUnpickler(io.BytesIO(content)).load()
        pieces = {}
        for index, info in metadata.storage_data.items():
            offset = getattr(index, "offset", None)
            pieces[index.fqn, None if offset is None else tuple(map(int, offset))] = _piece(info)
        tensors, objects = {}, {}
        for name, record in metadata.state_dict_metadata.items():
            if isinstance(record, _TensorRecord):
                tensors[name] = _tensor(name, record, pieces)
            else:
                objects[name] = pieces.get((name, None))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: is missing, so this is no complete torch_dist checkpoint."
        ) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{shown(path)}: {shown(error)}. Either it is damaged, or it was made to run somebody "
            "else's program when it is read. Take the checkpoint from a source you trust."
        ) from error
    except Exception as error:  # a damaged pickle raises anything from EOFError to MemoryError
        raise CheckpointError(
            f"{shown(path)}: not readable ({type(error).__name__}: {shown(error)}). "
            "It is damaged, or no metadata of a torch_dist checkpoint."
        ) from error
    return StoredNames(tensors, objects)
