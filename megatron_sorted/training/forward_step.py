"""Joins model and loss: what Megatron's schedules call for each micro-batch of each chunk."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_sorted.data.batches import Batch
from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.exits.observation import EXIT_LAYERS
from megatron_sorted.loss.cross_entropy import CrossEntropy, Targets
from megatron_sorted.loss.deferred import end, tap
from megatron_sorted.loss.distillation import Distillation, TaughtCrossEntropy
from megatron_sorted.loss.gradient_rules import GradientRule
from megatron_sorted.loss.hanging import HungExit, hang
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss, exit_loss
from megatron_sorted.model.attention import make_attention_mask
from megatron_sorted.model.config import parameter_dtype
from megatron_sorted.model.stage import SortedStage
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.derived import deepest_layer_run, last_exit_teaches, taught_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import Model, unwrap
from megatron_sorted.training.carrier import TeacherBox, halves_of_message, narrow, teach, widen
from megatron_sorted.training.choices import Choices
from megatron_sorted.training.confidence import Confidences
from megatron_sorted.training.loss_rule import LossRule

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


def make_gradient_rule(settings: Settings) -> GradientRule:
    """Returns the rule by which gradients are joined at exits."""
    whole, group = settings.exit_gradient_scope == "micro-batch", None
    if whole and settings.sequence_parallel and settings.tensor_model_parallel_size > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        if settings.context_parallel_size > 1:
            group = parallel_state.get_tensor_and_context_parallel_group()
    elif whole and settings.context_parallel_size > 1:
        group = parallel_state.get_context_parallel_group()
    return GradientRule(settings.exit_gradient_rule, whole, settings.exit_gradient_balance, group)


@dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch on its way through one chunk.

    Attributes:
        batch: On the host.
        targets: On the device; None where the chunk has no exit.
        number: Of the step's micro-batches.
        num_tokens: Trained tokens.
        deepest: Layers above this depth are not run.
        box: Where the teacher of its exits will be; None where nobody is taught.
        attention_mask: As the layers' attention takes it; kept where exits have layers of their own.
        hung: The exits that hang on the chunk's output, filled from shallow to deep.
    """

    batch: Batch
    targets: Targets | None
    number: int
    num_tokens: int
    deepest: int
    box: TeacherBox | None = None
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
        track_agreement: Whether exits are compared with the last one, token by token, which costs an argmax an exit; and whether what the
            exits' gradients are to the deeper ones is measured.
        choices: What they chose in the step under way.
        checksum: Sum of the checksums of the micro-batches trained on since ``take_checksum``.
        step: The step under way, from 0.
        observes: What the rule of the coefficients is to be told of it.
        confidences: How sure the exits are, if that is among it.
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
    step: int = 0
    observes: frozenset[str] = frozenset()
    confidences: Confidences = field(default_factory=Confidences)
    _calls: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the rules that the settings name."""
        self.loss_rule = LossRule(self.settings, self.model)
        self.gradient_rule = make_gradient_rule(self.settings)
        self.distillation = Distillation(self.settings.exit_kd_weight, self.settings.exit_kd_temperature, self.settings.exit_kd_top_k)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.platform.device()

    def begin_step(self, step: int, rule: CoefficientRule) -> None:
        """Takes note of the step that comes, and of what ``rule`` is to be told of it."""
        self.step, self.observes = step, rule.needs
        self.confidences.clear()
        self.confidences.thresholds = rule.thresholds(step)

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
        if self.simulates:
            self.confidences.num_counted[number] = int((batch.loss_mask_bs != 0).sum())
        if stage.layer_dropout is not None and self.observer is None:
            stage.layer_dropout.draw(self.step, self._global_indices(number), self.platform)
        targets = self._to_device(count_targets(batch)) if stage.depths else None
        box = TeacherBox() if self.observer is None and taught_exits(self.settings, self.coefficients) else None
        carries = halves_of_message(self.settings, self.coefficients, self.observer is not None) == 2
        moved = self._to_device(batch)
        mask = make_attention_mask(moved.tokens_bs, moved.segments_bs, self.settings.sliding_window, parameter_dtype(self.settings))
        micro = _MicroBatch(batch, targets, number, int(batch.loss_mask_bs.sum()), self._deepest(), box,
                            mask if self.settings.use_exit_block else None)
        if carries and not stage.pre_process:
            stage.set_input_tensor(narrow(stage.decoder.input_tensor, box))
        if box is not None and self.model.teacher is not None:
            self.model.teacher.run(stage.plan, box, moved, mask)
        output = chunk(tokens_bs=moved.tokens_bs, positions_bs=moved.positions_bs, attention_mask=mask,
                       at_exit=partial(self._at_exit, stage, micro), deepest=micro.deepest)
        received = stage.decoder.input_tensor
        if self.observer is None and (micro.hung or (received is not None and not stage.trains_below)):
            output = hang(output, received, micro.hung)
            micro.hung.clear()  # or the exits would hold their own hidden states in a circle
        if carries and not stage.plan.is_last:  # last, so that in backward the teacher is there before any exit runs
            output = widen(output, box)
        # filled by the device: torch.tensor would copy from the host and wait
        tokens = torch.full((), micro.num_tokens, dtype=torch.int, device=self.device)
        return output, lambda loss: (loss, tokens, {})

    def finish_step(self) -> None:
        """Ends a training step, before the optimizer: scales the exits' gradient norms, and compares the exits if asked.

        Collective: if exits are compared, that of ``Choices.compare``.
        """
        self.ledger.finish_step(self.loss_rule.gradient_divisor())
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

    @property
    def simulates(self) -> bool:
        """Whether the rule is told where tokens would leave."""
        return EXIT_LAYERS in self.observes and self.observer is None

    def _global_indices(self, number: int) -> list[int]:
        """Returns the places in the global batch of the samples of this rank's micro-batch ``number`` (see ``make_train_batches``)."""
        size = self.settings.micro_batch_size
        first = (number * parallel_state.get_data_parallel_world_size() + parallel_state.get_data_parallel_rank()) * size
        return list(range(first, first + size))

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
        if micro.box is not None and depth == self.settings.num_layers and last_exit_teaches(self.settings):
            backward = teach(backward, stage.head(depth).norm, micro.box)
        announced = stage.parameters_complete_at(depth) if self.settings.overlap_grad_reduce else ()
        if not hidden_tbh.requires_grad:  # nothing below trains
            if backward is not None or announced:
                micro.hung.append(HungExit(hidden_tbh, backward, coefficient * self._factor(micro), announced))
            return torch.zeros((), device=self.device) if depth == micro.deepest else hidden_tbh
        if depth == micro.deepest:
            return end(hidden_tbh, backward, coefficient, announced)
        if backward is None and not announced:
            return hidden_tbh
        return tap(hidden_tbh, backward, coefficient * self._factor(micro), announced, partial(self._join, depth))

    def _factor(self, micro: _MicroBatch) -> torch.Tensor:
        return self.loss_rule.factor(micro.num_tokens, self.num_micro_batches)

    def _join(self, depth: int, own_tbh: torch.Tensor, deeper_tbh: torch.Tensor) -> torch.Tensor:
        """Returns the gradient for the layers below the exit at ``depth``, made of its own and the deeper exits'.

        Collective: that of ``GradientRule.join``.
        """
        if self.track_agreement or self.settings.log_exit_gradients:
            self.ledger.add_meeting(depth, own_tbh, deeper_tbh)
        return self.gradient_rule.join(own_tbh, deeper_tbh, sum(other > depth for other in self.coefficients))

    def _exit_loss(self, stage: SortedStage, micro: _MicroBatch, depth: int, hidden_tbh: torch.Tensor, factor: torch.Tensor | None):
        before_exit, _ = stage.exit_hooks
        before_exit(depth)
        head = stage.head(depth, micro.attention_mask, hidden_tbh.size(0))
        chunk_tokens = self.settings.exit_loss_chunk_tokens or self.platform.loss_chunk_tokens
        make_loss = CrossEntropy
        if micro.box is not None and taught_exits(self.settings, [depth]):
            teacher = self.model.teacher
            weight_ph = stage.last_weight() if teacher is None else teacher.weight_ph(stage.plan.chunk)
            make_loss = partial(TaughtCrossEntropy, self.distillation, micro.box.normed_tbh, weight_ph)
        losses, gradient = exit_loss(
            hidden_tbh, head.norm, head.weight_ph, micro.targets, self.model.shard, chunk_tokens, factor, self.compares, make_loss,
            self.simulates)
        if self.compares:
            self.choices.add(depth, micro.number, losses.choice_n)
        if self.simulates:
            self.confidences.add(depth, micro.number, losses.confidence_n, self.model.vocab_size)
        return losses, gradient

    def _exit_backward(self, stage: SortedStage, micro: _MicroBatch, depth: int, hidden_tbh: torch.Tensor,
                       factor: torch.Tensor) -> torch.Tensor:
        losses, gradient = self._exit_loss(stage, micro, depth, hidden_tbh, factor)
        _, after_exit = stage.exit_hooks
        after_exit(depth)
        self.ledger.add(depth, losses, micro.targets.loss_mask_n)
        self.ledger.add_gradient(depth, gradient)
        return gradient
