"""Where the one-pass loss puts the gradient of a parameter."""

import torch


class GradientSink:
    """Adds to a parameter's gradient in place, so that no temporary of the parameter's size is made.

    Under Megatron's DistributedDataParallel the gradient is ``main_grad``, a slice of its buffer; otherwise ``grad``.
    A frozen parameter has no sink: everything given is dropped.
    """

    def __init__(self, parameter: torch.nn.Parameter):
        self.parameter = parameter

    def target(self) -> torch.Tensor | None:
        """Return the tensor gradients are added to, or None for a frozen parameter."""
        if not self.parameter.requires_grad:
            return None
        if getattr(self.parameter, "main_grad", None) is not None:
            return self.parameter.main_grad
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    def add(self, gradient: torch.Tensor) -> None:
        """Add ``gradient``, of the parameter's shape."""
        target = self.target()
        if target is not None:
            target.add_(gradient)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add ``left.T @ right`` to the first rows; shapes [n, rows], [n, h]."""
        target = self.target()
        if target is None:
            return
        if target.dtype == left.dtype:
            target[: left.size(1)].addmm_(left.t(), right)
            return
        # half precision activations, fp32 main gradient: no kernel multiplies halves into fp32 on every device, so rows are done
        # in blocks whose product is no larger than ``left``
        block = max(1, left.size(0) * left.size(1) // right.size(1))
        for start in range(0, left.size(1), block):
            columns = left[:, start : start + block]
            target[start : start + columns.size(1)].add_(columns.t() @ right)
