"""The function that Megatron's schedules call for each micro-batch of each chunk while training."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

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
from megatron_sorted.training.step.loss_scaling import LossScaling
from megatron_sorted.training.step.micro_batches import InputBuilder


@dataclass
class ForwardStep:
    """Megatron's forward-step function for training: it runs the layers and attaches the exits.

    Attributes:
        settings: The run.
        model: This rank's chunks.
        platform: The devices of the run.
        coefficients: {depth: coefficient} of the exits that train at this step.
        num_micro_batches: Number of micro-batches of this step.
        ledger: The sums of the exits' losses and gradients.
        track_agreement: Whether exits are compared with the last one, token by token, which costs
            an argmax an exit; and whether the exits' gradients are compared with those of deeper
            exits.
        checksum: Sum of the checksums of the micro-batches trained on since ``take_checksum``.
        step: The current step, from 0.
        observes: What the coefficient rule needs to know of the step.
        loss_scaling: The scaling of losses and gradients.
        input_builder: The numbering, cutting and copying of micro-batches.
        losses, exits: The computation of exits.
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
        """Create the objects that the steps use."""
        self.loss_scaling = LossScaling(self.settings, self.model)
        self.input_builder = InputBuilder(self.settings, self.platform, self.model.groups.cp)
        self.losses = ExitLosses(self.settings, self.model, self.platform)
        self.exits = TrainedExits(self.losses, self.ledger)

    @property
    def device(self) -> torch.device:
        """Return the device of this rank."""
        return self.platform.device()

    def begin_step(self, step: int, rule: CoefficientRule) -> None:
        """Prepare for ``step`` and for what ``rule`` needs to know of it."""
        self.step, self.observes = step, rule.needs
        self.losses.confidences.clear()
        self.losses.confidences.thresholds = rule.thresholds(step)

    @property
    def compares(self) -> bool:
        """Return whether exits are compared with the last one, which must be computed."""
        return self.track_agreement and self.coefficients.get(self.settings.num_layers, 0.0) != 0

    def __call__(self, batches: Iterator[Batch], wrapped_chunk: torch.nn.Module):
        """Return the chunk's output and Megatron's loss function for it.

        Collective: those of the chunk's layers.
        """
        chunk, settings, coefficients = unwrap(wrapped_chunk), self.settings, self.coefficients
        whole = next(batches)
        micro, inputs = self.input_builder.build(whole, chunk, self.num_micro_batches)
        num_tokens, number = micro.batch.num_tokens, micro.number
        if chunk.layout.chunk == 0:
            self.checksum += whole.checksum
        if self.compares:
            self.losses.top_tokens.add_batch(number, micro.batch)
        if EXIT_LAYERS in self.observes:
            self.losses.confidences.add_batch(number, num_tokens)
        if chunk.layer_dropout is not None:
            chunk.layer_dropout.draw(self.step, self._global_indices(number), self.platform)
        slot = TeacherSlot() if taught_exits(settings, coefficients) else None
        micro = replace(
            micro,
            deepest=deepest_layer_run(settings, coefficients),
            with_choice=self.compares,
            with_confidence=EXIT_LAYERS in self.observes,
            coefficients=coefficients,
            teacher_slot=slot,
            factor=self.loss_scaling.factor(num_tokens, self.num_micro_batches),
            compares_gradients=self.track_agreement or settings.log_exit_gradients,
        )
        has_carrier = halves_of_message(settings, coefficients) == 2
        if has_carrier and not chunk.pre_process:
            chunk.set_input_tensor(narrow(chunk.decoder.input_tensor, slot))
        if slot is not None and self.model.teacher is not None:
            self.model.teacher.run(chunk.layout, slot, inputs.batch, inputs.attention_mask)
        output = inputs.run(wrapped_chunk, micro, partial(self.exits.attach, micro))
        received = chunk.decoder.input_tensor
        if micro.attached or (received is not None and not chunk.trains_below):
            output = attach_exits(output, received, micro.attached)
            # without this the exits would hold their own hidden states in a reference cycle
            micro.attached.clear()
        # last, so that in backward the teacher arrives before any exit runs
        if has_carrier and not chunk.layout.is_last:
            output = widen(output, slot)
        return output, inputs.loss_function

    def finish_step(self) -> None:
        """Scale the exits' gradient norms and compare the exits; call this before the optimizer.

        Collective: if exits are compared, that of ``TopTokens.compare``.
        """
        self.ledger.finish_step(self.loss_scaling.gradient_divisor())
        if self.compares:
            self.losses.top_tokens.compare(
                self.ledger, self.platform, self.settings.num_layers, self.settings.num_draft_tokens
            )
        self.input_builder.finish()

    def take_checksum(self) -> int:
        """Return the sum of the checksums of this rank's micro-batches since the last call."""
        taken, self.checksum = self.checksum, 0
        return taken

    def _global_indices(self, number: int) -> list[int]:
        """Return the positions of a micro-batch's samples in the global batch."""
        size = self.settings.micro_batch_size
        group = self.model.groups.dp
        first = (number * group.size() + group.rank()) * size
        return list(range(first, first + size))
