"""Joins model and loss: what Megatron's schedules call for each micro-batch of each chunk."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_sorted.data.batches import Batch
from megatron_sorted.loss.deferred import end, tap
from megatron_sorted.loss.hanging import HungExit, hang
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss, Targets, exit_loss
from megatron_sorted.model.attention import make_attention_mask
from megatron_sorted.model.config import parameter_dtype
from megatron_sorted.model.stage import SortedStage
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.derived import deepest_layer_run
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import Model, unwrap
from megatron_sorted.training.choices import Choices

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


@dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch on its way through one chunk.

    Attributes:
        batch: On the host.
        targets: On the device; None where the chunk has no exit.
        number: Of the step's micro-batches.
        num_tokens: Trained tokens.
        deepest: Layers above this depth are not run.
        attention_mask: As the layers' attention takes it; kept where exits have layers of their own.
        hung: The exits that hang on the chunk's output, filled from shallow to deep.
    """

    batch: Batch
    targets: Targets | None
    number: int
    num_tokens: int
    deepest: int
    attention_mask: torch.Tensor | None = None
    hung: list[HungExit] = field(default_factory=list)


@dataclass
class ForwardStep:
    """Megatron's forward-step function, for training (exits deferred) and evaluation (exits at once).

    Nothing here makes the host wait for the device: what the host must know of a batch is read before it leaves.

    Attributes:
        settings: The run.
        model: The chunks of this rank.
        platform: Where it runs.
        coefficients: {depth: coefficient} of the exits that train at this step.
        num_micro_batches: Of this step.
        ledger: Where training losses and gradients of exits are added up.
        observer: Set in evaluation: gets every exit's losses, and nothing is trained.
        track_agreement: Whether exits are compared with the last one, token by token, which costs an argmax an exit.
        choices: What they chose in the step under way.
        checksum: Sum of the checksums of the micro-batches trained on since ``take_checksum``.
    """

    settings: Settings
    model: Model
    platform: Platform
    coefficients: dict[int, float] = field(default_factory=dict)
    num_micro_batches: int = 1
    ledger: Ledger = field(default_factory=Ledger)
    observer: Observer | None = None
    track_agreement: bool = False
    choices: Choices = field(default_factory=Choices)
    checksum: int = 0
    _calls: dict[int, int] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.platform.device()

    def __call__(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        """Returns the chunk's output and Megatron's loss function for it.

        Collective: those of the chunk's layers; in evaluation also those of the exits (tensor parallel group).
        """
        stage = unwrap(chunk)
        whole = next(batches)
        batch = self._on_this_context_rank(whole)
        number = self._calls.get(stage.plan.chunk, 0) % self.num_micro_batches
        self._calls[stage.plan.chunk] = number + 1
        if stage.plan.chunk == 0 and self.observer is None:
            self.checksum += whole.checksum
        if self.compares:
            self.choices.add_batch(number, batch.loss_mask_bs, batch.positions_bs, batch.segments_bs)
        targets = self._to_device(count_targets(batch)) if stage.depths else None
        moved = self._to_device(batch)
        mask = make_attention_mask(moved.tokens_bs, moved.segments_bs, self.settings.sliding_window, parameter_dtype(self.settings))
        micro = _MicroBatch(batch, targets, number, int(batch.loss_mask_bs.sum()), self._deepest(),
                            mask if self.settings.use_exit_block else None)
        output = chunk(tokens_bs=moved.tokens_bs, positions_bs=moved.positions_bs, attention_mask=mask,
                       at_exit=partial(self._at_exit, stage, micro), deepest=micro.deepest)
        received = stage.decoder.input_tensor
        if self.observer is None and (micro.hung or (received is not None and not stage.trains_below)):
            output = hang(output, received, micro.hung)
            micro.hung.clear()  # or the exits would hold their own hidden states in a circle
        # filled by the device: torch.tensor would copy from the host and wait
        tokens = torch.full((), micro.num_tokens, dtype=torch.int, device=self.device)
        return output, lambda loss: (loss, tokens, {})

    def finish_step(self) -> None:
        """Ends a training step, before the optimizer: scales the exits' gradient norms, and compares the exits if asked.

        Collective: if exits are compared, that of ``Choices.compare``.
        """
        self.ledger.finish_step(self._gradient_divisor())
        self.finish_comparison(self.ledger)

    def finish_comparison(self, ledger: Ledger) -> None:
        """Compares the exits over the micro-batches seen since the last call, if asked, and adds the counts to ``ledger``.

        Collective: that of ``Choices.compare``.
        """
        if self.compares:
            self.choices.compare(ledger, self.platform, self.settings.num_layers, self.settings.num_draft_tokens)
        self._calls.clear()

    def take_checksum(self) -> int:
        """Returns the sum of the checksums of the micro-batches that this rank trained on since the last call."""
        taken, self.checksum = self.checksum, 0
        return taken

    @property
    def compares(self) -> bool:
        """Whether exits are compared with the last one now: if asked, and the last one is computed."""
        return self.track_agreement and (self.observer is not None or self.coefficients.get(self.settings.num_layers, 0.0) != 0)

    def _to_device(self, tensors: Batch | Targets):
        """Returns a copy of a dataclass with all its tensors on the device, without waiting."""
        moved = {name: self.platform.to_device(value) for name, value in vars(tensors).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(tensors, **moved)

    def _on_this_context_rank(self, batch: Batch) -> Batch:
        """Returns this rank's part of the sequences under context parallelism."""
        if self.settings.context_parallel_size == 1:
            return batch
        parts = get_batch_on_this_cp_rank({name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)})
        return dataclasses.replace(batch, **parts)

    def _deepest(self) -> int:
        return self.settings.num_layers if self.observer is not None else deepest_layer_run(self.settings, self.coefficients)

    def _at_exit(self, stage: SortedStage, micro: _MicroBatch, depth: int, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Returns what deeper layers go on with after the exit at ``depth``; see ``loss.deferred``."""
        if self.observer is not None:
            losses, _ = self._exit_loss(stage, micro, depth, hidden_tbh, None)
            self.observer(depth, losses, micro.targets, micro.batch)
            return torch.zeros((), device=self.device) if depth == micro.deepest else hidden_tbh
        coefficient = self.coefficients.get(depth, 0.0)
        backward = partial(self._exit_backward, stage, micro, depth) if coefficient else None
        announced = stage.parameters_complete_at(depth) if self.settings.overlap_grad_reduce else ()
        if not hidden_tbh.requires_grad:  # nothing below trains
            if backward is not None or announced:
                micro.hung.append(HungExit(hidden_tbh, backward, coefficient * self._loss_rule_factor(micro.num_tokens), announced))
            return torch.zeros((), device=self.device) if depth == micro.deepest else hidden_tbh
        if depth == micro.deepest:
            return end(hidden_tbh, backward, coefficient, announced)
        if backward is None and not announced:
            return hidden_tbh
        return tap(hidden_tbh, backward, coefficient * self._loss_rule_factor(micro.num_tokens), announced)

    def _loss_scale(self) -> torch.Tensor:
        """Returns the fp16 loss scale, else 1, as a scalar on the device."""
        scale = torch.ones((), dtype=torch.float32, device=self.device)
        if self.model.config.grad_scale_func is not None:
            scale = self.model.config.grad_scale_func(scale).reshape(())
        return scale

    def _loss_rule_factor(self, num_tokens: int) -> torch.Tensor:
        """Returns what Megatron's schedule multiplies the last stage's loss gradient by, for exits on any stage.

        Source: megatron.core.pipeline_parallel.schedules.forward_step_calc_loss and backward_step, for a loss function that
        returns (sum, tokens, report): the fp16 loss scale; without per-token loss also 1 / tokens / micro-batches.
        """
        factor = self._loss_scale()
        if not self.settings.calculate_per_token_loss:
            factor = factor / max(num_tokens, 1) / self.num_micro_batches
        return factor

    def _gradient_divisor(self) -> torch.Tensor:
        """Returns what a step's gradients are still to be divided by when the schedule is done, as a scalar on the device.

        The fp16 loss scale; and with per-token loss the trained tokens of the global batch, else the ranks that share it.

        Source: megatron.core.distributed.finalize_model_grads, which counts the tokens; DistributedDataParallel, which takes
        the mean over data and context parallel ranks.
        """
        if self.settings.calculate_per_token_loss:
            return self._loss_scale() * self.model.num_tokens.clamp(min=1)
        return self._loss_scale() * parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def _exit_loss(self, stage: SortedStage, micro: _MicroBatch, depth: int, hidden_tbh: torch.Tensor, factor: torch.Tensor | None):
        head = stage.head(depth, micro.attention_mask, hidden_tbh.size(0))
        chunk_tokens = self.settings.exit_loss_chunk_tokens or self.platform.loss_chunk_tokens
        losses, gradient = exit_loss(
            hidden_tbh, head.norm, head.weight_ph, micro.targets, self.model.shard, chunk_tokens, factor, self.compares)
        if self.compares:
            self.choices.add(depth, micro.number, losses.choice_n)
        return losses, gradient

    def _exit_backward(self, stage: SortedStage, micro: _MicroBatch, depth: int, hidden_tbh: torch.Tensor,
                       factor: torch.Tensor) -> torch.Tensor:
        losses, gradient = self._exit_loss(stage, micro, depth, hidden_tbh, factor)
        self.ledger.add(depth, losses, micro.targets.loss_mask_n)
        self.ledger.add_gradient(depth, gradient)
        return gradient
