"""Products with matrices that are read when they are needed, a block of rows at a time in 32-bit numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from megatron_sorted.conversion.tensors.source import TensorSource

BLOCK_BYTES = (
    8 << 20
)  # stays in the caches between being made and being used; smaller ones would only make threads wait for each other
ROWS_AT_LEAST = 128


def multiply(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``hidden @ weight.T + bias`` in fp32 for a weight [rows, h] of any kind; no fp32 copy of the whole weight is made."""
    if weight.dtype == torch.float32:
        result = functional.linear(hidden, weight)
    else:
        rows = max(ROWS_AT_LEAST, BLOCK_BYTES // (4 * weight.shape[1]))
        block = torch.empty(min(rows, weight.shape[0]), weight.shape[1], dtype=torch.float32)
        result = torch.cat(
            [
                functional.linear(hidden, block[: len(part)].copy_(part))
                for part in weight.split(rows)
            ],
            -1,
        )
    return result if bias is None else result + bias.float()


@dataclass(frozen=True)
class ReadExit:
    """An exit before its head: the logits of many exits would fill the memory, so they are made one exit at a time.

    Attributes:
        normed_bsh: Hidden state after the exit's norm.
        head: Reads the head's matrix [v, h].
    """

    normed_bsh: torch.Tensor
    head: Callable[[], torch.Tensor]

    def logits(self) -> torch.Tensor:
        """Return them [b, s, v] in fp32."""
        with torch.no_grad():
            return multiply(self.normed_bsh, self.head())


class StreamedLinear(torch.nn.Module):
    """A linear layer that holds nothing: its weight is read at each call."""

    def __init__(self, source: TensorSource, name: str, bias: str | None = None):
        super().__init__()
        self.source, self.name, self.bias_name = source, name, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        bias = None if self.bias_name is None else self.source.read(self.bias_name)
        return multiply(hidden, self.source.read(self.name), bias)


class StreamedEmbedding(torch.nn.Module):
    """An embedding that holds nothing: its matrix is read at each call."""

    def __init__(self, source: TensorSource, name: str):
        super().__init__()
        self.source, self.name = source, name

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens' rows in fp32."""
        return self.source.read(self.name)[tokens].float()
