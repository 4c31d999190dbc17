"""Draft lengths by load: how many tokens to draft while a number of texts is written at once.

A draft saves passes over the weights, which one text alone waits for. Many texts share each such
pass already, and verifying their drafts costs arithmetic: the more texts, the shorter the draft
that pays. With B texts, each drafting k tokens that are accepted with probability a,

    tokens a second = B (1 + a + ... + a^k) / (k D(B) + V(B, k)),

the expected number of tokens of speculative decoding (Leviathan et al., arXiv 2211.17192, equation
1) over measured seconds: D(B) of a drafting pass of B tokens, V of the pass that verifies.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.strategies import Strategy, draft_depths
from megatron_sorted.decoding.tuning.costs import measure_costs

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of tokens of a pass that are measured."""
ROUNDS = 2
PRIOR, PRIOR_WEIGHT = 0.75, 8.0
"""Share of drafted tokens that is accepted, before anything is known, and the tokens it counts."""
MEMORY = 0.995
"""Weight of what was known, after each new step."""


@dataclass
class Acceptance:
    """The share of drafted tokens that are accepted, over the latest steps.

    Attributes:
        accepted, tried: Weighted numbers of tokens.
    """

    accepted: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count a step: the tokens behind the first refused one were not tried."""
        if num_drafted:
            self.accepted = MEMORY * self.accepted + num_accepted
            self.tried = MEMORY * self.tried + min(num_accepted + 1, num_drafted)

    @property
    def share(self) -> float:
        """Return the share."""
        return self.accepted / self.tried


class DraftLengths:
    """Chooses how many tokens each strategy drafts.

    Args:
        network: The model.
        draft: Another model that drafts; None without one.
        num_texts: Function that returns the number of texts that are being written.
    """

    def __init__(self, network: Network, draft: Network | None, num_texts: Callable[[], int]):
        self.num_texts = num_texts
        depths, length = network.depths, min(256, network.max_positions // 2)
        widths = tuple(width for width in WIDTHS if width < network.max_positions - length)
        self.costs = measure_costs(network, depths, length, widths, depths[:-1], ROUNDS)
        self.drafting = (
            None
            if draft is None
            else measure_costs(draft, draft.depths, length, widths, (), ROUNDS)
        )
        self.accepted: dict[Strategy, Acceptance] = {}

    def add(self, strategy: Strategy, num_drafted: int, num_accepted: int) -> None:
        """Count a step of a strategy."""
        self.accepted.setdefault(strategy, Acceptance()).add(num_drafted, num_accepted)

    def choice(self, strategy: Strategy) -> Callable[[int], int]:
        """Return the function from the draft length that a strategy wants to the one that pays."""
        acceptance = self.accepted.setdefault(strategy, Acceptance())
        last: tuple[tuple[int, int, float], int] | None = None

        def choose(wanted: int) -> int:
            nonlocal last
            texts = max(1, self.num_texts())
            key = wanted, texts, round(acceptance.share, 2)
            if last is None or last[0] != key:
                last = key, self.best(strategy, *key)
            return last[1]

        return choose

    def best(self, strategy: Strategy, wanted: int, num_texts: int, share: float) -> int:
        """Return the draft length, at most ``wanted``, with the most tokens a second."""
        depth = draft_depths(strategy)[0]
        return max(
            range(wanted + 1), key=lambda length: self._speed(depth, length, num_texts, share)
        )

    def _speed(self, depth: int, length: int, num_texts: int, share: float) -> float:
        """Return the expected tokens a second of all texts."""
        costs, host, last = self.costs, self.costs.host, max(self.costs.layers)
        if not length:
            return num_texts / (costs.of_pass(last, num_texts) + num_texts * host.token)
        tokens = sum(share**place for place in range(length + 1))
        verified = num_texts * (length + 1)
        # the layers below an exit that drafts have read all tokens but the last one
        lower = 0 if self.drafting is not None else depth
        seconds = costs.of_head(last, verified) + sum(
            costs.of_layers(stop, num_texts if stop <= lower else verified) for stop in costs.layers
        )
        drafter = self.drafting or costs
        seconds += length * drafter.of_pass(depth, num_texts)
        seconds += num_texts * (host.chain + length * host.draft)
        return num_texts * tokens / seconds
