"""Text documents one after another, cut into windows, and how documents share a window."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.packing import shuffled
from megatron_sorted.data.samples.sample import Sample, SampleSource, check_ids, empty_sample
from megatron_sorted.errors import DataError


@dataclass(frozen=True)
class DocumentMasks:
    """How documents of text share a window, by Megatron-LM's flags of these names.

    A document ends where the indexed file says, and after every ``eod_id`` inside one, as in
    Megatron-LM (``_get_ltor_masks_and_position_ids`` of its GPT dataset): the token belongs to the
    document that it ends.

    Attributes:
        reset_attention_mask: Whether tokens attend to their own document only.
        reset_position_ids: Whether positions start again at 0 with each document.
        eod_mask_loss: Whether a document's last token, from which the next document's first would
            be predicted, has no loss.
        eod_id: The end-of-document token; None if it is unknown, then only the file's documents
            count.
    """

    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    eod_id: int | None = None


class TextSamples(SampleSource):
    """Documents one after another, cut every ``seq_length`` tokens.

    Every token is predicted; ``masks`` decides about ends of documents. Training shuffles documents
    and windows and drops the rest at the end of an epoch; evaluation keeps the file's order and
    pads.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        vocab_size: int,
        pad_id: int,
        seed: int,
        evaluation: bool = False,
        masks: DocumentMasks | None = None,
    ):
        self.corpus, self.seq_length = corpus, seq_length
        self.vocab_size, self.pad_id, self.seed = vocab_size, pad_id, seed
        self.evaluation, self.masks = evaluation, masks or DocumentMasks()
        self.packs = self.masks.reset_attention_mask
        self.num_tokens = int(corpus.lengths.sum())
        whole, rest = divmod(self.num_tokens - 1, seq_length)
        self.samples_per_epoch = whole + (evaluation and rest > 0)
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{', '.join(corpus.prefixes)}: {self.num_tokens} tokens in this share are too "
                f"few for one sample of --seq-length {seq_length} (it takes {seq_length + 1}). "
                "Give more data or lower --seq-length."
            )
        self.fill = (
            (self.num_tokens - 1) / (self.samples_per_epoch * seq_length) if evaluation else 1.0
        )
        self._epoch = lru_cache(maxsize=1)(self._arrange)

    def describe(self) -> str:
        """Return documents, tokens and windows in one line, and how documents share a window."""
        masks, separate = self.masks, self.masks.reset_attention_mask
        traits = [
            "documents of a sample are separate" if separate else "documents see those before them"
        ]
        if masks.reset_position_ids != separate:
            traits.append(
                "positions run through the sample"
                if separate
                else "positions start again with each"
            )
        if masks.eod_mask_loss != separate:
            traits.append(f"the next one's first token is {'' if separate else 'not '}predicted")
        return (
            f"{self.corpus.num_documents} documents, {self.num_tokens} tokens in "
            f"{self.samples_per_epoch} samples of {self.seq_length} positions; {', '.join(traits)}"
        )

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.evaluation:
            order, windows = np.arange(self.corpus.num_documents), np.arange(self.samples_per_epoch)
        else:
            order = shuffled(self.corpus.num_documents, self.seed, epoch, 0)
            windows = shuffled(self.samples_per_epoch, self.seed, epoch, 1)
        return order, np.concatenate([[0], np.cumsum(self.corpus.lengths[order])]), windows

    def sample(self, index: int) -> Sample:
        """Return one window of the concatenated documents."""
        order, starts, windows = self._epoch(index // self.samples_per_epoch)
        begin = int(windows[index % self.samples_per_epoch]) * self.seq_length
        end = min(begin + self.seq_length + 1, self.num_tokens)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        members = order[first : int(np.searchsorted(starts, end, side="left"))]
        # cut before joining: a document may be far longer than a window
        parts = [
            self.corpus.document(number)[max(0, begin - start) : end - start]
            for number, start in zip(
                members, starts[first : first + len(members)].tolist(), strict=True
            )
        ]
        text = np.concatenate(parts).astype(np.int64)
        check_ids(text, self.vocab_size, self.corpus, members)
        sample = empty_sample(self.seq_length, self.pad_id)
        count = len(text) - 1
        sample.tokens_s[:count], sample.labels_s[:count], sample.loss_mask_s[:count] = (
            text[:-1],
            text[1:],
            1,
        )
        sample.segments_s[count:] = 1
        if not (
            self.masks.reset_attention_mask
            or self.masks.reset_position_ids
            or self.masks.eod_mask_loss
        ):
            return replace(sample, num_pieces=1)
        return self._mask(sample, count, self._documents(text, [len(part) for part in parts]))

    def _mask(self, sample: Sample, count: int, documents: np.ndarray) -> Sample:
        """Return a window in which the masks separate documents.

        Args:
            sample: The window without masks; its arrays are filled.
            count: The number of positions that hold tokens.
            documents: The number of the document of each of them and of the last label (count +
                1,).
        """
        masks, positions = self.masks, np.arange(self.seq_length)
        if masks.eod_mask_loss:
            sample.loss_mask_s[:count] = documents[:-1] == documents[1:]
        if masks.reset_position_ids:
            starts = np.flatnonzero(np.diff(documents[:-1], prepend=-1))
            positions[:count] -= np.repeat(starts, np.diff(starts, append=count))
        pieces = 1
        if masks.reset_attention_mask:
            sample.segments_s[:count], pieces = documents[:-1], int(documents[-2]) + 1
            sample.segments_s[count:] = pieces
        return replace(sample, num_pieces=pieces, positions_s=positions)

    def _documents(self, text: np.ndarray, lengths: list[int]) -> np.ndarray:
        """Return the number, from 0, of the document that each token of a window belongs to.

        Args:
            text: The window's tokens (t,).
            lengths: The numbers of tokens that come from each of the file's documents.
        """
        begins = np.zeros(len(text), bool)
        ends = np.cumsum(lengths)[:-1]
        begins[ends[(ends > 0) & (ends < len(text))]] = True
        if self.masks.eod_id is not None:
            begins[1:] |= text[:-1] == self.masks.eod_id
        return np.cumsum(begins)
