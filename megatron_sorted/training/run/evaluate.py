"""Evaluation of every exit on every evaluation set, forward only."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from megatron_sorted.data.batches import Batch, make_eval_batches, num_eval_batches
from megatron_sorted.data.samples.dataset import EvaluationSet, InstructionSamples
from megatron_sorted.loss.cross_entropy import Targets
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss
from megatron_sorted.monitoring.report import EvaluationReport
from megatron_sorted.parallel.groups import Place
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.derived import num_micro_batches
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model, unwrap
from megatron_sorted.training.step.exits import ExitLosses
from megatron_sorted.training.step.micro_batches import InputBuilder, MicroBatch
from megatron_sorted.training.step.reduce import reduce_ledger
from megatron_sorted.training.step.train_step import run_schedule


def pieces_of(batch: Batch) -> tuple[torch.Tensor, int]:
    """Return each counted token's piece, numbered over the micro-batch, and a bound; [n].

    The batch must still be on the host.
    """
    size, length = batch.tokens_bs.shape
    segments = (
        torch.zeros(size, length, dtype=torch.int64)
        if batch.pieces_bs is None
        else batch.pieces_bs.long()
    )
    stride = length + 1  # padding has a number of its own
    numbered = (segments + torch.arange(size)[:, None] * stride).t().reshape(-1)
    return numbered[batch.loss_mask_bs.t().reshape(-1) != 0], size * stride


def _whole_sums(
    settings: Settings, losses: ExitLoss, targets: Targets, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return loss and tokens of the whole micro-batch, where its mean needs other ranks; else None.

    Collective: with context parallelism and without per-token loss, one all-reduce of two numbers
        over ``group``, its ranks.
    """
    if settings.context_parallel_size == 1 or settings.calculate_per_token_loss:
        return None
    sums = torch.stack(((losses.loss_n * targets.loss_mask_n).sum(), targets.loss_mask_n.sum()))
    dist.all_reduce(sums, group=group)
    return sums[0], sums[1]


class EvaluationStep:
    """Megatron's forward-step function for evaluation: exits are computed at once.

    Attributes:
        coefficients: An empty dictionary, since no exit trains.
        num_micro_batches: Number of micro-batches of a global batch.
        observe: A function that takes an exit's micro-batch, depth and losses.
        losses: The computation of losses, with the most likely tokens.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        platform: Platform,
        observe: Callable[[MicroBatch, int, ExitLoss], None],
    ):
        self.settings, self.platform, self.observe = settings, platform, observe
        self.coefficients: dict[int, float] = {}
        self.num_micro_batches = 1
        self.input_builder = InputBuilder(settings, platform, model.groups.cp)
        self.losses = ExitLosses(settings, model, platform)

    def __call__(self, batches: Iterator[Batch], wrapped_chunk: torch.nn.Module):
        """Return the chunk's output and Megatron's loss function for it.

        Collective: those of the chunk's layers and exits (tensor parallel group).
        """
        micro, inputs = self.input_builder.build(
            next(batches), unwrap(wrapped_chunk), self.num_micro_batches
        )
        self.losses.top_tokens.add_batch(micro.number, micro.batch)
        return inputs.run(wrapped_chunk, micro, partial(self.at_exit, micro)), inputs.loss_function

    def at_exit(self, micro: MicroBatch, depth: int, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Compute the exit at ``depth``; return the input of the deeper layers."""
        losses, _ = self.losses.compute(micro, depth, hidden_tbh, None)
        self.observe(micro, depth, losses)
        return torch.zeros((), device=hidden_tbh.device) if depth == micro.deepest else hidden_tbh

    def finish_batch(self, ledger: Ledger) -> None:
        """Compare the exits over a global batch, and add the counts to ``ledger``.

        Collective: that of ``TopTokens.compare``.
        """
        self.losses.top_tokens.compare(
            ledger, self.platform, self.settings.num_layers, self.settings.num_draft_tokens
        )
        self.input_builder.finish()


class Evaluator:
    """The evaluation of every exit on one set.

    It measures loss, accuracy, exact match, agreement and accept length.

    Args:
        settings: The run; ``eval_iters`` global batches are used, or all with ``full_validation``.
        model: The model.
        platform: The devices of the run.
        place: This process.
        name: The set's name.
        samples: The set.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        platform: Platform,
        place: Place,
        name: str,
        samples: EvaluationSet,
    ):
        self.settings, self.model, self.platform, self.place = settings, model, platform, place
        self.name, self.samples, self.ledger = name, samples, Ledger()

    def _observe(self, micro: MicroBatch, depth: int, losses: ExitLoss) -> None:
        loss_mask_n = micro.targets.loss_mask_n
        if isinstance(self.samples.source, InstructionSamples):
            pieces, num_pieces = pieces_of(micro.batch)
            pieces = self.platform.to_device(pieces)
            self.ledger.add(depth, losses, loss_mask_n, pieces, num_pieces)
        else:
            whole = _whole_sums(self.settings, losses, micro.targets, self.model.groups.cp)
            self.ledger.add(depth, losses, loss_mask_n, whole=whole)

    def run(self, step: int, progress: Callable[[int, int], None]) -> EvaluationReport:
        """Evaluate the set and return the report.

        Collective: for each global batch the schedule's and that of ``TopTokens.compare``, for each
            exit of a micro-batch that of ``_whole_sums``; then one small all-reduce over all ranks.

        Args:
            step: Steps trained so far.
            progress: A function that takes the number of batches done, and of all batches.
        """
        started, settings, model, place = time.monotonic(), self.settings, self.model, self.place
        limit = None if settings.full_validation else settings.eval_iters
        total = num_eval_batches(settings, self.samples, place.data_size, limit)
        forward_step = EvaluationStep(settings, model, self.platform, self._observe)
        for chunk in model.chunks:
            chunk.eval()
        try:
            batches = make_eval_batches(
                settings, self.samples, place.data_rank, place.data_size, limit
            )
            for done in range(total):
                micro_batches = [
                    next(batches) for _ in range(num_micro_batches(settings, place.world_size))
                ]
                with torch.no_grad():
                    run_schedule(model, settings, forward_step, micro_batches, forward_only=True)
                forward_step.finish_batch(self.ledger)
                progress(done + 1, total)
        finally:
            for chunk in model.chunks:
                chunk.train()
        summed = reduce_ledger(self.ledger, settings)
        seconds = time.monotonic() - started
        return EvaluationReport(step, self.name, seconds, summed.num_tokens, summed.exits)


@dataclass
class ShownProgress:
    """The progress of an evaluation, for the watchdog and the console.

    Attributes:
        name: The set's name.
        alive: A function that is called after every batch.
        prints: Whether this process prints, every 10 seconds.
        shown: The time of its last print.
    """

    name: str
    alive: Callable[[], None]
    prints: bool
    shown: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int) -> None:
        """Record that a batch is done."""
        self.alive()
        if self.prints and time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            print(f"evaluating {self.name!r}: batch {done} of {total}", flush=True)
