"""The work of one process of data preparation: lines of JSON in, documents of tokens out.

Imports neither torch nor megatron.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sorted.data.indexed import PROMPT, RESPONSE, Documents, token_dtype
from megatron_sorted.data.preparation.counts import Skipped
from megatron_sorted.data.preparation.forms import ConversationSample, SampleReader, resolved_label
from megatron_sorted.data.preparation.templates import BrokenSampleError
from megatron_sorted.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_lines import Block, records
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.conversation import SkippedConversationError, TextSpan
from megatron_sorted.text.prompt_form import CHAT, PromptForm
from megatron_sorted.text.span_ids import SpanEncoder, TrainedIds


@dataclass(frozen=True)
class EncodeOptions:
    """How samples become documents.

    With ``seq_length`` None there is no limit; with ``takes_both`` each row is read as messages or
    as an instruction, whichever it is.
    """

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
    takes_both: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the options for the summary of prepared data, without those of the tokenizer."""
        return {
            name: value
            for name, value in asdict(self).items()
            if not name.startswith("tokenizer") and name != "vocab_size"
        }


class _Collector:
    """Documents collected in flat lists."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.sequences: list[list[int]] = []
        self.modes: list[int] = []
        self.num_sequences: list[int] = []

    def add(self, document: list[TrainedIds]) -> None:
        """Add a document."""
        self.sequences += [ids for ids, _ in document]
        self.modes += [RESPONSE if is_response else PROMPT for _, is_response in document]
        self.num_sequences.append(len(document))

    def remove_last(self, count: int) -> None:
        """Remove the last ``count`` documents."""
        for _ in range(count):
            last = self.num_sequences.pop()
            del self.sequences[-last:], self.modes[-last:]

    def finish(self) -> Documents:
        lengths = np.fromiter(map(len, self.sequences), np.int32, len(self.sequences))
        tokens = np.fromiter(chain.from_iterable(self.sequences), self.dtype, int(lengths.sum()))
        return Documents(
            tokens, lengths, np.array(self.modes, np.int8), np.array(self.num_sequences, np.int32)
        )


@dataclass
class Encoded:
    """The documents of one block, for training and for validation, and the counts.

    Attributes:
        num_split: The number of samples that became several documents, since the template or the
            tokenizer rewrites earlier turns.
        ends: The tokens that answers end with.
    """

    skipped: Skipped
    train: Documents | None = None
    valid: Documents | None = None
    num_samples: int = 0
    num_truncated: int = 0
    num_split: int = 0
    ends: set[str] = field(default_factory=set)


class Encoder:
    """An encoder of blocks of lines into documents, by a given tokenizer or that of the options."""

    def __init__(self, options: EncodeOptions, tokenizer: Tokenizer | None = None):
        self.options = options
        self.tokenizer = tokenizer or load_tokenizer(
            options.tokenizer_type, options.tokenizer_model, options.vocab_size
        )
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        if options.append_eod and self.tokenizer.eos_id is None and not self._has_own_ends():
            raise DataError(
                f"--append-eod: {self.tokenizer.name} has no end-of-text token. Use "
                "--no-append-eod."
            )
        self.reader = SampleReader(
            options.data_format,
            options.prompt_template,
            self.tokenizer,
            options.append_eod,
            options.takes_both,
        )
        self.span_encoder = SpanEncoder(self.tokenizer, [end.text for end in self.form.ends])
        self.specials = self.tokenizer.special_ids | set(self.form.end_ids)

    def _has_own_ends(self) -> bool:
        label = resolved_label(
            self.options.prompt_template, self.options.data_format, self.tokenizer
        )
        return self.options.data_format != "text" and label.startswith(CHAT)

    @property
    def form(self) -> PromptForm:
        """Return the form in which samples are written."""
        return self.reader.form

    def encode(self, block: Block) -> Encoded:
        """Return the documents of one block.

        Raises:
            DataError: A line cannot be used, and ``strict`` is set.
        """
        counts = Encoded(skipped=Skipped())
        samples: list[tuple[int, ConversationSample]] = []
        for number, sample, reason, more in self._samples(block):
            counts.num_samples += 1
            if sample is not None:
                samples.append((number, sample))
            else:
                self._skip(block, counts, number, reason, more)
        train, valid = _Collector(self.dtype), _Collector(self.dtype)
        encoded = self._ids(samples)
        for number, sample in samples:
            to = valid if self._is_valid(sample.key) else train
            documents = [document for _ in sample.documents for document in next(encoded)]
            kept, reason = 0, None
            for document in documents:
                reason = reason or self._collect(document, to, counts)
                kept += reason is None
            if reason is not None:
                to.remove_last(kept)
                self._skip(block, counts, number, reason, "")
                continue
            counts.num_split += len(documents) > 1
            counts.ends.update(span.end for spans in sample.documents for span in spans if span.end)
        counts.train, counts.valid = train.finish(), valid.finish()
        return counts

    def _samples(self, block: Block) -> Iterator[tuple[int, ConversationSample | None, str, str]]:
        """Yield (line number, sample, "", "") of usable lines.

        Of others yield (line number, None, reason, details).
        """
        for number, record, reason in records(block):
            if reason is not None:
                yield number, None, reason, ""
                continue
            try:
                sample = self.reader.read(record)
                sample.key.encode()  # JSON can contain half a surrogate pair, which is not text
                yield number, sample, "", ""
            except BrokenSampleError as error:
                yield number, None, str(error), ""
            except SkippedConversationError as error:
                yield number, None, *error.args
            except UnicodeEncodeError:
                yield number, None, "invalid_unicode", ""

    def _skip(
        self, block: Block, counts: Encoded, number: int, reason: str, explanation: str
    ) -> None:
        details = f" ({shown(explanation, 80)})" if explanation else ""
        if self.options.strict:
            raise DataError(
                f"{block.place(number)}: {reason}{details}. Correct the line, or leave --strict "
                "out to skip and count such lines."
            )
        counts.skipped.add(reason, [f"{block.place(number, Path(block.path).name)}{details}"])

    def _ids(
        self, samples: list[tuple[int, ConversationSample]]
    ) -> Iterator[list[list[TrainedIds]]]:
        """Yield, for every document of the samples in order, the sequences it becomes."""
        documents = [spans for _, sample in samples for spans in sample.documents]
        if self.options.data_format != "text":
            yield from self.span_encoder.encode(documents)
            return
        begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        for ids in self.tokenizer.encode_batch([spans[0].text for spans in documents]):
            yield [[([*begin, *ids, *self.form.end_ids], True)]]

    def _collect(self, document: list[TrainedIds], to: _Collector, counts: Encoded) -> str | None:
        """Add a document to those collected; return the reason if it cannot be used."""
        if not document:
            return "nothing_to_predict"
        if self.options.data_format != "text" and self._names_controls(document):
            return "control_token_in_answer"
        shortened, reason = self._fit(document)
        if reason is None:
            counts.num_truncated += shortened
            to.add(document)
        return reason

    def _names_controls(self, document: list[TrainedIds]) -> bool:
        """Return whether an answer contains a control token that would be trained as one.

        That is its end token, or any where no template writes them.
        """
        ends = set(self.form.end_ids)
        for position, (ids, is_response) in enumerate(document):
            if is_response and not self.specials.isdisjoint(ids[:-1]):
                inside = (set(ids[:-1]) & self.specials) - {
                    self.tokenizer.unk_id,
                    self.tokenizer.bos_id if position == 0 else None,
                }
                if inside & ends or (inside and self.form.name != CHAT):
                    return True
        return False

    def _fit(self, document: list[TrainedIds]) -> tuple[bool, str | None]:
        """Truncate a document (in position) to the length of a sample.

        Return whether it was truncated, and the reason if it is then useless.
        """
        limit, truncated = self.options.seq_length, False
        if (
            limit is not None
            and self.options.data_format != "text"
            and sum(len(ids) for ids, _ in document) > limit + 1
        ):
            if self.options.too_long == "skip":
                return False, "too_long"
            truncated, room, position = True, limit + 1, 0
            while room > len(document[position][0]):
                room -= len(document[position][0])
                position += 1
            document[position] = (document[position][0][:room], document[position][1])
            del document[position + 1 :]
        # the first token of a document is never predicted
        num_trained = sum(len(ids) for ids, is_response in document if is_response) - document[0][1]
        if num_trained > 0:
            return truncated, None
        return truncated, "response_cut_away" if truncated else "nothing_to_predict"

    def _is_valid(self, key: str) -> bool:
        """Return whether a sample belongs to the validation set, by its text alone.

        So copies of one sample are never in both sets, and adding data moves no sample.
        """
        if not self.options.valid_fraction:
            return False
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.options.valid_fraction * 2**64


def usable_spans(block: Block, reader: SampleReader) -> Iterator[TextSpan]:
    """Yield the spans of every usable sample of a block."""
    for _, record, reason in records(block):
        with contextlib.suppress(BrokenSampleError, SkippedConversationError, UnicodeEncodeError):
            if reason is None:
                sample = reader.read(record)
                sample.key.encode()
                yield from (span for spans in sample.documents for span in spans)


_encoder: Encoder | None = None


def start_worker(options: EncodeOptions) -> None:
    """Load the tokenizer of a worker process."""
    global _encoder
    _encoder = Encoder(options)


def encode_in_worker(block: Block) -> Encoded:
    """Return the documents of one block, in a worker process."""
    assert _encoder is not None
    return _encoder.encode(block)
