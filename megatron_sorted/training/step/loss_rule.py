"""What Megatron's schedules and reductions make of a loss, so that exits on any stage follow the same rule as the last one."""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model


@dataclass(frozen=True)
class LossRule:
    """The loss rule in force: the mean over all trained tokens of the global batch, or that of the micro-batches' means.

    Attributes:
        settings: The run.
        model: Its chunks and optimizer.
    """

    settings: Settings
    model: Model

    def loss_scale(self) -> torch.Tensor:
        """Return the fp16 loss scale, else 1, as a scalar on the device."""
        scale = torch.ones((), dtype=torch.float32, device=current_device())
        if self.model.config.grad_scale_func is not None:
            scale = self.model.config.grad_scale_func(scale).reshape(())
        return scale

    def factor(self, num_tokens: int, num_micro_batches: int) -> torch.Tensor:
        """Return what Megatron's schedule multiplies the last stage's loss gradient by, for exits on any stage.

        Source: megatron.core.pipeline_parallel.schedules.forward_step_calc_loss and backward_step, for a loss function that
        returns (sum, tokens, report): the fp16 loss scale; without per-token loss also 1 / tokens / micro-batches.
        """
        factor = self.loss_scale()
        if not self.settings.calculate_per_token_loss:
            factor = factor / max(num_tokens, 1) / num_micro_batches
        return factor

    def gradient_divisor(self) -> torch.Tensor:
        """Return what a step's gradients are still to be divided by when the schedule is done, as a scalar on the device.

        The fp16 loss scale; and with per-token loss the trained tokens of the global batch, else the ranks that share it.

        Source: megatron.core.distributed.finalize_model_grads, which counts the tokens; DistributedDataParallel, which takes
        the mean over data and context parallel ranks.
        """
        if self.settings.calculate_per_token_loss:
            return self.loss_scale() * self.model.num_tokens.clamp(min=1)
        return self.loss_scale() * parallel_state.get_data_parallel_world_size(
            with_context_parallel=True
        )
