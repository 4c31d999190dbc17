"""What a worker of data preparation does: lines of JSON in, documents of tokens out. Imports neither torch nor megatron."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_sorted.data.indexed import PROMPT, RESPONSE, Documents, token_dtype
from megatron_sorted.data.jsonl import Block, records
from megatron_sorted.data.templates import TEMPLATES, BrokenSampleError, Part, parts_of
from megatron_sorted.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sorted.errors import DataError

SHOWN_LINES = 5


@dataclass(frozen=True)
class EncodeOptions:
    """How samples become documents; ``seq_length`` None: no limit."""

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int | None
    data_format: str
    prompt_template: str
    seq_length: int | None
    too_long: str
    append_eod: bool
    valid_fraction: float
    strict: bool


@dataclass
class Skipped:
    """Samples left out: how many, and where the first of them are, by reason."""

    count: dict[str, int] = field(default_factory=dict)
    where: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, places: list[str], count: int = 1) -> None:
        """Counts ``count`` samples, of which ``places`` are the first."""
        self.count[reason] = self.count.get(reason, 0) + count
        shown = self.where.setdefault(reason, [])
        shown += places[: SHOWN_LINES - len(shown)]

    def merge(self, other: "Skipped") -> None:
        """Counts the samples of a later block."""
        for reason, count in other.count.items():
            self.add(reason, other.where[reason], count)


class _Collector:
    """Gathers documents as flat lists."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.sequences: list[list[int]] = []
        self.modes: list[int] = []
        self.num_sequences: list[int] = []

    def finish(self) -> Documents:
        lengths = np.fromiter(map(len, self.sequences), np.int32, len(self.sequences))
        tokens = np.fromiter(chain.from_iterable(self.sequences), self.dtype, int(lengths.sum()))
        return Documents(tokens, lengths, np.array(self.modes, np.int8), np.array(self.num_sequences, np.int32))


@dataclass
class Encoded:
    """One block's documents, for training and for validation, and what was counted."""

    train: Documents
    valid: Documents
    skipped: Skipped
    num_samples: int
    num_truncated: int


class Encoder:
    """Turns blocks of lines into documents, with the tokenizer that the options name or a given one."""

    def __init__(self, options: EncodeOptions, tokenizer: Tokenizer | None = None):
        self.options = options
        self.tokenizer = tokenizer or load_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        if options.append_eod and self.tokenizer.eos_id is None:
            raise DataError(f"--append-eod: {self.tokenizer.name} has no end-of-text token. Use --no-append-eod.")

    def encode(self, block: Block) -> Encoded:
        """Returns the documents of one block.

        Raises:
            DataError: with ``strict``, at the first line that cannot be used.
        """
        skipped = Skipped()
        kept: list[tuple[int, list[Part]]] = []
        num_samples = 0
        for number, parts, reason in parsed(block, self.options.data_format, self.options.prompt_template):
            num_samples += 1
            if reason is None:
                kept.append((number, parts))
                continue
            if self.options.strict:
                raise DataError(f"{block.path}:{number}: {reason}. Mend the line, or leave --strict out to skip and count such lines.")
            skipped.add(reason, [f"{Path(block.path).name}:{number}"])
        sequences = iter(self.tokenizer.encode_batch([part.text for _, parts in kept for part in parts]))
        train, valid = _Collector(self.dtype), _Collector(self.dtype)
        truncated = 0
        for number, parts in kept:
            document = self._document(parts, sequences)
            shortened, reason = self._fit(document, [part.is_response for part in parts])
            if reason is not None:
                skipped.add(reason, [f"{Path(block.path).name}:{number}"])
                continue
            truncated += shortened
            to = valid if self._is_valid(parts) else train
            to.sequences += document
            to.modes += [RESPONSE if part.is_response else PROMPT for part in parts[: len(document)]]
            to.num_sequences.append(len(document))
        return Encoded(train.finish(), valid.finish(), skipped, num_samples, truncated)

    def _document(self, parts: list[Part], sequences: Iterator[list[int]]) -> list[list[int]]:
        tokenizer = self.tokenizer
        document = []
        for place, part in enumerate(parts):
            ids = next(sequences)
            if place == 0 and tokenizer.adds_bos:
                ids = [tokenizer.bos_id, *ids]
            if part.is_response and self.options.append_eod:
                ids = [*ids, tokenizer.eos_id]
            document.append(ids)
        return document

    def _fit(self, document: list[list[int]], responses: list[bool]) -> tuple[bool, str | None]:
        """Cuts a document (in place) to what a sample holds; returns whether it was cut, and why it is useless if it is."""
        limit, cut = self.options.seq_length, False
        if limit is not None and self.options.data_format != "text" and sum(map(len, document)) > limit + 1:
            if self.options.too_long == "skip":
                return False, "too_long"
            cut, room, place = True, limit + 1, 0
            while room > len(document[place]):
                room -= len(document[place])
                place += 1
            document[place] = document[place][:room]
            del document[place + 1 :]
        # The first token of a document is never predicted.
        num_trained = sum(len(ids) for ids, is_response in zip(document, responses, strict=False) if is_response) - responses[0]
        if num_trained > 0:
            return cut, None
        return cut, "response_cut_away" if cut else "nothing_to_predict"

    def _is_valid(self, parts: list[Part]) -> bool:
        """Decides by the text alone: copies of one sample never stand on both sides, and adding data moves no sample."""
        if not self.options.valid_fraction:
            return False
        digest = hashlib.blake2b("\0".join(part.text for part in parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.options.valid_fraction * 2**64


def parsed(block: Block, data_format: str, prompt_template: str) -> Iterator[tuple[int, list[Part], str | None]]:
    """Yields (line number, parts, None), or (line number, [], reason) for a line that cannot be used."""
    template = TEMPLATES[prompt_template]
    for number, record, reason in records(block):
        parts: list[Part] = []
        if reason is None:
            try:
                parts = parts_of(record, data_format, template)
                for part in parts:
                    part.text.encode()  # JSON can spell half a surrogate pair, which is no text
            except BrokenSampleError as error:
                reason = str(error)
            except UnicodeEncodeError:
                parts, reason = [], "invalid_unicode"
        yield number, parts, reason


_encoder: Encoder | None = None


def start_worker(options: EncodeOptions) -> None:
    """Loads the tokenizer of a worker process, once."""
    global _encoder
    _encoder = Encoder(options)


def encode_in_worker(block: Block) -> Encoded:
    """Returns the documents of one block, in a worker process."""
    assert _encoder is not None
    return _encoder.encode(block)
