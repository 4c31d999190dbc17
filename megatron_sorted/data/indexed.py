"""Token files in Megatron's indexed format (``PREFIX.bin``, ``PREFIX.idx``): write, check, open.

This module needs only numpy, so that preparing data starts at once; tests compare every byte with
Megatron's own builder.

Layout of the .idx, little endian: 9 bytes magic, u64 version 1, u8 code of the token type, u64 S =
sequences, u64 D + 1 where D = documents, then S i32 lengths in tokens, S i64 byte offsets into the
.bin, D + 1 i64 document boundaries (numbers of sequences), and, where documents have parts of
different kind, S i8 modes. The .bin holds nothing but the tokens.

A document of an instruction file alternates sequences of mode 0 (prompt, read but not trained on)
and mode 1 (response, trained on). A file without modes is plain text: one sequence per document,
all of it trained on.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_sorted.data.preparation import replacing
from megatron_sorted.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}
PROMPT, RESPONSE = 0, 1
REMEDY = "Write it again with megatron-sorted prepare."


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest token type for a vocabulary, by Megatron's rule.

    >>> str(token_dtype(32000)), str(token_dtype(65500))
    ('uint16', 'int32')
    """
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class IndexHeader:
    """The content of the header of an .idx, and whether modes follow."""

    dtype: np.dtype
    num_sequences: int
    num_documents: int
    has_modes: bool


@dataclass(frozen=True)
class Indexed:
    """An open indexed file; tokens stay on disk and are memory-mapped.

    Shapes:
        sequence_starts: (sequences + 1,), in tokens.
        document_bounds: (documents + 1,), in sequences.
        modes: (sequences,) or None for plain text.
    """

    prefix: str
    tokens: np.ndarray
    sequence_starts: np.ndarray
    document_bounds: np.ndarray
    modes: np.ndarray | None

    @property
    def num_documents(self) -> int:
        """Return the number of documents in the file."""
        return len(self.document_bounds) - 1

    def document_lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, (documents,) int64."""
        return np.diff(self.sequence_starts[self.document_bounds])

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document as a view of the mapped file."""
        first, last = self.document_bounds[number], self.document_bounds[number + 1]
        return self.tokens[self.sequence_starts[first] : self.sequence_starts[last]]

    def trained(self, number: int) -> np.ndarray:
        """Return, for each token of one document, whether it is to be predicted: (tokens,) bool."""
        first, last = self.document_bounds[number], self.document_bounds[number + 1]
        lengths = np.diff(self.sequence_starts[first : last + 1])
        modes = np.full(last - first, RESPONSE) if self.modes is None else self.modes[first:last]
        return np.repeat(modes == RESPONSE, lengths)


def check_indexed(prefix: str) -> IndexHeader:
    """Return the header of an indexed file after checks of both files' existence, header and size.

    Raises:
        DataError: A check fails; the message names the file, what was expected, and the remedy.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    replacing.finish_interrupted(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; indexed data needs PREFIX.bin and PREFIX.idx. Give the "
                "prefix without an ending, or write the data with megatron-sorted prepare."
            )
    idx_bytes = idx_path.stat().st_size
    if idx_bytes < HEADER_BYTES:
        raise DataError(
            f"{idx_path}: {idx_bytes} bytes, but the header alone takes {HEADER_BYTES}; the file "
            f"is truncated. {REMEDY}"
        )
    with open(idx_path, "rb") as stream:
        head = stream.read(HEADER_BYTES)
    if head[:9] != MAGIC:
        raise DataError(
            f"{idx_path}: starts with {head[:9]!r} where an index of Megatron starts with "
            f"{MAGIC!r}. {REMEDY}"
        )
    version, code, num_sequences, num_bounds = struct.unpack("<QBQQ", head[9:])
    if version != 1:
        raise DataError(f"{idx_path}: format version {version}; only version 1 is known. {REMEDY}")
    if code not in DTYPE_OF_CODE:
        raise DataError(
            f"{idx_path}: token type code {code} is not one of {sorted(DTYPE_OF_CODE)}. {REMEDY}"
        )
    without_modes = HEADER_BYTES + 12 * num_sequences + 8 * num_bounds
    with_modes = without_modes + num_sequences
    if num_bounds < 1 or idx_bytes not in (without_modes, with_modes):
        state = "truncated" if idx_bytes < without_modes else "damaged"
        raise DataError(
            f"{idx_path}: {idx_bytes} bytes, but {num_sequences} sequences and {num_bounds - 1} "
            f"documents take {without_modes} ({with_modes} with modes); the file is {state}. "
            f"{REMEDY}"
        )
    with open(idx_path, "rb") as stream:
        stream.seek(HEADER_BYTES)
        num_tokens = int(np.fromfile(stream, "<i4", num_sequences).sum(dtype=np.int64))
    dtype = np.dtype(DTYPE_OF_CODE[code])
    bin_bytes = bin_path.stat().st_size
    if bin_bytes != num_tokens * dtype.itemsize:
        state = "truncated" if bin_bytes < num_tokens * dtype.itemsize else "too long"
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes, but {idx_path.name} lists {num_tokens} tokens of "
            f"{dtype.itemsize} bytes = {num_tokens * dtype.itemsize} bytes; the file is {state}, "
            f"or the two are not of one run. {REMEDY}"
        )
    return IndexHeader(
        dtype, num_sequences, num_bounds - 1, idx_bytes == with_modes and num_sequences > 0
    )


def open_indexed(prefix: str) -> Indexed:
    """Open an indexed file after :func:`check_indexed` and a check of the tables in the index.

    Raises:
        DataError: A file is missing or damaged, holds no tokens, or is of a kind that cannot be
            trained on.
    """
    header = check_indexed(prefix)
    idx_path = f"{prefix}.idx"
    with open(idx_path, "rb") as stream:
        stream.seek(HEADER_BYTES)
        lengths = np.fromfile(stream, "<i4", header.num_sequences)
        pointers = np.fromfile(stream, "<i8", header.num_sequences)
        bounds = np.fromfile(stream, "<i8", header.num_documents + 1)
        modes = np.fromfile(stream, "i1", header.num_sequences) if header.has_modes else None
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if not starts[-1]:
        raise DataError(f"{prefix}.bin: holds no tokens. {REMEDY}")
    if (lengths < 0).any() or (pointers != starts[:-1] * header.dtype.itemsize).any():
        raise DataError(
            f"{idx_path}: sequence lengths and byte offsets contradict each other; the file is "
            f"damaged. {REMEDY}"
        )
    if bounds[0] != 0 or bounds[-1] != header.num_sequences or (np.diff(bounds) < 0).any():
        raise DataError(
            f"{idx_path}: document boundaries do not run from 0 to {header.num_sequences}; the "
            f"file is damaged. {REMEDY}"
        )
    if modes is None and (np.diff(bounds) > 1).any():
        # an instruction index that lost exactly its modes looks like this; training on it would
        # include the prompts without a warning
        raise DataError(
            f"{idx_path}: documents of several sequences but no modes that say which are trained "
            f"on (the last {header.num_sequences} bytes may be missing). {REMEDY}"
        )
    if modes is not None and not np.isin(modes, (PROMPT, RESPONSE)).all():
        raise DataError(
            f"{idx_path}: sequence modes {np.unique(modes).tolist()}; only 0 (prompt) and 1 "
            f"(response) are known. {REMEDY}"
        )
    return Indexed(prefix, np.memmap(f"{prefix}.bin", header.dtype, "r"), starts, bounds, modes)


@dataclass
class Documents:
    """Whole documents as flat arrays, the form that workers return.

    Shapes:
        tokens: (tokens,).
        lengths, modes: (sequences,).
        num_sequences: (documents,), the number of sequences of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    modes: np.ndarray
    num_sequences: np.ndarray


class IndexedWriter:
    """A context manager that appends documents and names the files when all is written.

    After an error inside the ``with`` block nothing remains, and earlier files of that name are
    untouched.

    Args:
        prefix: The prefix of the files.
        dtype: The type of tokens.
        with_modes: Whether documents have prompts and responses.
        publishes: Whether the files get their names at the end of the block; otherwise they wait
            for ``replacing.publish``.
    """

    def __init__(self, prefix: str, dtype: np.dtype, with_modes: bool, publishes: bool = True):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.with_modes, self.publishes = with_modes, publishes
        self.num_tokens = 0
        self._lengths: list[np.ndarray] = []
        self._modes: list[np.ndarray] = []
        self._num_sequences: list[np.ndarray] = []

    def __enter__(self) -> "IndexedWriter":
        """Return the writer with the temporary .bin open."""
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        replacing.remove_leftovers(self.prefix)
        self._bin = open(self._partial("bin"), "wb")  # closed in __exit__
        return self

    def _partial(self, ending: str) -> str:
        return f"{self.prefix}.{ending}.partial"

    @property
    def num_documents(self) -> int:
        """Return the number of documents that were appended so far."""
        return sum(len(part) for part in self._num_sequences)

    def append(self, documents: Documents) -> None:
        """Append documents in their order."""
        assert (
            documents.tokens.size == documents.lengths.sum()
            and documents.lengths.size == documents.num_sequences.sum()
        )
        self._bin.write(np.ascontiguousarray(documents.tokens, self.dtype).data)
        self.num_tokens += documents.tokens.size
        self._lengths.append(documents.lengths)
        self._modes.append(documents.modes)
        self._num_sequences.append(documents.num_sequences)

    def _write_index(self) -> None:
        lengths = np.concatenate([np.zeros(0, "<i4"), *self._lengths]).astype("<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        bounds = np.cumsum(np.concatenate([np.zeros(1, "<i8"), *self._num_sequences]), dtype="<i8")
        with open(self._partial("idx"), "wb") as stream:
            stream.write(
                MAGIC
                + struct.pack("<QBQQ", 1, CODE_OF_DTYPE[self.dtype.name], len(lengths), len(bounds))
            )
            for table in (
                lengths,
                np.concatenate([np.zeros(1, "<i8"), ends[:-1]])[: len(lengths)],
                bounds,
            ):
                stream.write(table.tobytes())
            if self.with_modes:
                stream.write(
                    np.concatenate([np.zeros(0, "i1"), *self._modes]).astype("i1").tobytes()
                )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Name both files, or remove what was written if the block failed."""
        self._bin.close()
        waits = False
        try:
            if kind is None:
                self._write_index()
                waits = not self.publishes
                if self.publishes:
                    replacing.publish([self.prefix])
        finally:
            if not waits:
                replacing.remove_partial(self.prefix)
