"""The micro-batches of a step as chunks take them: numbered, cut, on the device."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_sorted.data.batches import Batch
from megatron_sorted.loss.attached import AttachedExit
from megatron_sorted.loss.cross_entropy import Targets
from megatron_sorted.model.attention import make_attention_mask
from megatron_sorted.model.chunk import SortedChunk
from megatron_sorted.model.config import parameter_dtype
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.versions import known_arguments
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.carrier import TeacherSlot


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch in one chunk. All attributes but the first six are for training.

    Attributes:
        chunk: The model chunk.
        batch: The tensors, on the host.
        targets: The trained tokens, on the device; None where the chunk has no exit.
        number: The micro-batch's number within the step, from 0.
        attention_mask: The mask in the layers' form; kept where exits have layers of their own.
        deepest: The last layer that is run.
        with_choice: Whether exits also compute the most likely token of every counted token.
        with_confidence: Whether they also compute its probability.
        coefficients: {depth: coefficient} of the exits that train.
        factor: Scale of an exit's gradient, see ``LossScaling.factor``.
        compares_gradients: Whether an exit's gradient is compared with that of the deeper exits.
        teacher_slot: The place of the exits' teacher; None where no exit is taught.
        attached: The exits attached to the chunk's output, from shallow to deep.
    """

    chunk: SortedChunk
    batch: Batch
    targets: Targets | None
    number: int
    attention_mask: torch.Tensor | None
    deepest: int
    with_choice: bool = True
    with_confidence: bool = False
    coefficients: Mapping[int, float] = field(default_factory=dict)
    factor: torch.Tensor | None = None
    compares_gradients: bool = False
    teacher_slot: TeacherSlot | None = None
    attached: list[AttachedExit] = field(default_factory=list)


@dataclass(frozen=True)
class ChunkInputs:
    """The inputs of a chunk's layers for one micro-batch, on the device.

    Attributes:
        batch: The micro-batch.
        attention_mask: The mask in the layers' form.
        num_tokens: Number of trained tokens, for Megatron's loss function; int32 [].
    """

    batch: Batch
    attention_mask: torch.Tensor | None
    num_tokens: torch.Tensor

    def run(self, chunk: torch.nn.Module, micro: MicroBatch, at_exit: Callable) -> torch.Tensor:
        """Run the chunk and return its output; see ``SortedChunk.forward`` for ``at_exit``."""
        return chunk(
            tokens_bs=self.batch.tokens_bs,
            positions_bs=self.batch.positions_bs,
            attention_mask=self.attention_mask,
            at_exit=at_exit,
            deepest=micro.deepest,
        )

    def loss_function(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Return the triple that Megatron's schedules expect: loss, number of tokens, report."""
        return loss, self.num_tokens, {}


def count_targets(batch: Batch) -> Targets:
    """Return the trained tokens in (sequence, batch) order; without an index where all train.

    The batch must still be on the host: to look for them on a device would make the host wait.
    """
    mask = batch.loss_mask_bs.t().reshape(-1)
    labels = batch.labels_bs.t().reshape(-1)
    index = mask.nonzero().squeeze(1)
    if index.numel() == mask.numel():
        return Targets(None, labels, mask)
    return Targets(index, labels[index], mask[index])


@dataclass
class InputBuilder:
    """Numbers, cuts and copies the micro-batches of a step for each chunk of this rank.

    Every chunk takes the same micro-batches in the same order. The host never waits for the device:
    it reads what it must know of a batch before the batch is copied.

    Attributes:
        settings: The run.
        platform: The devices of the run.
        context_group: The context parallel ranks, each of which takes a part of every sequence.
    """

    settings: Settings
    platform: Platform
    context_group: dist.ProcessGroup
    _calls: dict[int, int] = field(default_factory=dict)

    def build(
        self, whole: Batch, chunk: SortedChunk, num_micro_batches: int
    ) -> tuple[MicroBatch, ChunkInputs]:
        """Return the next micro-batch of a chunk.

        Args:
            whole: The batch, on the host, the same on all context parallel ranks.
            chunk: The model chunk.
            num_micro_batches: Number of micro-batches of a step.
        """
        settings = self.settings
        batch = self._on_this_context_rank(whole)
        number = self._calls.get(chunk.layout.chunk, 0) % num_micro_batches
        self._calls[chunk.layout.chunk] = number + 1
        targets = self._to_device(count_targets(batch)) if chunk.depths else None
        moved = self._to_device(batch)
        mask = make_attention_mask(
            moved.tokens_bs, moved.pieces_bs, settings.sliding_window, parameter_dtype(settings)
        )
        # filled by the device: torch.tensor would copy from the host and wait
        num_tokens = torch.full(
            (), batch.num_tokens, dtype=torch.int, device=self.platform.device()
        )
        kept_mask = mask if settings.use_exit_block else None
        micro = MicroBatch(chunk, batch, targets, number, kept_mask, settings.num_layers)
        return micro, ChunkInputs(moved, mask, num_tokens)

    def finish(self) -> None:
        """Start to number micro-batches from 0 again."""
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
            {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)},
            cp_group=self.context_group,
            **known_arguments(get_batch_on_this_cp_rank, is_hybrid_cp=False),
        )
        return dataclasses.replace(batch, **parts)
