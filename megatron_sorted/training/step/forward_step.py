"""What Megatron's schedules call for each micro-batch of each chunk in a training step."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core import parallel_state

from megatron_sorted.data.batches import Batch
from megatron_sorted.exits.coefficients import EXIT_LAYERS, CoefficientRule
from megatron_sorted.loss.attached import attach_exits
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.derived import deepest_layer_run, taught_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model, unwrap
from megatron_sorted.training.step.carrier import TeacherSlot, halves_of_message, narrow, widen
from megatron_sorted.training.step.exits import ExitLosses, TrainedExits
from megatron_sorted.training.step.loss_rule import LossRule
from megatron_sorted.training.step.micro_batches import Feed


@dataclass
class ForwardStep:
    """Megatron's forward-step function for training: runs the layers, attaches the exits.

    Attributes:
        settings: The run.
        model: The chunks of this rank.
        platform: Where it runs.
        coefficients: {depth: coefficient} of the exits that train at this step.
        num_micro_batches: Of this step.
        ledger: Where losses and gradients of exits are added up.
        track_agreement: Whether exits are compared with the last one, token by token, which costs
            an argmax an exit; and whether the exits' gradients are compared with those of deeper
            exits.
        checksum: Sum of the checksums of the micro-batches trained on since ``take_checksum``.
        step: The step under way, from 0.
        observes: What the rule of the coefficients needs to know of it.
        losses, exits: What exits do.
    """

    settings: Settings
    model: Model
    platform: Platform
    coefficients: dict[int, float] = field(default_factory=dict)
    num_micro_batches: int = 1
    ledger: Ledger = field(default_factory=Ledger)
    track_agreement: bool = False
    checksum: int = 0
    step: int = 0
    observes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Make the parts of a step."""
        self.loss_rule, self.feed = (
            LossRule(self.settings, self.model),
            Feed(self.settings, self.platform),
        )
        self.losses = ExitLosses(self.settings, self.model, self.platform)
        self.exits = TrainedExits(self.losses, self.ledger)

    @property
    def device(self) -> torch.device:
        """Return where batches go."""
        return self.platform.device()

    def begin_step(self, step: int, rule: CoefficientRule) -> None:
        """Record the step that comes, and what ``rule`` needs to know of it."""
        self.step, self.observes = step, rule.needs
        self.losses.confidences.clear()
        self.losses.confidences.thresholds = rule.thresholds(step)

    @property
    def compares(self) -> bool:
        """Return whether exits are compared with the last one, which must be computed."""
        return self.track_agreement and self.coefficients.get(self.settings.num_layers, 0.0) != 0

    def __call__(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        """Return the chunk's output and Megatron's loss function for it.

        Collective: those of the chunk's layers.
        """
        stage, settings, coefficients = unwrap(chunk), self.settings, self.coefficients
        whole = next(batches)
        micro, inputs = self.feed.take(whole, stage, self.num_micro_batches)
        batch, number = micro.batch, micro.number
        if stage.plan.chunk == 0:
            self.checksum += whole.checksum
        if self.compares:
            self.losses.choices.add_batch(
                number, batch.loss_mask_bs, batch.positions_bs, batch.segments_bs
            )
        if EXIT_LAYERS in self.observes:
            self.losses.confidences.num_counted[number] = int((batch.loss_mask_bs != 0).sum())
        if stage.layer_dropout is not None:
            stage.layer_dropout.draw(self.step, self._global_indices(number), self.platform)
        box = TeacherSlot() if taught_exits(settings, coefficients) else None
        micro = replace(
            micro,
            deepest=deepest_layer_run(settings, coefficients),
            with_choice=self.compares,
            with_confidence=EXIT_LAYERS in self.observes,
            coefficients=coefficients,
            box=box,
            factor=self.loss_rule.factor(int(batch.loss_mask_bs.sum()), self.num_micro_batches),
            with_meetings=self.track_agreement or settings.log_exit_gradients,
        )
        carries = halves_of_message(settings, coefficients) == 2
        if carries and not stage.pre_process:
            stage.set_input_tensor(narrow(stage.decoder.input_tensor, box))
        if box is not None and self.model.teacher is not None:
            self.model.teacher.run(stage.plan, box, inputs.batch, inputs.attention_mask)
        output = inputs.run(chunk, micro, partial(self.exits.attach, micro))
        received = stage.decoder.input_tensor
        if micro.attached or (received is not None and not stage.trains_below):
            output = attach_exits(output, received, micro.attached)
            micro.attached.clear()  # or the exits would hold their own hidden states in a circle
        if (
            carries and not stage.plan.is_last
        ):  # last, so that in backward the teacher is there before any exit runs
            output = widen(output, box)
        return output, inputs.loss_function

    def finish_step(self) -> None:
        """End a step, before the optimizer: scale the exits' gradient norms, compare the exits.

        Collective: if exits are compared, that of ``Choices.compare``.
        """
        self.ledger.finish_step(self.loss_rule.gradient_divisor())
        if self.compares:
            self.losses.choices.compare(
                self.ledger, self.platform, self.settings.num_layers, self.settings.num_draft_tokens
            )
        self.feed.finish()

    def take_checksum(self) -> int:
        """Return the sum of the checksums of this rank's micro-batches since the last call."""
        taken, self.checksum = self.checksum, 0
        return taken

    def _global_indices(self, number: int) -> list[int]:
        """Return the places of a micro-batch's samples in the global batch."""
        size = self.settings.micro_batch_size
        first = (
            number * parallel_state.get_data_parallel_world_size()
            + parallel_state.get_data_parallel_rank()
        ) * size
        return list(range(first, first + size))
