"""Samples by global number: the same for every layout of processes, and after every restart.

Sample ``i`` belongs to epoch ``i // samples_per_epoch``; an epoch's order depends on (seed, epoch) only. Each rank reads just its
own samples from the mapped file, so nothing is communicated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sorted.data.corpus import Corpus
from megatron_sorted.data.packing import assign_epoch, lay_out, random_keys, shuffled
from megatron_sorted.errors import DataError

SAMPLE_ORDER = 1  # goes up when the same data and seed give other samples: a checkpoint of the old order cannot be continued exactly
EVALUATION_SEED = 0  # evaluation sets do not change with --seed: runs must be comparable


@dataclass(frozen=True)
class Sample:
    """One window of ``seq_length`` positions.

    Shapes:
        tokens_s, labels_s: (seq_length,) int64; ``labels_s[i]`` follows ``tokens_s[i]`` in the same document.
        loss_mask_s: (seq_length,) float32; 1 where the label is trained on.
        segments_s: (seq_length,) int32; number of the piece (packed document) from 0; padding has the next number.
    """

    tokens_s: np.ndarray
    labels_s: np.ndarray
    loss_mask_s: np.ndarray
    segments_s: np.ndarray
    num_pieces: int


def empty_sample(seq_length: int, pad_id: int) -> Sample:
    """Returns a sample that is all padding and counts nowhere."""
    tokens = np.full(seq_length, pad_id, np.int64)
    return Sample(tokens, tokens.copy(), np.zeros(seq_length, np.float32), np.zeros(seq_length, np.int32), 0)


class SampleSource(ABC):
    """Samples by global number >= 0, without end.

    Attributes:
        samples_per_epoch: Samples of one pass over the data.
        fill: Part of all positions that hold tokens, not padding.
        packs: Whether a sample may hold several documents that must not see each other.
    """

    samples_per_epoch: int
    seq_length: int
    pad_id: int
    fill: float = 1.0
    packs: bool = False

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Returns one sample."""

    @abstractmethod
    def describe(self) -> str:
        """Returns how much there is, for the log: a line, or one for each source of a blend after a first for all."""

    def epoch_at(self, sample: int) -> float:
        """Returns how many passes over the data the first ``sample`` samples are."""
        return sample / self.samples_per_epoch


class EvaluationSet(Sequence):
    """Exactly one pass over a source, as a sequence of samples."""

    def __init__(self, source: SampleSource):
        self.source = source

    def __len__(self) -> int:
        return self.source.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source.sample(index)


def _check_ids(text: np.ndarray, vocab_size: int, corpus: Corpus, numbers: Sequence[int]) -> None:
    """Returns nothing if all tokens of a window, cut from the documents ``numbers``, are in the vocabulary; else names a document."""
    if 0 <= text.min() <= text.max() < vocab_size:
        return
    for number in numbers:
        tokens = corpus.document(number)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            wrong = int(tokens.max() if tokens.max() >= vocab_size else tokens.min())
            raise DataError(f"{corpus.name_of(number)}: token {wrong} is outside the model's vocabulary of {vocab_size}. "
                            "Use the tokenizer the data was prepared with, or prepare the data again.")


class InstructionSamples(SampleSource):
    """Whole documents packed into windows; loss only where a response token is predicted.

    A document of n tokens takes n - 1 positions (its last token is only ever a label), so ``seq_length`` positions hold documents of
    up to ``seq_length + 1`` tokens. Documents of a single token predict nothing and are left out.
    """

    packs = True

    def __init__(self, corpus: Corpus, seq_length: int, vocab_size: int, pad_id: int, seed: int):
        self.corpus, self.seq_length, self.vocab_size, self.pad_id, self.seed = corpus, seq_length, vocab_size, pad_id, seed
        self._numbers = np.flatnonzero(corpus.lengths >= 2)
        self._positions = corpus.lengths[self._numbers] - 1
        if not self._numbers.size:
            raise DataError(f"{', '.join(corpus.prefixes)}: no documents to train on ({corpus.num_documents} in this share). "
                            "Give more data.")
        too_long = self._numbers[self._positions > seq_length]
        if too_long.size:
            raise DataError(f"{corpus.name_of(too_long[0])} has {corpus.lengths[too_long[0]]} tokens, but --seq-length {seq_length} "
                            f"holds at most {seq_length + 1} ({too_long.size} such documents; longest {corpus.lengths.max()}). "
                            f"Prepare the data with --seq-length {seq_length}, or raise --seq-length.")
        self._layout = lay_out(self._positions, seq_length)
        self.samples_per_epoch = self._layout.num_windows
        self.fill = float(self._positions.sum() / (self.samples_per_epoch * seq_length))
        # one epoch is kept, not more: samples are asked for in rising order, and an epoch of 10^8 documents takes 1.6 GB
        self._epoch = lru_cache(maxsize=1)(lambda epoch: assign_epoch(self._layout, self._positions, seed, epoch))

    def describe(self) -> str:
        """Returns documents, windows and fill in one line."""
        return (f"{self._numbers.size} documents in {self.samples_per_epoch} samples of {self.seq_length} positions, "
                f"{100 * self.fill:.1f} % filled")

    def sample(self, index: int) -> Sample:
        """Returns one packed window."""
        order, starts = self._epoch(index // self.samples_per_epoch)
        window = index % self.samples_per_epoch
        sample = empty_sample(self.seq_length, self.pad_id)
        members = self._numbers[order[starts[window] : starts[window + 1]]]
        documents = [self.corpus.document(number) for number in members]
        _check_ids(np.concatenate(documents), self.vocab_size, self.corpus, members)
        at = 0
        for piece, (number, tokens) in enumerate(zip(members, documents, strict=True)):
            end = at + len(tokens) - 1
            sample.tokens_s[at:end] = tokens[:-1]
            sample.labels_s[at:end] = tokens[1:]
            sample.loss_mask_s[at:end] = self.corpus.trained(number)[1:]
            sample.segments_s[at:end] = piece
            at = end
        sample.segments_s[at:] = len(members)
        return Sample(sample.tokens_s, sample.labels_s, sample.loss_mask_s, sample.segments_s, len(members))


class TextSamples(SampleSource):
    """Documents one after another, cut every ``seq_length`` tokens; every token is predicted.

    Training shuffles documents and windows and drops what is left at the end of an epoch; evaluation keeps the file's order and pads.
    """

    def __init__(self, corpus: Corpus, seq_length: int, vocab_size: int, pad_id: int, seed: int, evaluation: bool = False):
        self.corpus, self.seq_length, self.vocab_size, self.pad_id, self.seed = corpus, seq_length, vocab_size, pad_id, seed
        self.evaluation = evaluation
        self.num_tokens = int(corpus.lengths.sum())
        whole, rest = divmod(self.num_tokens - 1, seq_length)
        self.samples_per_epoch = whole + (evaluation and rest > 0)
        if self.samples_per_epoch < 1:
            raise DataError(f"{', '.join(corpus.prefixes)}: {self.num_tokens} tokens in this share are too few for one sample of "
                            f"--seq-length {seq_length} (it takes {seq_length + 1}). Give more data or lower --seq-length.")
        self.fill = (self.num_tokens - 1) / (self.samples_per_epoch * seq_length) if evaluation else 1.0
        self._epoch = lru_cache(maxsize=1)(self._arrange)

    def describe(self) -> str:
        """Returns documents, tokens and windows in one line."""
        return (f"{self.corpus.num_documents} documents, {self.num_tokens} tokens in {self.samples_per_epoch} samples of "
                f"{self.seq_length} positions")

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.evaluation:
            order, windows = np.arange(self.corpus.num_documents), np.arange(self.samples_per_epoch)
        else:
            order = shuffled(self.corpus.num_documents, self.seed, epoch, 0)
            windows = shuffled(self.samples_per_epoch, self.seed, epoch, 1)
        return order, np.concatenate([[0], np.cumsum(self.corpus.lengths[order])]), windows

    def sample(self, index: int) -> Sample:
        """Returns one window of the concatenated documents."""
        order, starts, windows = self._epoch(index // self.samples_per_epoch)
        begin = int(windows[index % self.samples_per_epoch]) * self.seq_length
        end = min(begin + self.seq_length + 1, self.num_tokens)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        members = order[first : int(np.searchsorted(starts, end, side="left"))]
        # cut before they are joined: a document may be far longer than a window
        parts = [self.corpus.document(number)[max(0, begin - at) : end - at]
                 for number, at in zip(members, starts[first : first + len(members)].tolist(), strict=True)]
        text = np.concatenate(parts).astype(np.int64)
        _check_ids(text, self.vocab_size, self.corpus, members)
        sample = empty_sample(self.seq_length, self.pad_id)
        count = len(text) - 1
        sample.tokens_s[:count], sample.labels_s[:count], sample.loss_mask_s[:count] = text[:-1], text[1:], 1
        sample.segments_s[count:] = 1
        return Sample(sample.tokens_s, sample.labels_s, sample.loss_mask_s, sample.segments_s, 1)


class MockSamples(SampleSource):
    """Made-up tokens, each sample from (seed, index)."""

    def __init__(self, seq_length: int, vocab_size: int, seed: int, samples_per_epoch: int):
        self.seq_length, self.vocab_size, self.pad_id, self.seed = seq_length, vocab_size, 0, seed
        self.samples_per_epoch = samples_per_epoch

    def describe(self) -> str:
        """Returns that the data is made up."""
        return f"made-up tokens, vocabulary {self.vocab_size}, samples of {self.seq_length} positions"

    def sample(self, index: int) -> Sample:
        """Returns one window of random tokens."""
        text = (random_keys(self.seq_length + 1, self.seed, index) % np.uint64(self.vocab_size)).astype(np.int64)
        return Sample(text[:-1], text[1:], np.ones(self.seq_length, np.float32), np.zeros(self.seq_length, np.int32), 1)


def open_samples(corpus: Corpus, seq_length: int, vocab_size: int, pad_id: int, seed: int, evaluation: bool = False) -> SampleSource:
    """Returns the source that fits the kind of data: packed instructions where modes are present, else running text."""
    if evaluation:
        seed = EVALUATION_SEED
    if corpus.has_modes:
        return InstructionSamples(corpus, seq_length, vocab_size, pad_id, seed)
    return TextSamples(corpus, seq_length, vocab_size, pad_id, seed, evaluation)
