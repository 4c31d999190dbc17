"""Windows of documents that are longer than a sequence, joined documents, and batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.evaluation.documents import EncodedDocument


@dataclass(frozen=True)
class Window:
    """A window of a document: tokens first..last - 1 are read, first_target..last are predicted."""

    document: int
    first: int
    last: int
    first_target: int

    @property
    def num_read(self) -> int:
        """Return how many tokens the model reads."""
        return self.last - self.first


def cut_windows(num_targets: int, seq_length: int, stride: int, document: int = 0) -> list[Window]:
    """Return windows that predict each of the tokens 1..num_targets exactly once.

    A window reads up to ``seq_length`` tokens; the next one starts ``stride`` tokens later. With
    ``stride == seq_length`` windows do not overlap, and the first token of a window is predicted
    from one token only. With a smaller stride every later token is predicted from at least
    ``seq_length - stride`` tokens.

    >>> [(window.first, window.last, window.first_target) for window in cut_windows(10, 6, 3)]
    [(0, 6, 1), (3, 9, 7), (6, 10, 10)]
    """
    windows, first, done = [], 0, 0
    while done < num_targets:
        last = min(first + seq_length, num_targets)
        windows.append(Window(document, first, last, done + 1))
        first, done = first + stride, last
    return windows


def cut_documents(
    documents: Sequence[EncodedDocument], seq_length: int, stride: int
) -> list[Window]:
    """Return the windows of all documents with counted tokens, in order."""
    return [
        window
        for number, document in enumerate(documents)
        for window in cut_windows(len(document.ids) - 1, seq_length, stride, number)
        if any(document.counted[window.first_target : window.last + 1])
    ]


def cut_whole_windows(documents: Sequence[EncodedDocument], seq_length: int) -> list[Window]:
    """Return the windows of ``cut_documents`` that do not overlap and have the full length."""
    return [
        window
        for window in cut_documents(documents, seq_length, seq_length)
        if window.num_read == seq_length
    ]


def join_documents(documents: Sequence[EncodedDocument], seq_length: int) -> list[EncodedDocument]:
    """Return all documents, one after another, as documents of one whole window each.

    Each begins with the last token of the one before, as windows of a long document do. A rest is
    left out. The tokens before documents (bos or eos) are read and not counted.
    """
    ids = [token for document in documents for token in document.ids]
    counted = [is_counted for document in documents for is_counted in document.counted]
    return [
        EncodedDocument(ids[first:end], [False, *counted[first + 1 : end]])
        for first in range(0, len(ids) - seq_length, seq_length)
        for end in (first + seq_length + 1,)
    ]


def batch_windows(windows: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """Return batches of windows of similar length, longest first.

    Each has at most ``batch_tokens`` tokens with padding, or a single window.
    """
    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda window: -window.num_read):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].num_read > batch_tokens:
            batches.append([])
        batches[-1].append(window)
    return batches
