"""The contract of every source of samples: samples by global number, each one window of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One window of ``seq_length`` positions.

    Shapes:
        tokens_s, labels_s: (seq_length,) int64; ``labels_s[i]`` follows ``tokens_s[i]``.
        loss_mask_s: (seq_length,) float32; 1 where the label is trained on.
        segments_s: (seq_length,) int32; the number of the piece (packed document) from 0; padding
            has the next number.
        positions_s: (seq_length,) int64. None: they start again at 0 with each piece, if there are
            several.
    """

    tokens_s: np.ndarray
    labels_s: np.ndarray
    loss_mask_s: np.ndarray
    segments_s: np.ndarray
    num_pieces: int
    positions_s: np.ndarray | None = None


def empty_sample(seq_length: int, pad_id: int) -> Sample:
    """Return a sample of padding only, whose loss does not count."""
    tokens = np.full(seq_length, pad_id, np.int64)
    return Sample(
        tokens, tokens.copy(), np.zeros(seq_length, np.float32), np.zeros(seq_length, np.int32), 0
    )


class SampleSource(ABC):
    """Samples by global number >= 0, without end.

    Attributes:
        samples_per_epoch: The number of samples in one pass over the data.
        fill: The fraction of all positions that hold tokens, not padding.
        packs: Whether a sample may hold several documents that must not attend to each other.
    """

    samples_per_epoch: int
    seq_length: int
    pad_id: int
    fill: float = 1.0
    packs: bool = False

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Return one sample."""

    @abstractmethod
    def describe(self) -> str:
        """Return the amount of data, for the log.

        It is one line, or for a blend a first line for all and one for each source.
        """

    def epoch_at(self, sample: int) -> float:
        """Return how many passes over the data the first ``sample`` samples are."""
        return sample / self.samples_per_epoch


def check_ids(text: np.ndarray, vocab_size: int, corpus: Corpus, numbers: Sequence[int]) -> None:
    """Check that all tokens of a window, cut from the documents ``numbers``, are in the vocabulary.

    Raises:
        DataError: One is not; the message names its document.
    """
    if 0 <= text.min() <= text.max() < vocab_size:
        return
    for number in numbers:
        tokens = corpus.document(number)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            wrong = int(tokens.max() if tokens.max() >= vocab_size else tokens.min())
            raise DataError(
                f"{corpus.name_of(number)}: token {wrong} is outside the model's vocabulary of "
                f"{vocab_size}. Use the tokenizer the data was prepared with, or prepare the data "
                "again."
            )
