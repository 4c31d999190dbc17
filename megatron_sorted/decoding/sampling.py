"""Which token comes next: greedily, or at random by noise that belongs to a place in a text and to nothing else.

The token at a place is argmax over tokens of log p - log e, with e independent and exponential: a sample of p (the exponential race, or
Gumbel-max). The noise e of a place depends on seed, row and position alone. So a drafted token and the one the full model chooses at the
same place share their noise, which makes them agree often (Daliri, Musco and Suresh, arXiv 2408.07978), and the full model's choice does
not depend on what was drafted: speculation says, token for token, what decoding without it says with the same seed.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.transfer import to_device
from megatron_sorted.decoding.strategies import MEASURES, SamplingParameters


class Sampler:
    """Chooses tokens; one for all depths of a batch.

    Args:
        sampling: How.
        rows: What tells rows apart in the noise; a row's text does not depend on which others are in the batch.
    """

    def __init__(self, sampling: SamplingParameters, rows: Sequence[int]):
        self.sampling, self.rows = sampling, list(rows)
        self._noise: dict[tuple[int, int], Tensor] = {}

    def choose(
        self, logits_bnv: Tensor, positions: Sequence[Sequence[int]], seen_bnv: Tensor | None = None
    ) -> Tensor:
        """Return the chosen tokens [b, n].

        Args:
            logits_bnv: After the tokens before.
            positions: Of the tokens to choose, by row; needed for noise.
            seen_bnv: Whether a token is in the text before it; needed for a penalty.
        """
        return self.scores(logits_bnv, positions, seen_bnv).argmax(-1)

    def scores(
        self, logits_bnv: Tensor, positions: Sequence[Sequence[int]], seen_bnv: Tensor | None = None
    ) -> Tensor:
        """Return numbers whose order is that in which tokens are chosen: log p - log e, less what is the same for all tokens.

        Arguments as for `choose`.
        """
        sampling = self.sampling
        logits = penalise(logits_bnv, seen_bnv, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return logits
        logits = logits.float()
        # the largest becomes 0, which no temperature, however low, makes infinite
        logits = cut(
            (logits - logits.amax(-1, keepdim=True)) / sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )
        return logits + self._noise_of(positions, logits)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        self.rows = [self.rows[row] for row in rows]

    def forget(self, before: Sequence[int]) -> None:
        """Forget the noise of places before these positions, by row: they are decided."""
        limits = dict(zip(self.rows, before, strict=True))
        self._noise = {
            (row, position): noise
            for (row, position), noise in self._noise.items()
            if position >= limits.get(row, 1 << 62)
        }

    def _noise_of(self, positions: Sequence[Sequence[int]], like: Tensor) -> Tensor:
        rows = []
        for row, places in zip(self.rows, positions, strict=True):
            for position in places:
                if (row, position) not in self._noise:
                    self._noise[row, position] = to_device(
                        gumbel(self.sampling.seed, row, position, like.size(-1)), like.device
                    )
                rows.append(self._noise[row, position])
        return torch.stack(rows).view(like.shape)


def gumbel(seed: int, row: int, position: int, size: int) -> Tensor:
    """Return Gumbel noise, -log e of exponential e, that depends on seed, row and position alone; alike on any device."""
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
    """Return logits with those of tokens that were ``seen`` made less likely; all of them as they are for a penalty of 1."""
    if penalty == 1.0 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def cut(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return logits with -inf for tokens that are not among the ``top_k``, then not among those that make up ``top_p``.

    In that order and with transformers' rules: tokens as likely as the last of the k stay, and the token that reaches ``top_p`` stays.
    """
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(
            logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf")
        )
    if top_p is not None and top_p < 1:
        ordered, place = logits.sort(dim=-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(
            torch.zeros_like(dropped).scatter(-1, place, dropped), float("-inf")
        )
    return logits


def highest_probability(logits: Tensor) -> Tensor:
    """Return the probability of the most likely token (Schuster et al., CALM, arXiv 2207.07061; Sorted LLaMA; S2D)."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def margin(logits: Tensor) -> Tensor:
    """Return the probability of the most likely token less that of the next (CALM, arXiv 2207.07061, section 3.1)."""
    two = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return two[..., 0] - two[..., 1]


def certainty(logits: Tensor) -> Tensor:
    """Return 1 - entropy / log(vocabulary): 1 for one sure token, 0 where all are alike (BranchyNet, arXiv 1709.01686, by entropy)."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
    return 1 - entropy / math.log(logits.size(-1))


SURENESS: dict[str, Callable[[Tensor], Tensor]] = dict(
    zip(MEASURES, (highest_probability, margin, certainty), strict=True)
)
"""How sure an exit is of its next token, by measure; each [..., v] -> [...], in 0..1, higher is surer. A token leaves where it is above
the exit's threshold."""
