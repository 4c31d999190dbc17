"""One tiny model and its data, for tests."""

import dataclasses
import os

import torch

from megatron_sorted.data.batches import Batch
from megatron_sorted.data.samples.dataset import InstructionSamples
from megatron_sorted.data.samples.sample import Sample
from megatron_sorted.settings.run import Settings
from tests.support.text_stream import stream_batches, stream_samples

VOCABULARY = 100

TINY = Settings(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    seq_length=16,
    vocab_size=VOCABULARY,
    make_vocab_size_divisible_by=8,
    exit_layer_nums=(1, 2, 3),
    mock_data=True,
    device="cpu",
    micro_batch_size=2,
    global_batch_size=8,
    train_iters=100,
    lr=1e-2,
    lr_decay_style="constant",
    weight_decay=0.1,
    clip_grad=1.0,
    # a tiny epsilon would turn rounding of near-zero gradients into whole steps
    adam_eps=1e-4,
    exit_loss_chunk_tokens=7,
    init_method_std=0.1,
    seed=3,
)


def tiny(**changes) -> Settings:
    """Return the tiny run with other settings."""
    return dataclasses.replace(TINY, **changes)


def make_samples(
    num_samples: int, seq_length: int, seed: int, unequal: bool = False, packed: bool | str = False
) -> dict[str, torch.Tensor]:
    """Return samples [n, s]: tokens, labels, loss mask and segments.

    ``unequal`` gives them very different numbers of trained tokens, ``packed`` several documents
    each; "text" makes them windows of a stream of documents (``tests.support.text_stream``).
    """
    if packed == "text":
        return stream_samples(num_samples, seq_length, VOCABULARY, seed)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCABULARY, (num_samples, seq_length + 1), generator=generator)
    mask = torch.ones(num_samples, seq_length)
    segments = torch.zeros(num_samples, seq_length, dtype=torch.int32)
    for n in range(num_samples):
        if unequal:
            mask[n, : 1 + (5 * n) % seq_length] = 0.0
        if packed:
            cut = 3 + n % (seq_length - 6)
            segments[n, cut:] = 1
            mask[n, cut - 1] = 0.0
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "mask": mask,
        "segments": segments,
    }


def micro_batches(
    samples: dict[str, torch.Tensor],
    settings: Settings,
    data_rank: int,
    data_size: int,
    packed: bool | str = False,
) -> list[Batch]:
    """Return a rank's micro-batches of one global batch, in Megatron's order."""
    if packed == "text":
        return stream_batches(samples, settings, data_rank, data_size)
    size, batches = settings.micro_batch_size, []
    for start in range(0, samples["tokens"].size(0), size * data_size):
        rows = slice(start + data_rank * size, start + (data_rank + 1) * size)
        segments = samples["segments"][rows]
        positions = torch.arange(segments.size(1)).expand(segments.shape)
        tokens, labels, mask = (samples[name][rows] for name in ("tokens", "labels", "mask"))
        batches.append(Batch(tokens, labels, mask, segments if packed else None, positions))
    return batches


def init_method() -> str:
    """Return how the ranks of a test find each other."""
    return os.environ["TEST_INIT_METHOD"]


def instruction_samples(num_samples: int = 11) -> dict[str, torch.Tensor]:
    """Return packed samples [n, s] with few trained tokens a document, half of them labelled 7."""
    samples = make_samples(num_samples, TINY.seq_length, 77, packed=True)
    generator = torch.Generator().manual_seed(78)
    samples["mask"] = (torch.rand(samples["tokens"].shape, generator=generator) < 0.15).float()
    samples["mask"][4] = 0  # one without a trained token: it is in no mean
    samples["labels"] = torch.where(
        torch.rand(samples["tokens"].shape, generator=generator) < 0.5, 7, samples["labels"]
    )
    return samples


class InstructionSource(InstructionSamples):
    """The samples above as an evaluation set's source."""

    def __init__(self):
        self.table = instruction_samples()
        self.samples_per_epoch, self.seq_length, self.pad_id = (
            self.table["tokens"].size(0),
            TINY.seq_length,
            0,
        )

    def sample(self, index: int) -> Sample:
        """Return one of the samples."""
        rows = {name: tensor[index].numpy() for name, tensor in self.table.items()}
        return Sample(
            rows["tokens"],
            rows["labels"],
            rows["mask"],
            rows["segments"],
            int(rows["segments"].max()) + 1,
        )
