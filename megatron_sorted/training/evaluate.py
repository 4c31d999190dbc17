"""Every exit on every evaluation set, forward only."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sorted.data.batches import Batch, make_eval_batches, num_eval_batches
from megatron_sorted.data.dataset import EvaluationSet, InstructionSamples
from megatron_sorted.loss.cross_entropy import Targets
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss
from megatron_sorted.monitoring.report import EvaluationReport
from megatron_sorted.parallel.groups import Place
from megatron_sorted.settings.derived import num_micro_batches
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import Model
from megatron_sorted.training.forward_step import ForwardStep
from megatron_sorted.training.reduce import exit_numbers, reduce_ledger
from megatron_sorted.training.step import run_schedule


def pieces_of(batch: Batch) -> tuple[torch.Tensor, int]:
    """Returns the number of the document of each counted token, unique over the micro-batch, and a number above all; shape [n].

    Works on the host, where the batch lies.
    """
    size, length = batch.tokens_bs.shape
    segments = torch.zeros(size, length, dtype=torch.int64) if batch.segments_bs is None else batch.segments_bs.long()
    stride = length + 1  # padding has a number of its own
    numbered = (segments + torch.arange(size)[:, None] * stride).t().reshape(-1)
    return numbered[batch.loss_mask_bs.t().reshape(-1) != 0], size * stride


def _whole_sums(settings: Settings, losses: ExitLoss, targets: Targets) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return loss and tokens of the whole micro-batch, for its mean; None where this rank sees all of it, or no mean is asked for.

    Collective: with context parallelism and without per-token loss, one all-reduce of two numbers over its group.
    """
    if settings.context_parallel_size == 1 or settings.calculate_per_token_loss:
        return None
    sums = torch.stack(((losses.loss_n * targets.loss_mask_n).sum(), targets.loss_mask_n.sum()))
    dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    return sums[0], sums[1]


def evaluate(model: Model, settings: Settings, forward_step: ForwardStep, place: Place, name: str, samples: EvaluationSet, step: int,
             progress: Callable[[int, int], None]) -> EvaluationReport:
    """Returns loss, token accuracy, exact match, agreement with the last exit and accept length of every exit on one set.

    Collective: for each global batch the schedule's and that of ``Choices.compare``, for each exit of a micro-batch that of
    ``_whole_sums``; then one small all-reduce over all ranks.

    Args:
        model: The model.
        settings: The run; ``eval_iters`` global batches are used, or all with ``full_validation``.
        forward_step: The forward-step function; left as it was.
        place: This process.
        name: Of the set.
        samples: The set.
        step: Steps trained so far.
        progress: Called with batches done and batches in all.
    """
    started = time.monotonic()
    limit = None if settings.full_validation else settings.eval_iters
    total = num_eval_batches(settings, samples, place.data_size, limit)
    ledger = Ledger()
    count_pieces = isinstance(samples.source, InstructionSamples)

    def observe(depth: int, losses: ExitLoss, targets: Targets, batch: Batch) -> None:
        if not count_pieces:
            ledger.add(depth, losses, targets.loss_mask_n, whole=_whole_sums(settings, losses, targets))
            return
        pieces, num_pieces = pieces_of(batch)
        ledger.add(depth, losses, targets.loss_mask_n, forward_step.platform.to_device(pieces), num_pieces)

    for chunk in model.chunks:
        chunk.eval()
    tracked, forward_step.track_agreement, forward_step.observer = forward_step.track_agreement, True, observe
    try:
        batches = make_eval_batches(settings, samples, place.data_rank, place.data_size, limit)
        for done in range(total):
            micro_batches = [next(batches) for _ in range(num_micro_batches(settings, place.world_size))]
            with torch.no_grad():
                run_schedule(model, settings, forward_step, micro_batches, forward_only=True)
            forward_step.finish_comparison(ledger)
            progress(done + 1, total)
    finally:
        forward_step.track_agreement, forward_step.observer = tracked, None
        for chunk in model.chunks:
            chunk.train()
    found = reduce_ledger(ledger, settings)
    exits = {d: exit_numbers(e) for d, e in found.items()}
    num_tokens = int(max((e.num_tokens for e in found.values()), default=0))
    return EvaluationReport(step, name, time.monotonic() - started, num_tokens, exits)
