"""How a document longer than the model's sequence is cut, and how windows are put into batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.evaluation.documents import EncodedDocument


@dataclass(frozen=True)
class Window:
    """Tokens first .. last - 1 of a document are read; tokens first_target .. last are predicted and counted here."""

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

    A window reads up to ``seq_length`` tokens; the next one starts ``stride`` tokens later. With ``stride == seq_length`` they do not
    overlap, and a window's first token is predicted from one token only; with less every token but the first ones has at least
    ``seq_length - stride`` tokens before it.
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
    """Return the windows of all documents in which something is counted, in order."""
    return [
        window
        for place, document in enumerate(documents)
        for window in cut_windows(len(document.ids) - 1, seq_length, stride, place)
        if any(document.counted[window.first_target : window.last + 1])
    ]


def batch_windows(windows: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """Return batches of windows of similar length, the longest first, of at most ``batch_tokens`` tokens with padding."""
    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda window: -window.num_read):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].num_read > batch_tokens:
            batches.append([])
        batches[-1].append(window)
    return batches
