"""The average of this rank's weights over steps, in fp32.

Each rank averages the weights that its optimizer updates, and nothing else: no message is sent, and
frozen weights need no memory, since they are their own average. Copies of a parameter on several
stages stay equal, since their weights are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_sorted.checkpoint.sharding.main_weights import main_weights
from megatron_sorted.checkpoint.sharding.optimizer_shards import parts_of
from megatron_sorted.settings.averaging import Averaging
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.step_result import TrainedStep


class WeightAverage:
    """The average of the weights of some steps, and an observer that adds to it.

    Attributes:
        tensors: The average of each of this rank's weights (``main_weights``): one fp32 copy of
            them.
        averaging: The steps that are averaged; None for an average that is only loaded.
        has_begun: Whether ``tensors`` hold an average, of a step or of a checkpoint.
    """

    def __init__(self, model: Model, averaging: Averaging | None):
        """Allocate the average, so that a lack of memory shows at the start."""
        self.model, self.averaging, self.has_begun = model, averaging, False
        self._weights = main_weights(model.optimizer)
        self.tensors = [torch.zeros_like(weight.tensor.detach()) for weight in self._weights]

    def after(self, step: TrainedStep) -> None:
        """Add the weights after a step, if they are to be averaged.

        A step that the optimizer skipped counts too: its weights are those of the step before.
        """
        if self.averaging is not None and self.averaging.includes(step.number):
            with self.model.timers("averaging"):
                self.add(self.averaging.share(step.number))

    @torch.no_grad()
    def add(self, share: float) -> None:
        """Give the weights of now this share in the average; the host reads no number."""
        self.has_begun = True
        if self.tensors:  # a rank may train nothing
            torch._foreach_lerp_(self.tensors, self._now(), share)

    def _now(self) -> list[torch.Tensor]:
        return [weight.tensor.detach() for weight in self._weights]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model its averaged weights for a block, and then the last ones back, bit by bit.

        The two are exchanged tensor by tensor, in the memory of one more.

        Collective: with the distributed optimizer, before and after the block, gathers of all
            parameters over data parallel groups; every process must call it.
        """
        self._finish_gathers()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(self.tensors, self._now(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for part in parts_of(self.model.optimizer):
            is_stub = getattr(part, "is_stub_optimizer", False)
            if hasattr(part, "_copy_main_params_to_model_params") and not is_stub:
                part._copy_main_params_to_model_params()
        for chunk in self.model.chunks:
            if chunk.ddp_config.use_distributed_optimizer:
                chunk.start_param_sync(force_sync=True)

    def _finish_gathers(self) -> None:
        """Wait for parameters that are being gathered; a gather under way would be taken for ours.

        Collective: with overlapped gathering, one gather of all parameters.
        """
        for chunk in self.model.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
