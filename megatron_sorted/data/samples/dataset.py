"""Samples by global number: the same for every layout of processes, and after every restart.

Sample ``i`` belongs to epoch ``i // samples_per_epoch``; the order of an epoch depends on (seed,
epoch) only. Each rank reads only its own samples from the mapped file, without communication.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.packing import assign_epoch, lay_out, random_keys
from megatron_sorted.data.samples.sample import Sample, SampleSource, check_ids, empty_sample
from megatron_sorted.data.samples.text_samples import DocumentMasks, TextSamples
from megatron_sorted.errors import DataError

SAMPLE_ORDER = 1
"""Version of the order. It increases when the same data and seed give other samples: a checkpoint
of an older order cannot be resumed exactly.
"""
EVALUATION_SEED = 0
"""Seed of evaluation sets, which do not change with --seed: runs must be comparable."""


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


class InstructionSamples(SampleSource):
    """Whole documents packed into windows; loss only where a response token is predicted.

    A document of n tokens takes n - 1 positions (its last token is only ever a label), so
    ``seq_length`` positions hold documents of up to ``seq_length + 1`` tokens. Documents of a
    single token predict nothing and are left out.
    """

    packs = True

    def __init__(self, corpus: Corpus, seq_length: int, vocab_size: int, pad_id: int, seed: int):
        self.corpus, self.seq_length = corpus, seq_length
        self.vocab_size, self.pad_id, self.seed = vocab_size, pad_id, seed
        self._numbers = np.flatnonzero(corpus.lengths >= 2)
        self._positions = corpus.lengths[self._numbers] - 1
        if not self._numbers.size:
            raise DataError(
                f"{', '.join(corpus.prefixes)}: no documents to train on ({corpus.num_documents} "
                "in this share). Give more data."
            )
        too_long = self._numbers[self._positions > seq_length]
        if too_long.size:
            raise DataError(
                f"{corpus.name_of(too_long[0])} has {corpus.lengths[too_long[0]]} tokens, but "
                f"--seq-length {seq_length} holds at most {seq_length + 1} ({too_long.size} such "
                f"documents; longest {corpus.lengths.max()}). Prepare the data with --seq-length "
                f"{seq_length}, or raise --seq-length."
            )
        self._layout = lay_out(self._positions, seq_length)
        self.samples_per_epoch = self._layout.num_windows
        self.fill = float(self._positions.sum() / (self.samples_per_epoch * seq_length))
        # only one epoch is cached: samples are read in increasing order, and an epoch of 10^8
        # documents takes 1.6 GB
        self._epoch = lru_cache(maxsize=1)(
            lambda epoch: assign_epoch(self._layout, self._positions, seed, epoch)
        )

    def describe(self) -> str:
        """Return documents, windows and fill in one line."""
        return (
            f"{self._numbers.size} documents in {self.samples_per_epoch} samples of "
            f"{self.seq_length} positions, {100 * self.fill:.1f} % filled"
        )

    def sample(self, index: int) -> Sample:
        """Return one packed window."""
        order, starts = self._epoch(index // self.samples_per_epoch)
        window = index % self.samples_per_epoch
        sample = empty_sample(self.seq_length, self.pad_id)
        members = self._numbers[order[starts[window] : starts[window + 1]]]
        documents = [self.corpus.document(number) for number in members]
        check_ids(np.concatenate(documents), self.vocab_size, self.corpus, members)
        begin = 0
        for piece, (number, tokens) in enumerate(zip(members, documents, strict=True)):
            end = begin + len(tokens) - 1
            sample.tokens_s[begin:end] = tokens[:-1]
            sample.labels_s[begin:end] = tokens[1:]
            sample.loss_mask_s[begin:end] = self.corpus.trained(number)[1:]
            sample.segments_s[begin:end] = piece
            begin = end
        sample.segments_s[begin:] = len(members)
        return replace(sample, num_pieces=len(members))


class MockSamples(SampleSource):
    """Random tokens, each sample drawn from (seed, index)."""

    def __init__(self, seq_length: int, vocab_size: int, seed: int, samples_per_epoch: int):
        self.seq_length, self.vocab_size, self.pad_id, self.seed = seq_length, vocab_size, 0, seed
        self.samples_per_epoch = samples_per_epoch

    def describe(self) -> str:
        """Return that the tokens are random."""
        return (
            f"random tokens, vocabulary {self.vocab_size}, samples of {self.seq_length} positions"
        )

    def sample(self, index: int) -> Sample:
        """Return one window of random tokens."""
        text = (
            random_keys(self.seq_length + 1, self.seed, index) % np.uint64(self.vocab_size)
        ).astype(np.int64)
        return Sample(
            text[:-1],
            text[1:],
            np.ones(self.seq_length, np.float32),
            np.zeros(self.seq_length, np.int32),
            1,
        )


def open_samples(
    corpus: Corpus,
    seq_length: int,
    vocab_size: int,
    pad_id: int,
    seed: int,
    evaluation: bool = False,
    masks: DocumentMasks | None = None,
) -> SampleSource:
    """Open the source that fits the data: packed instructions if there are modes, else text.

    Args:
        corpus: The documents.
        seq_length: The number of positions of a sample.
        vocab_size: The number of tokens of the model; others are an error when their sample is
            read.
        pad_id: The token that fills unused positions.
        seed: The seed of the order of training samples.
        evaluation: Whether the samples are one pass in the file's order.
        masks: How documents of text share a window; packed instructions are always separate.
    """
    if evaluation:
        seed = EVALUATION_SEED
    if corpus.has_modes:
        return InstructionSamples(corpus, seq_length, vocab_size, pad_id, seed)
    return TextSamples(corpus, seq_length, vocab_size, pad_id, seed, evaluation, masks)
