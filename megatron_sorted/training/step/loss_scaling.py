"""The scaling that Megatron applies to the last stage's loss, reproduced for exits on any stage."""

from dataclasses import dataclass

import torch

from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model


@dataclass(frozen=True)
class LossScaling:
    """The scaling of losses and gradients of a run.

    With per-token loss a step's loss is the mean over all trained tokens of the global batch, else
    the mean of the micro-batches' means.

    Attributes:
        settings: The run.
        model: The chunks and optimizer of this rank.
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
        """Return the factor of a micro-batch's loss gradient in Megatron's schedule.

        It is the fp16 loss scale; without per-token loss also 1 / tokens / micro-batches.

        Source: megatron.core.pipeline_parallel.schedules.forward_step_calc_loss and backward_step,
        for a loss function that returns (sum, tokens, report).
        """
        factor = self.loss_scale()
        if not self.settings.calculate_per_token_loss:
            factor = factor / max(num_tokens, 1) / num_micro_batches
        return factor

    def gradient_divisor(self) -> torch.Tensor:
        """Return the divisor that makes gradients after the schedule those of the step's loss.

        It is the fp16 loss scale, times the trained tokens of the global batch with per-token loss,
        else times the number of ranks that share the batch; a scalar on the device.

        Source: megatron.core.distributed.finalize_model_grads, which counts the tokens;
        DistributedDataParallel, which takes the mean over data and context parallel ranks.
        """
        if self.settings.calculate_per_token_loss:
            return self.loss_scale() * self.model.num_tokens.clamp(min=1)
        return self.loss_scale() * self.model.groups.dp_cp.size()
