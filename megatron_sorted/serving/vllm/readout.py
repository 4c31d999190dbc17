"""What reads the hidden state of an exit inside vLLM: the target's norm and head, or its own."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Readout:
    """The modules that read the hidden state at an exit.

    Attributes:
        depth: The exit's depth.
        target: The target model.
    """

    depth: int
    target: nn.Module

    def norm(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return the normed sum of two states [n, h], which vLLM's fused norm may overwrite."""
        return self.target.model.norm(hidden, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, v] of normed states [n, h]. Collective: tensor parallel."""
        return self.target.compute_logits(hidden)
