"""Products with matrices that are read on use, computed a block of rows at a time in fp32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from megatron_sorted.conversion.tensors.source import TensorSource

# A block stays in the caches until it is used; smaller ones would make threads wait for each other.
BLOCK_BYTES = 8 << 20
ROWS_AT_LEAST = 128


def multiply(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``hidden @ weight.T + bias`` in fp32, without an fp32 copy of the weight [rows, h]."""
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
class StreamedExit:
    """An exit whose logits are computed on demand, as those of all exits would fill the memory.

    Attributes:
        normed_bsh: The hidden state after the exit's norm.
        head: A function that reads the head's matrix [v, h].
    """

    normed_bsh: torch.Tensor
    head: Callable[[], torch.Tensor]

    def logits(self) -> torch.Tensor:
        """Compute the logits [b, s, v] in fp32."""
        with torch.no_grad():
            return multiply(self.normed_bsh, self.head())


class StreamedLinear(torch.nn.Module):
    """A linear layer without parameters: it reads its weight at each call."""

    def __init__(self, source: TensorSource, name: str, bias: str | None = None):
        super().__init__()
        self.source, self.name, self.bias_name = source, name, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the product, plus the bias if there is one."""
        bias = None if self.bias_name is None else self.source.read(self.bias_name)
        return multiply(hidden, self.source.read(self.name), bias)


class StreamedEmbedding(torch.nn.Module):
    """An embedding without parameters: it reads its matrix at each call."""

    def __init__(self, source: TensorSource, name: str):
        super().__init__()
        self.source, self.name = source, name

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens' rows in fp32."""
        return self.source.read(self.name)[tokens].float()
