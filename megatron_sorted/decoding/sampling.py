"""The choice of the next token, greedy or random.

The token at a position is argmax over tokens of log p - log e, with e independent and exponential:
a sample of p (the exponential race, or Gumbel-max). The noise e depends on seed, row and position
alone. A drafted token and the full model's choice at the same position therefore share their noise
and often agree (Daliri, Musco and Suresh, arXiv 2408.07978), and the full model's choice does not
depend on the draft: speculative decoding returns the text of plain decoding with the same seed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.transfer import to_device
from megatron_sorted.decoding.strategies import SamplingParameters


class Sampler:
    """The choice of tokens for one batch, shared by all its exits.

    Args:
        sampling: How tokens are chosen.
        rows: Number of each row in the noise; a row's text does not depend on the other rows.
    """

    def __init__(self, sampling: SamplingParameters, rows: Sequence[int]):
        self.sampling, self.rows = sampling, list(rows)
        self._noise: dict[tuple[int, int], Tensor] = {}

    def choose(
        self, logits_bnv: Tensor, positions: Sequence[Sequence[int]], seen_bnv: Tensor | None = None
    ) -> Tensor:
        """Return the chosen tokens [b, n].

        Args:
            logits_bnv: Logits of the tokens to choose.
            positions: Positions of the tokens to choose, by row; needed for noise.
            seen_bnv: Whether a token is in the text before; needed for a repetition penalty.
        """
        return self.scores(logits_bnv, positions, seen_bnv).argmax(-1)

    def scores(
        self, logits_bnv: Tensor, positions: Sequence[Sequence[int]], seen_bnv: Tensor | None = None
    ) -> Tensor:
        """Return scores whose largest is chosen: log p - log e, up to a constant of the position.

        Arguments as for `choose`.
        """
        sampling = self.sampling
        logits = penalise(logits_bnv, seen_bnv, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return logits
        logits = logits.float()
        # the largest becomes 0, so that no temperature, however low, makes it infinite
        logits = keep_likely(
            (logits - logits.amax(-1, keepdim=True)) / sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )
        return logits + self._noise_of(positions, logits)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        self.rows = [self.rows[row] for row in rows]

    def forget(self, before: Sequence[int]) -> None:
        """Drop the noise before these positions, by row: tokens there are final."""
        limits = dict(zip(self.rows, before, strict=True))
        self._noise = {
            (row, position): noise
            for (row, position), noise in self._noise.items()
            if position >= limits.get(row, 1 << 62)
        }

    def _noise_of(self, positions: Sequence[Sequence[int]], like: Tensor) -> Tensor:
        rows = []
        for row, row_positions in zip(self.rows, positions, strict=True):
            for position in row_positions:
                if (row, position) not in self._noise:
                    self._noise[row, position] = to_device(
                        gumbel(self.sampling.seed, row, position, like.size(-1)), like.device
                    )
                rows.append(self._noise[row, position])
        return torch.stack(rows).view(like.shape)


def gumbel(seed: int, row: int, position: int, size: int) -> Tensor:
    """Return Gumbel noise, -log e of exponential e, the same on every device."""
    mixed = (
        seed * 0x9E3779B97F4A7C15
        + row * 0xC2B2AE3D27D4EB4F
        + position * 0x165667B19E3779F9
        + 0x27D4EB2F165667C5
    ) % (1 << 64)
    mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    generator = torch.Generator().manual_seed((mixed ^ (mixed >> 32)) >> 1)
    return -torch.empty(size).exponential_(generator=generator).log()


def penalise(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Apply the repetition penalty to the logits of tokens that were ``seen``."""
    if penalty == 1.0 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set the logits of tokens outside ``top_k``, then of those outside ``top_p``, to -inf.

    Order and rules are those of transformers: tokens as likely as the k-th stay, and the token that
    reaches ``top_p`` stays.
    """
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(
            logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf")
        )
    if top_p is not None and top_p < 1:
        ordered, tokens = logits.sort(dim=-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(
            torch.zeros_like(dropped).scatter(-1, tokens, dropped), float("-inf")
        )
    return logits
