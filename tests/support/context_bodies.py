"""The work of the processes in tests/ranks/test_context_parallel.py.

Attention across context parallel ranks is Transformer Engine's, so the program refuses such a run
on a CPU. These bodies leave that check out; a window of one token keeps attention within a rank.
"""

import torch
import torch.distributed as dist

from megatron_sorted.data.batches import Batch
from megatron_sorted.data.samples.dataset import EvaluationSet
from megatron_sorted.data.samples.sample import Sample
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.evaluate import Evaluator
from megatron_sorted.training.step.build import unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from tests.support import rank_bodies
from tests.support.tiny import make_samples


def _without_check() -> None:
    rank_bodies.check_platform = lambda _settings, _platform: None


def _without_pinned_memory() -> None:
    """Let Megatron slice angles here: it copies slices' numbers from memory for accelerators."""
    make = torch.tensor
    torch.tensor = lambda *values, pin_memory=False, **options: make(*values, **options)


def whole_batch(settings: Settings, data_rank: int) -> Batch:
    """Return the micro-batch of a data parallel rank, in which every element is unlike others."""
    size, length = settings.micro_batch_size, settings.seq_length
    first = torch.arange(size * length).view(size, length) + 1000 * data_rank
    return Batch(
        tokens_bs=first,
        labels_bs=first + 10_000,
        loss_mask_bs=1.0 + first.float() / 4096,
        pieces_bs=(first + 20_000).int(),
        positions_bs=first + 30_000,
        checksum=7 + data_rank,
    )


def parts_of_batch(settings: Settings) -> dict:
    """Return this rank's part of a micro-batch, as a training step makes it, and its angles."""
    _without_check()
    _without_pinned_memory()
    platform, place, model = rank_bodies.start(settings)
    chunk = unwrap(model.chunks[0])
    builder = ForwardStep(settings, model, platform).input_builder
    whole = whole_batch(settings, place.data_rank)
    micro, inputs = builder.build(whole, chunk, 1)
    length = inputs.batch.tokens_bs.size(1)
    return {
        "rank": dist.get_rank(),
        "data_rank": place.data_rank,
        "host": vars(micro.batch),
        "device": vars(inputs.batch),
        "labels": micro.targets.labels_n,
        "num_tokens": inputs.num_tokens.item(),
        "angles": chunk._rotary(length)[:, 0, 0],
        "frequencies": chunk.rotary_pos_emb.inv_freq,
        "whole": vars(whole),
    }


def train(settings: Settings, steps: int, unequal: bool) -> dict:
    """Return the report of ``train_and_report``."""
    _without_check()
    return rank_bodies.train_and_report(settings, steps, unequal, False)


class UnequalSource:
    """Evaluation samples with very different numbers of trained tokens, one document each."""

    pad_id = 0

    def __init__(self, settings: Settings):
        self.samples_per_epoch, self.seq_length = settings.global_batch_size, settings.seq_length
        self.table = make_samples(self.samples_per_epoch, self.seq_length, 5, unequal=True)

    def sample(self, index: int) -> Sample:
        """Return one of the samples."""
        row = {name: tensor[index].numpy() for name, tensor in self.table.items()}
        return Sample(row["tokens"], row["labels"], row["mask"], row["segments"], 1)


def evaluate(settings: Settings) -> dict[int, float]:
    """Return the loss of every exit, evaluated on ``UnequalSource``."""
    _without_check()
    platform, place, model = rank_bodies.start(settings)
    samples = EvaluationSet(UnequalSource(settings))
    evaluator = Evaluator(settings, model, platform, place, "set", samples)
    report = evaluator.run(0, lambda _done, _total: None)
    return {depth: numbers.loss for depth, numbers in report.exits.items()}
