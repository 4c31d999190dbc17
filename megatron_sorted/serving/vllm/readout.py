"""What reads the hidden state of an exit inside vLLM: the target's norm and head, or its own."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Readout:
    """The modules that read the hidden state at an exit.

    Attributes:
        target: The target model, whose head is used unless the exit has one.
        norm: The norm, with the exit's parts before it.
        head: The exit's own output matrix, if any.
    """

    target: nn.Module
    norm: nn.Module
    head: nn.Module | None = None

    def logits(self, normed: Tensor) -> Tensor:
        """Return the logits [n, v] of normed states [n, h]. Collective: tensor parallel."""
        if self.head is None:
            return self.target.compute_logits(normed)
        return self.target.logits_processor(self.head, normed)


def readout_at(target: nn.Module, depth: int) -> Readout:
    """Return what reads an exit of a loaded target."""
    return Readout(target, target.model.norm)
