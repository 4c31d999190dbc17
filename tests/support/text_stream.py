"""Windows of a stream of documents, cut up by plain PyTorch and by our reader."""

import tempfile
from itertools import pairwise

import numpy as np
import torch

from megatron_sorted.data.batches import Batch, collate
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.text_samples import DocumentMasks, TextSamples
from megatron_sorted.settings.run import Settings

EOD = 7
APART = DocumentMasks(
    reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True, eod_id=EOD
)


def find_documents(tokens_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return document number, position and loss mask of each token of a window.

    They follow Megatron-LM's flags: an end-of-document token belongs to the document it ends, the
    next token begins another, and a position whose input it is does not train.
    """
    document, position, tokens = 0, 0, []
    for token in tokens_s.tolist():
        tokens.append((document, position, float(token != EOD)))
        document, position = (document + 1, 0) if token == EOD else (document, position + 1)
    documents, positions, mask = zip(*tokens, strict=True)
    return torch.tensor(documents), torch.tensor(positions), torch.tensor(mask)


def stream_samples(
    num_samples: int, seq_length: int, vocabulary: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return consecutive windows [n, s] of a random stream: tokens, labels, loss mask, segments."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, vocabulary, (num_samples * seq_length + 1,), generator=generator)
    stream[torch.rand(stream.shape, generator=generator) < 0.2] = EOD
    tokens = stream[:-1].view(num_samples, seq_length)
    segments, _, mask = zip(*map(find_documents, tokens), strict=True)
    return {
        "tokens": tokens,
        "labels": stream[1:].view(num_samples, seq_length),
        "mask": torch.stack(mask),
        "segments": torch.stack(segments),
    }


def write_documents(prefix: str, stream: list[int], eod: int = EOD) -> str:
    """Write a stream as an indexed file, documents ending at ``eod``; return the prefix."""
    ends = [place + 1 for place, token in enumerate(stream) if token == eod]
    lengths = [end - begin for begin, end in pairwise([0, *ends, len(stream)]) if end > begin]
    with IndexedWriter(prefix, np.uint16, with_modes=False) as writer:
        writer.append(
            Documents(
                np.array(stream),
                np.array(lengths),
                np.ones(len(lengths), np.int8),
                np.ones(len(lengths), np.int32),
            )
        )
    return prefix


def stream_batches(
    samples: dict[str, torch.Tensor], settings: Settings, data_rank: int, data_size: int
) -> list[Batch]:
    """Return a rank's micro-batches of the stream as our reader gives them from an indexed file."""
    with tempfile.TemporaryDirectory() as folder:
        stream = [*samples["tokens"].flatten().tolist(), int(samples["labels"][-1, -1])]
        corpus = Corpus([write_documents(f"{folder}/stream", stream)])
        source = TextSamples(
            corpus, settings.seq_length, settings.vocab_size, 0, 0, evaluation=True, masks=APART
        )
        read = [source.sample(number) for number in range(source.samples_per_epoch)]
    size, num_samples = settings.micro_batch_size, samples["tokens"].size(0)
    starts = range(data_rank * size, num_samples, size * data_size)
    return [collate(read[start : start + size]) for start in starts]
