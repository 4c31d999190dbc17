"""Joins model and loss: what Megatron's schedules call for each micro-batch of each chunk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_sorted.data.batches import Batch
from megatron_sorted.loss.deferred import end, tap
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss, Targets, exit_loss
from megatron_sorted.model.attention import packed_attention_mask
from megatron_sorted.model.config import parameter_dtype
from megatron_sorted.model.stage import SortedStage
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import Model, unwrap

# Called in evaluation with depth, what the exit said, the targets and the batch.
Observer = Callable[[int, ExitLoss, Targets, Batch], None]


def count_targets(batch: Batch) -> Targets:
    """Returns the batch's trained tokens in (sequence, batch) order; where all are trained, without an index.

    Works on the host, where the batch still lies: finding them on a device would make the host wait for it.
    """
    mask = batch.loss_mask_bs.t().reshape(-1)
    labels = batch.labels_bs.t().reshape(-1)
    index = mask.nonzero().squeeze(1)
    if index.numel() == mask.numel():
        return Targets(None, labels, mask)
    return Targets(index, labels[index], mask[index])


def _to(targets: Targets, device: torch.device) -> Targets:
    index = None if targets.index_n is None else targets.index_n.to(device, non_blocking=True)
    return Targets(index, targets.labels_n.to(device, non_blocking=True), targets.loss_mask_n.to(device, non_blocking=True))


@dataclass
class ForwardStep:
    """Megatron's forward-step function, for training (exits deferred) and evaluation (exits at once).

    Attributes:
        settings: The run.
        model: The chunks of this rank.
        platform: Where it runs.
        coefficients: {depth: coefficient} of the exits that train at this step.
        num_micro_batches: Of this step.
        ledger: Where training losses are added up.
        observer: Set in evaluation: gets every exit's losses, and nothing is trained.
    """

    settings: Settings
    model: Model
    platform: Platform
    coefficients: dict[int, float] = field(default_factory=dict)
    num_micro_batches: int = 1
    ledger: Ledger = field(default_factory=Ledger)
    observer: Observer | None = None

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.platform.device()

    def __call__(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        """Returns the chunk's output and Megatron's loss function for it.

        Collective: those of the chunk's layers; in evaluation also those of the exits (tensor parallel group).
        """
        stage = unwrap(chunk)
        batch = self._on_this_context_rank(next(batches))
        targets = count_targets(batch) if stage.depths else None
        num_tokens = int(batch.loss_mask_bs.sum())
        moved = batch.to(self.device)
        mask = packed_attention_mask(moved.segments_bs, parameter_dtype(self.settings))
        deepest = self._deepest()
        at_exit = partial(self._at_exit, stage, None if targets is None else _to(targets, self.device), batch, num_tokens, deepest)
        output = chunk(tokens_bs=moved.tokens_bs, positions_bs=moved.positions_bs, attention_mask=mask, at_exit=at_exit, deepest=deepest)
        tokens = torch.tensor(num_tokens, dtype=torch.int, device=self.device)
        return output, lambda loss: (loss, tokens, {})

    def _on_this_context_rank(self, batch: Batch) -> Batch:
        """Returns this rank's part of the sequences under context parallelism."""
        if self.settings.context_parallel_size == 1:
            return batch
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return replace(batch, **get_batch_on_this_cp_rank(tensors))

    def _deepest(self) -> int:
        """Returns the depth above which layers are not run.

        With one stage that is the deepest exit that trains. With several, stages above could only idle. Megatron's overlapped
        gradient reduction waits for the gradient of every layer, so there all layers are run.
        """
        settings = self.settings
        if self.observer is not None or settings.pipeline_model_parallel_size > 1 or settings.overlap_grad_reduce:
            return settings.num_layers
        return max(self.coefficients)

    def _at_exit(self, stage: SortedStage, targets: Targets, batch: Batch, num_tokens: int, deepest: int, depth: int,
                 hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Returns what deeper layers go on with after the exit at ``depth``; see ``loss.deferred``."""
        if self.observer is not None:
            losses, _ = self._exit_loss(stage, depth, targets, hidden_tbh, None)
            self.observer(depth, losses, targets, batch)
            return torch.zeros((), device=self.device) if depth == deepest else hidden_tbh
        coefficient = self.coefficients.get(depth, 0.0)
        backward = partial(self._exit_backward, stage, depth, targets) if coefficient else None
        announced = stage.parameters_complete_at(depth) if self.settings.overlap_grad_reduce else ()
        if depth == deepest:
            return end(hidden_tbh, backward, coefficient, announced)
        if backward is None and not announced:
            return hidden_tbh
        return tap(hidden_tbh, backward, coefficient * self._loss_rule_factor(num_tokens), announced)

    def _loss_rule_factor(self, num_tokens: int) -> torch.Tensor:
        """Returns what Megatron's schedule multiplies the last stage's loss gradient by, for exits on any stage.

        Source: megatron.core.pipeline_parallel.schedules.forward_step_calc_loss and backward_step, for a loss function that
        returns (sum, tokens, report): the fp16 loss scale; without per-token loss also 1 / tokens / micro-batches.
        """
        factor = torch.ones((), dtype=torch.float32, device=self.device)
        if self.model.config.grad_scale_func is not None:
            factor = self.model.config.grad_scale_func(factor).reshape(())
        if not self.settings.calculate_per_token_loss:
            factor = factor / max(num_tokens, 1) / self.num_micro_batches
        return factor

    def _exit_loss(self, stage: SortedStage, depth: int, targets: Targets, hidden_tbh: torch.Tensor, factor: torch.Tensor | None):
        head = stage.head(depth)
        chunk_tokens = self.settings.exit_loss_chunk_tokens or self.platform.loss_chunk_tokens
        return exit_loss(hidden_tbh, head.norm, head.weight_ph, targets, self.model.shard, chunk_tokens, factor)

    def _exit_backward(self, stage: SortedStage, depth: int, targets: Targets, hidden_tbh: torch.Tensor,
                       factor: torch.Tensor) -> torch.Tensor:
        losses, gradient = self._exit_loss(stage, depth, targets, hidden_tbh, factor)
        self.ledger.add(depth, losses, targets.loss_mask_n)
        return gradient
