"""One optimizer step."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.nn.utils import get_total_norm

from megatron_sorted.checkpoint.sharding.optimizer_shards import parts_of
from megatron_sorted.data.batches import Batch
from megatron_sorted.platform.state import current_device
from megatron_sorted.platform.versions import gradients_for_norm
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.step.carrier import halves_of_message
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.observation import numbers_to_observe, read_observation
from megatron_sorted.training.step_result import StepResult
from megatron_sorted.training.watch.nonfinite import describe_nonfinite


def run_schedule(
    model: Model,
    settings: Settings,
    forward_step: Callable,
    micro_batches: list[Batch],
    forward_only: bool,
) -> None:
    """Run the micro-batches through Megatron's schedule for the layout.

    Collective: pipeline, tensor and data groups, as the schedule does.
    """
    forward_step.num_micro_batches = len(micro_batches)
    # every chunk reads the same micro-batches in the same order
    iterators: list[Iterator[Batch]] = [iter(micro_batches) for _ in model.chunks]
    schedule = get_forward_backward_func(
        pp_size=model.groups.pp.size(), vp_size=model.config.virtual_pipeline_model_parallel_size
    )
    schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=settings.seq_length
        * halves_of_message(settings, forward_step.coefficients, forward_only),
        micro_batch_size=settings.micro_batch_size,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(model.groups.pp, model.config),
        pg_collection=model.groups,
    )


def train_step(
    model: Model,
    settings: Settings,
    forward_step: ForwardStep,
    micro_batches: list[Batch],
    coefficients: dict[int, float],
    samples: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Do one optimizer step on this rank's micro-batches and return its result.

    Collective: the schedule's, gradient reduction's and the optimizer's.

    Args:
        model: The model.
        settings: The run.
        forward_step: The forward-step function; its ledger receives the losses, and what else is
            measured of exits.
        micro_batches: This rank's part of the global batch.
        coefficients: {depth: coefficient} of the exits that train at this step.
        samples: Size of the global batch, which the learning-rate schedule counts.
        meanwhile: A function to call once the device has its work up to the gradients, before the
            host waits for it.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    forward_step.coefficients = coefficients
    forward_step.ledger.clear()
    with model.timers("forward-backward"):
        run_schedule(model, settings, forward_step, micro_batches, forward_only=False)
        forward_step.finish_step()
    meanwhile()
    with model.timers("optimizer"):
        return optimizer_step(model, settings, forward_step, samples)


def _grad_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Return the global norm of the gradients, still on the device; shape ().

    Megatron's own function reads it on the host at once.
    Source: ``megatron.core.optimizer.clip_grads.get_grad_norm_fp32``.

    Collective: one all-reduce of a number over the group of the optimizer's gradient statistics,
        for each part of the optimizer.
    """
    squares = []
    for part in parts_of(optimizer):
        gradients = gradients_for_norm(part)
        square = (
            get_total_norm(gradients).float().square()
            if gradients
            else torch.zeros((), device=current_device())
        )
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def optimizer_step(
    model: Model, settings: Settings, forward_step: ForwardStep, samples: int
) -> StepResult:
    """Step the optimizer, unless any rank has a number that is not finite; return the result.

    These are the steps of Megatron's ``ChainedOptimizer.step``, with a check for finite numbers
    between the gradient norm and the update. For its answer the host waits for the device, as
    Megatron's optimizer does to read the norm; nothing else in a step makes it wait. The sums that
    a learned coefficient rule needs come with the answer.

    Collective: the optimizer's, and one all-reduce over all ranks, of a number and of those of
        ``numbers_to_observe``.
    """
    optimizer = model.optimizer
    if optimizer.prepare_grads():  # fp16 overflow on some rank: Megatron lowers the loss scale
        return StepResult(False, float("nan"))
    norm = _grad_norm(optimizer)
    bad = torch.maximum(
        forward_step.ledger.bad_flag(forward_step.device), (~torch.isfinite(norm)).float()
    )
    numbers = torch.cat((bad.double().reshape(1), numbers_to_observe(forward_step)))
    dist.all_reduce(numbers, group=dist.group.WORLD)
    answers = torch.cat((numbers[:1], norm.double().reshape(1), numbers[1:]))
    is_bad, grad_norm, *observed = answers.tolist()
    if is_bad:
        return StepResult(False, grad_norm, describe_nonfinite(forward_step.ledger, grad_norm))
    for part in parts_of(optimizer):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and settings.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=settings.clip_grad, total_norm=grad_norm
            )
    stepped = bool(optimizer.step_with_ready_grads())
    observation = None
    if stepped:
        model.schedule.step(increment=samples)
        observation = read_observation(observed, forward_step)
    return StepResult(stepped, grad_norm, observed=observation)
