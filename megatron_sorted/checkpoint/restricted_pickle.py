"""A checkpoint's ``.metadata`` read without running anything: it is a raw pickle, and a raw pickle can call whatever it names.

Only the names below may be asked for, and none of them is the real thing: plain stand-ins of this file take their place, which hold
values and do nothing. So what a pickle asks for beyond this list is refused by its name, and nothing of it has run. Unlike the rest of
this folder this file needs torch alone.
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
MOST_BYTES = 1 << 30
"""Of it: that of a thousand ranks takes some 100 MB."""


@dataclass(frozen=True)
class StoredPiece:
    """Where one piece of a checkpoint lies: a file of its directory, and the bytes in it."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor; ``piece`` is None when the checkpoint does not say where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    piece: StoredPiece | None


@dataclass(frozen=True)
class StoredTensor:
    """Kind, shape and boxes of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class StoredNames:
    """What a sharded checkpoint holds, by name: tensors, and objects that are no tensors."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredPiece | None]


class _Fixed(type):
    def __setattr__(cls, name, value):
        # a pickle may ask to set attributes of whatever it can name, a class too
        raise pickle.UnpicklingError(f"refused: pickle changes {cls.__name__}.{name}")


class _Record(metaclass=_Fixed):
    """Takes any arguments and keeps the state it is given."""

    def __new__(cls, *_arguments, **_named):
        return super().__new__(cls)

    def __init__(self, *_arguments, **_named):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _TensorRecord(_Record): ...


class _BytesRecord(_Record): ...


class _Anything(_Record): ...


TORCH_METADATA, TORCH_FILES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
TORCH_PLANNER, MEGATRON = (
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
)
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
    # Megatron keeps the plan of the save beside it, and once had classes of its own for both
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
"""Every (module, name) that a ``.metadata`` may ask for, and what it is given in its place."""


class RestrictedUnpickler(pickle._Unpickler):
    """Reads a pickle that asks for permitted names only.

    It is the reader in Python: that in C makes room for as many remembered values as a pickle says, 32 GB for ten bytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a permitted name.

        Raises:
            UnpicklingError: It is not permitted.
        """
        try:
            return PERMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused: pickle asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Raises UnpicklingError: no metadata refers to something outside it."""
        raise pickle.UnpicklingError(f"refused: pickle asks for the outside object {pid!r}")


def _piece(info: Any) -> StoredPiece:
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"pieces are stored transformed ({info.transform_descriptors})")
    if (
        not isinstance(info.relative_path, str)
        or Path(info.relative_path).name != info.relative_path
    ):
        raise ValueError(
            f"a piece is said to lie in {info.relative_path!r}, which is not a file of this directory"
        )
    if min(info.offset, info.length) < 0:
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
    """Return what a ``torch_dist`` checkpoint says it holds; nothing of the file is run.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or asks for something that a checkpoint's metadata does not need.
    """
    path = Path(directory) / METADATA
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
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
            f"{shown(path)}: {shown(error)}. Either it is damaged, or it was made to run a program of somebody "
            "else's when it is read. "
            "Take the checkpoint from a source you trust."
        ) from error
    except Exception as error:  # a damaged pickle shows as anything from EOFError to MemoryError
        raise CheckpointError(
            f"{shown(path)}: not readable ({type(error).__name__}: {shown(error)}). It is damaged, or no metadata "
            "of a torch_dist checkpoint."
        ) from error
    return StoredNames(tensors, objects)
