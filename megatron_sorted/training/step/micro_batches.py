"""The micro-batches of a step as chunks take them: numbered, cut, on the device."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_sorted.data.batches import Batch
from megatron_sorted.loss.attached import AttachedExit
from megatron_sorted.loss.cross_entropy import Targets
from megatron_sorted.model.attention import make_attention_mask
from megatron_sorted.model.config import parameter_dtype
from megatron_sorted.model.stage import SortedStage
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.carrier import TeacherSlot


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on its way through one chunk. All but the first six are for training.

    Attributes:
        stage: The chunk.
        batch: On the host.
        targets: On the device; None where the chunk has no exit.
        number: Of the step's micro-batches.
        attention_mask: As the layers' attention takes it; kept where exits have layers of their
            own.
        deepest: Layers above this depth are not run.
        with_choice: Whether exits also compute the most likely token of every counted token.
        with_confidence: Whether they also compute its probability.
        coefficients: {depth: coefficient} of the exits that train.
        factor: What the loss rule multiplies an exit's gradient by.
        with_meetings: Whether an exit's gradient is compared with that of the deeper exits.
        box: Where the teacher of its exits will be; None where nobody is taught.
        attached: The exits attached to the chunk's output, from shallow to deep.
    """

    stage: SortedStage
    batch: Batch
    targets: Targets | None
    number: int
    attention_mask: torch.Tensor | None
    deepest: int
    with_choice: bool = True
    with_confidence: bool = False
    coefficients: Mapping[int, float] = field(default_factory=dict)
    factor: torch.Tensor | None = None
    with_meetings: bool = False
    box: TeacherSlot | None = None
    attached: list[AttachedExit] = field(default_factory=list)


@dataclass(frozen=True)
class ChunkInputs:
    """What the layers of a chunk take of a micro-batch, on the device.

    Attributes:
        batch: The micro-batch.
        attention_mask: As the layers' attention takes it.
        num_tokens: Trained tokens, for Megatron's loss function; int32 [].
    """

    batch: Batch
    attention_mask: torch.Tensor | None
    num_tokens: torch.Tensor

    def run(self, chunk: torch.nn.Module, micro: MicroBatch, at_exit: Callable) -> torch.Tensor:
        """Return the chunk's output; ``at_exit`` as ``SortedStage.forward`` takes it."""
        return chunk(
            tokens_bs=self.batch.tokens_bs,
            positions_bs=self.batch.positions_bs,
            attention_mask=self.attention_mask,
            at_exit=at_exit,
            deepest=micro.deepest,
        )

    def loss_function(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Return what Megatron's schedules want of a loss."""
        return loss, self.num_tokens, {}


def count_targets(batch: Batch) -> Targets:
    """Return the trained tokens in (sequence, batch) order; where all train, without an index.

    Works on the host, where the batch still lies: finding them on a device would make the host wait
        for it.
    """
    mask = batch.loss_mask_bs.t().reshape(-1)
    labels = batch.labels_bs.t().reshape(-1)
    index = mask.nonzero().squeeze(1)
    if index.numel() == mask.numel():
        return Targets(None, labels, mask)
    return Targets(index, labels[index], mask[index])


@dataclass
class Feed:
    """Takes micro-batches to the chunks of this rank, every chunk the same in the same order.

    Nothing here makes the host wait for the device: what the host must know of a batch is read
        before it leaves.
    """

    settings: Settings
    platform: Platform
    _calls: dict[int, int] = field(default_factory=dict)

    def take(
        self, whole: Batch, stage: SortedStage, num_micro_batches: int
    ) -> tuple[MicroBatch, ChunkInputs]:
        """Return the next micro-batch of a chunk.

        Args:
            whole: On the host, the same on all context parallel ranks.
            stage: The chunk.
            num_micro_batches: Of a step.
        """
        settings = self.settings
        batch = self._on_this_context_rank(whole)
        number = self._calls.get(stage.plan.chunk, 0) % num_micro_batches
        self._calls[stage.plan.chunk] = number + 1
        targets = self._to_device(count_targets(batch)) if stage.depths else None
        moved = self._to_device(batch)
        mask = make_attention_mask(
            moved.tokens_bs, moved.segments_bs, settings.sliding_window, parameter_dtype(settings)
        )
        # filled by the device: torch.tensor would copy from the host and wait
        tokens = torch.full(
            (), int(batch.loss_mask_bs.sum()), dtype=torch.int, device=self.platform.device()
        )
        micro = MicroBatch(
            stage,
            batch,
            targets,
            number,
            mask if settings.use_exit_block else None,
            settings.num_layers,
        )
        return micro, ChunkInputs(moved, mask, tokens)

    def finish(self) -> None:
        """Number micro-batches from 0 again."""
        self._calls.clear()

    def _to_device(self, tensors: Batch | Targets):
        """Return a copy of a dataclass with all its tensors on the device, without waiting."""
        moved = {
            name: self.platform.to_device(value)
            for name, value in vars(tensors).items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(tensors, **moved)

    def _on_this_context_rank(self, batch: Batch) -> Batch:
        """Return this rank's part of the sequences under context parallelism."""
        if self.settings.context_parallel_size == 1:
            return batch
        parts = get_batch_on_this_cp_rank(
            {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        )
        return dataclasses.replace(batch, **parts)
