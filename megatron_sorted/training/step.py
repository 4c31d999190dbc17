"""One optimizer step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sorted.data.batches import Batch
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import Model
from megatron_sorted.training.forward_step import ForwardStep


@dataclass(frozen=True)
class StepResult:
    """What the optimizer said: whether it stepped (fp16 may skip), and the global gradient norm before clipping."""

    stepped: bool
    grad_norm: float


def finalize_gradients(model: Model) -> Callable:
    """Returns the function that Megatron's schedules call when all micro-batches are done.

    Megatron's own reduction first; then gradients of shared copies are added up. Both are linear, so the order does not matter
    for the sum; it matters for the distributed optimizer (``SharedCopies.sum_gradients``).

    Collective: the returned function communicates over data, tensor and pipeline groups.
    """

    def finalize(chunks: list, num_tokens: torch.Tensor | None = None, **options) -> None:
        finalize_model_grads(chunks, num_tokens, **options)
        model.num_tokens = num_tokens  # by now summed over all ranks
        for copies in model.copies:
            copies.sum_gradients()

    return finalize


def run_schedule(model: Model, settings: Settings, forward_step: ForwardStep, micro_batches: list[Batch], forward_only: bool) -> None:
    """Passes the micro-batches through Megatron's schedule for the layout.

    Collective: pipeline, tensor and data groups, as the schedule does.
    """
    forward_step.num_micro_batches = len(micro_batches)
    # every chunk reads the same micro-batches in the same order
    iterators: list[Iterator[Batch]] = [iter(micro_batches) for _ in model.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        forward_only=forward_only,
    )


def train_step(model: Model, settings: Settings, forward_step: ForwardStep, micro_batches: list[Batch],
               coefficients: dict[int, float], samples: int) -> StepResult:
    """Returns the result of one optimizer step on this rank's micro-batches.

    Collective: the schedule's, gradient reduction's and the optimizer's.

    Args:
        model: The model.
        settings: The run.
        forward_step: The forward-step function; its ledger receives the losses, and what else is measured of exits.
        micro_batches: This rank's part of the global batch.
        coefficients: {depth: coefficient} of the exits that train at this step.
        samples: Size of the global batch, by which the learning-rate schedule moves on.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    forward_step.coefficients = coefficients
    run_schedule(model, settings, forward_step, micro_batches, forward_only=False)
    forward_step.finish_step()
    stepped, grad_norm, _ = model.optimizer.step()
    if stepped:
        model.schedule.step(increment=samples)
    return StepResult(bool(stepped), float(grad_norm) if grad_norm is not None else float("nan"))
