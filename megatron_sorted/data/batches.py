"""Micro-batches as torch tensors; each rank takes its own from the global order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from megatron_sorted.data.samples.blend import BlendedSamples, BlendPart
from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.dataset import (
    EVALUATION_SEED,
    EvaluationSet,
    MockSamples,
    open_samples,
)
from megatron_sorted.data.samples.sample import Sample, SampleSource, empty_sample
from megatron_sorted.data.samples.text_samples import DocumentMasks
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.settings.derived import (
    data_blend,
    data_prefixes,
    document_masks,
    samples_per_step,
    split_ranges,
)
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import fitting_pad, surplus_line


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        checksum: The sum over the samples of the CRC-32 of their tokens and labels (int64, little
            endian), kept on the host. Summed over the micro-batches of all data parallel ranks it
            identifies the samples of a step, however they were grouped.

    Shapes:
        tokens_bs, labels_bs: (micro batch, seq_length) int64.
        loss_mask_bs: The same, float32.
        positions_bs: The same, int64; starts again at 0 with each piece, or as its sample defines.
        pieces_bs: The same, int32: the number of the piece, with a number for padding. None where
            plain causal attention is correct: no sample holds more than one piece.
    """

    tokens_bs: torch.Tensor
    labels_bs: torch.Tensor
    loss_mask_bs: torch.Tensor
    pieces_bs: torch.Tensor | None
    positions_bs: torch.Tensor
    checksum: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the number of labels that are trained on."""
        return int(self.loss_mask_bs.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device."""
        moved = (
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (
                self.tokens_bs,
                self.labels_bs,
                self.loss_mask_bs,
                self.pieces_bs,
                self.positions_bs,
            )
        )
        return Batch(*moved, self.checksum)


def _checksum(sample: Sample) -> int:
    tokens, labels = (
        np.ascontiguousarray(part, "<i8") for part in (sample.tokens_s, sample.labels_s)
    )
    return crc32(labels, crc32(tokens))


def _positions(sample: Sample, packed: bool) -> np.ndarray:
    """Return the positions of a sample.

    With ``packed`` they start again with each piece, unless the sample has its own.
    """
    if sample.positions_s is not None:
        return sample.positions_s
    positions = np.arange(len(sample.segments_s))
    if packed:
        starts = np.flatnonzero(np.diff(sample.segments_s, prepend=-1))
        positions -= np.repeat(starts, np.diff(starts, append=len(positions)))
    return positions


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into one batch."""
    # one document followed by padding needs no numbers of pieces: attention is causal
    packed = any(sample.num_pieces > 1 for sample in samples)

    def stack(rows: Iterable[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(rows)))

    return Batch(
        tokens_bs=stack(sample.tokens_s for sample in samples),
        labels_bs=stack(sample.labels_s for sample in samples),
        loss_mask_bs=stack(sample.loss_mask_s for sample in samples),
        pieces_bs=stack(sample.segments_s for sample in samples) if packed else None,
        positions_bs=stack(_positions(sample, packed) for sample in samples),
        checksum=sum(map(_checksum, samples)),
    )


def _vocabulary(settings: Settings, tokenizer_or_vocab: Tokenizer | int | None) -> tuple[int, int]:
    """Return the size of the model's vocabulary and the padding token."""
    given = (
        tokenizer_or_vocab
        if isinstance(tokenizer_or_vocab, int | None)
        else tokenizer_or_vocab.vocab_size
    )
    vocab_size = settings.vocab_size or given
    if not vocab_size:
        raise SettingsError(
            "--vocab-size: the vocabulary is unknown without a tokenizer. Give --tokenizer-model "
            "or --vocab-size."
        )
    if isinstance(tokenizer_or_vocab, Tokenizer):
        surplus_line(tokenizer_or_vocab, vocab_size, "--vocab-size")
        return vocab_size, fitting_pad(tokenizer_or_vocab, vocab_size)
    if given is not None and given > vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the tokenizer has {given} tokens, which do not fit. "
            f"Leave --vocab-size out or give at least {given}."
        )
    return vocab_size, 0


def make_document_masks(settings: Settings, tokenizer: Tokenizer | None) -> DocumentMasks:
    """Return how documents of text share a sample.

    Without a tokenizer they end where the indexed file says, and nowhere else.
    """
    return DocumentMasks(
        **document_masks(settings), eod_id=None if tokenizer is None else tokenizer.eos_id
    )


def open_train_samples(
    settings: Settings,
    tokenizer_or_vocab: Tokenizer | int | None,
    masks: DocumentMasks | None = None,
) -> SampleSource:
    """Open the training samples that the settings name.

    They are the first share of ``--split`` of each file, or all of it with --valid-data-path. Files
    without weights are one set of documents, each seen once per epoch. In a blend each file is
    packed and shuffled by itself.

    Args:
        settings: The run.
        tokenizer_or_vocab: The tokenizer of the data, or the number of tokens.
        masks: How documents of text share a sample. By default the settings decide, and ends of
            documents come from the files alone.
    """
    masks = masks or make_document_masks(settings, None)
    vocab_size, pad_id = _vocabulary(settings, tokenizer_or_vocab)
    if settings.mock_data:
        return MockSamples(
            settings.seq_length, vocab_size, settings.seed, samples_per_epoch=1 << 40
        )
    if not settings.data_path:
        raise SettingsError(
            "--data-path: no training data. Give the prefix that megatron-sorted prepare wrote, "
            "or --mock-data."
        )
    share = split_ranges(settings)[0]

    def opened(*prefixes: str) -> SampleSource:
        corpus = Corpus(prefixes, share)
        corpus.require_trained_tokens()
        return open_samples(
            corpus, settings.seq_length, vocab_size, pad_id, settings.seed, masks=masks
        )

    blend = data_blend(settings)
    if blend is None:
        return opened(*settings.data_path)
    return BlendedSamples([BlendPart(weight, prefix, opened(prefix)) for weight, prefix in blend])


def _batches(samples: Iterator[Sample], settings: Settings) -> Iterator[Batch]:
    micro_batch: list[Sample] = []
    for sample in samples:
        micro_batch.append(sample)
        if len(micro_batch) == settings.micro_batch_size:
            yield collate(micro_batch)
            micro_batch = []


def _own_indices(settings: Settings, dp_rank: int, dp_size: int, start: int) -> Iterator[int]:
    """Yield the numbers of this rank's samples without end, micro-batch by micro-batch.

    The order is Megatron's.
    """
    size, micro = samples_per_step(settings, dp_size), settings.micro_batch_size
    assert size % (micro * dp_size) == 0, "check_settings lets no other batch pass"
    while True:
        for first in range(start, start + size, micro * dp_size):
            yield from range(first + dp_rank * micro, first + (dp_rank + 1) * micro)
        start += size


def make_train_batches(
    settings: Settings,
    tokenizer_or_vocab: Tokenizer | int | None,
    dp_rank: int,
    dp_size: int,
    start_sample: int = 0,
    source: SampleSource | None = None,
) -> Iterator[Batch]:
    """Return this rank's micro-batches without end.

    They follow ``start_sample`` samples that were trained on over all ranks. Global batch g is
    samples ``start_sample + [g * G, (g + 1) * G)``; its micro-batch m on rank d takes the b samples
    from ``m * b * dp_size + d * b`` on. Ranks of one tensor or pipeline group pass the same
    ``dp_rank`` and get the same batches.
    """
    source = source or open_train_samples(settings, tokenizer_or_vocab)
    indices = _own_indices(settings, dp_rank, dp_size, start_sample)
    return _batches((source.sample(index) for index in indices), settings)


def make_eval_sets(
    settings: Settings,
    tokenizer_or_vocab: Tokenizer | int | None,
    masks: DocumentMasks | None = None,
) -> dict[str, EvaluationSet]:
    """Return the evaluation sets by name.

    They are each --valid-data-path, or the second share of --split (none if that is 0).
    """
    if settings.mock_data:
        vocab_size, _ = _vocabulary(settings, tokenizer_or_vocab)
        count = settings.eval_iters * samples_per_step(settings, 1)
        return {
            "mock": EvaluationSet(
                MockSamples(settings.seq_length, vocab_size, EVALUATION_SEED, count)
            )
        }
    return _held_out_sets(settings, tokenizer_or_vocab, masks, 1)


def make_test_sets(
    settings: Settings,
    tokenizer_or_vocab: Tokenizer | int | None,
    masks: DocumentMasks | None = None,
) -> dict[str, EvaluationSet]:
    """Return the sets for the end of the run by name.

    They are each --test-data-path, or the third share of --split (none if that is 0).
    """
    return {} if settings.mock_data else _held_out_sets(settings, tokenizer_or_vocab, masks, 2)


def _held_out_sets(
    settings: Settings,
    tokenizer_or_vocab: Tokenizer | int | None,
    masks: DocumentMasks | None,
    share: int,
) -> dict[str, EvaluationSet]:
    """Return a set of each given prefix.

    If none is given, it is a set of that share of each training file which holds documents.
    """
    flag, given = (
        ("--valid-data-path", settings.valid_data_path),
        ("--test-data-path", settings.test_data_path),
    )[share - 1]
    masks = masks or make_document_masks(settings, None)
    vocab_size, pad_id = _vocabulary(settings, tokenizer_or_vocab)
    part = (0.0, 1.0) if given else split_ranges(settings)[share]
    sets: dict[str, EvaluationSet] = {}
    for prefix in given or data_prefixes(settings):
        corpus = Corpus([prefix], part)
        if not given and not corpus.num_documents:
            continue
        name = Path(prefix).name.removesuffix("_text_document")
        if name in sets:
            raise SettingsError(
                f"{flag}: two sets are called {name!r} and could not be distinguished in reports. "
                "Rename one."
            )
        sets[name] = EvaluationSet(
            open_samples(
                corpus, settings.seq_length, vocab_size, pad_id, settings.seed, True, masks
            )
        )
    return sets


def make_eval_batches(
    settings: Settings,
    samples: EvaluationSet,
    dp_rank: int,
    dp_size: int,
    num_batches: int | None = None,
) -> Iterator[Batch]:
    """Return this rank's micro-batches of one pass, or of its first ``num_batches`` global batches.

    Every rank gets the same number. The last global batch is filled up with samples whose loss does
    not count.
    """
    size = samples_per_step(settings, dp_size)
    total = num_eval_batches(settings, samples, dp_size, num_batches) * size
    empty = empty_sample(settings.seq_length, samples.source.pad_id)

    def own() -> Iterator[Sample]:
        for index in _own_indices(settings, dp_rank, dp_size, 0):
            if index >= total:
                return
            yield samples[index] if index < len(samples) else empty

    return _batches(own(), settings)


def num_eval_batches(
    settings: Settings, samples: EvaluationSet, dp_size: int, num_batches: int | None = None
) -> int:
    """Return the number of global batches that :func:`make_eval_batches` yields."""
    whole = -(-len(samples) // samples_per_step(settings, dp_size))
    return whole if num_batches is None else min(whole, num_batches)
