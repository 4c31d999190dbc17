"""The accumulation of parameter gradients that the one-pass loss computes by itself."""

import torch


class GradientSink:
    """The gradient of a parameter, added to in place, without a temporary of the parameter's size.

    Under Megatron's DistributedDataParallel the gradient is ``main_grad``, a slice of its buffer;
    otherwise ``grad``. Gradients of a frozen parameter are dropped.
    """

    def __init__(self, parameter: torch.nn.Parameter):
        self.parameter = parameter

    def target(self) -> torch.Tensor | None:
        """Return the tensor that gradients are added to, or None for a frozen parameter."""
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
        """Add ``left.T @ right`` to the gradient's first rows; shapes [n, rows], [n, h]."""
        target = self.target()
        if target is None:
            return
        if target.dtype == left.dtype:
            target[: left.size(1)].addmm_(left.t(), right)
            return
        # Half precision activations, fp32 main gradient: not every device has a kernel that
        # multiplies halves into fp32, so rows are added in blocks whose product is no larger than
        # ``left``.
        block = max(1, left.size(0) * left.size(1) // right.size(1))
        for start in range(0, left.size(1), block):
            columns = left[:, start : start + block]
            target[start : start + columns.size(1)].add_(columns.t() @ right)
