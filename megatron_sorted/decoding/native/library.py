"""The compiled library's structures and functions, as ctypes sees them; see `source/pass.cpp`."""

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.errors import MemoryExhaustedError, SettingsError

VERSION = 4
FLOAT32, BFLOAT16, INT8 = range(3)
NO_MEMORY, BAD_TOKEN = 1, 2
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}


class CMatrix(ctypes.Structure):
    """A packed matrix."""

    _fields_ = [
        ("kind", c_int32), ("outputs", c_int32), ("inputs", c_int32), ("unused", c_int32),
        ("weights", c_void_p), ("scales", c_void_p), ("bias", c_void_p),
    ]  # fmt: skip


class CLayer(ctypes.Structure):
    """A layer."""

    _fields_ = [
        ("qkv", CMatrix), ("out", CMatrix), ("gate_up", CMatrix), ("down", CMatrix),
        ("first_norm", c_void_p), ("second_norm", c_void_p), ("qk_norm", c_void_p),
        ("first_epsilon", c_float), ("second_epsilon", c_float), ("qk_epsilon", c_float),
        ("heads", c_int32), ("groups", c_int32), ("head_size", c_int32), ("window", c_int32),
        ("cache_kind", c_int32),
    ]  # fmt: skip


class CPart(ctypes.Structure):
    """An adapter or MLP of an exit's own."""

    _fields_ = [
        ("first", CMatrix), ("second", CMatrix),
        ("norm", c_void_p), ("epsilon", c_float), ("unused", c_int32),
    ]  # fmt: skip


class CCache(ctypes.Structure):
    """Keys and values of a text in a layer."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p)]


class CSegment(ctypes.Structure):
    """Layers that run together."""

    _fields_ = [
        ("num_layers", c_int32), ("hidden_size", c_int32),
        ("num_parts", c_int32), ("embedding_kind", c_int32),
        ("layers", POINTER(CLayer)), ("parts", POINTER(CPart)),
        ("embedding", c_void_p), ("vocabulary", c_int64),
    ]  # fmt: skip


class CText(ctypes.Structure):
    """The memory of a text in a segment, and the draft tree behind it."""

    _fields_ = [
        ("tokens", c_void_p), ("source", c_void_p), ("target", c_void_p),
        ("caches", POINTER(CCache)),
        ("capacity", c_int32), ("tree_first", c_int32),
        ("tree_size", c_int32), ("unused", c_int32),
        ("tree_levels", c_void_p), ("tree_seen", c_void_p),
    ]  # fmt: skip


class CPlaces(ctypes.Structure):
    """New tokens and what each attends to."""

    _fields_ = [
        ("count", c_int32), ("unused", c_int32),
        ("rows", c_void_p), ("slots", c_void_p), ("positions", c_void_p),
        ("cosines", c_void_p), ("sines", c_void_p),
        ("texts", POINTER(CText)),
    ]  # fmt: skip


class CReadout(ctypes.Structure):
    """The readout of an exit."""

    _fields_ = [
        ("head", CMatrix), ("parts", POINTER(CPart)), ("norm", c_void_p),
        ("epsilon", c_float), ("num_parts", c_int32), ("hidden_size", c_int32),
        ("unused", c_int32),
    ]  # fmt: skip


def check_status(status: int, function, _arguments: tuple) -> None:
    """Raise the error that a status of the library means.

    Raises:
        MemoryExhaustedError: There is too little memory for what the call computes.
        SettingsError: A token is not in the model's vocabulary.
        RuntimeError: The library failed otherwise, which is a defect of it.
    """
    if status == NO_MEMORY:
        raise MemoryExhaustedError(
            f"{function.__name__}: there is too little free memory for one forward pass. Decode "
            "fewer or shorter texts at once, or take --native off."
        )
    if status == BAD_TOKEN:
        raise SettingsError(
            "a token of the text is not in the model's vocabulary. Use the model's own tokenizer."
        )
    if status:
        raise RuntimeError(f"{function.__name__} of the compiled library failed: status {status}")


def load_library(path: Path) -> ctypes.CDLL:
    """Load a compiled library.

    Raises:
        NativeError: It does not load, or belongs to another version of this program.
    """
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)
        version = library.native_version()
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded: {error}") from error
    if version != VERSION:
        raise NativeError(f"{path} is version {version}, not {VERSION}")
    library.native_instructions.restype = c_char_p
    library.native_packed_bytes.restype = library.native_num_scales.restype = c_uint64
    library.native_packed_bytes.argtypes = library.native_num_scales.argtypes = [c_int32] * 3
    for name in ("native_pack", "native_multiply", "native_run", "native_logits"):
        function = getattr(library, name)
        function.restype, function.errcheck = c_int32, check_status
    library.native_pack.argtypes = [
        c_int32, c_int32, c_void_p, c_int32, c_int32, c_void_p, c_void_p,
    ]  # fmt: skip
    library.native_multiply.argtypes = [c_int32, POINTER(CMatrix), c_int32, c_void_p, c_void_p]
    library.native_run.argtypes = [c_int32, c_int32, c_void_p, c_void_p]
    library.native_logits.argtypes = [
        c_int32, POINTER(CReadout), c_int32, c_void_p, c_void_p,
    ]  # fmt: skip
    return library


@cache
def _own_library() -> ctypes.CDLL | NativeError:
    """Return the library of this process, or why there is none: it is tried once."""
    # imported here: the trial of a library imports this file
    from megatron_sorted.decoding.native.library_cache import built_library

    try:
        with built_library() as path:
            return load_library(path)
    except NativeError as error:
        return error


def native_library() -> ctypes.CDLL:
    """Return the library of this process; it is built if there is none yet.

    Raises:
        NativeError: It cannot be built or loaded.
    """
    library = _own_library()
    if isinstance(library, NativeError):
        raise NativeError(str(library))
    return library
