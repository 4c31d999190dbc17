"""What the engine is compared with outside of vLLM: our decoder's drafts, exact probabilities."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_sorted.decoding.generate import stream
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.strategies import SelfSpeculative, SortedSpeculative, Strategy
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.serving.vllm.options import EngineOptions

ROWS = 16
Events = list[tuple[int, int]]
"""Numbers of drafted and of accepted tokens of each verification of a text."""


def strategy_of(options: EngineOptions) -> Strategy:
    """Return our decoder's strategy of the same drafts."""
    if options.strategy == "self_speculative":
        return SelfSpeculative(options.depths[0], options.num_draft_tokens)
    return SortedSpeculative(
        options.depths, options.thresholds, options.num_draft_tokens, options.measure
    )


def our_events(
    network: Network,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    options: EngineOptions,
) -> list[Events]:
    """Return our decoder's verifications while it writes the same texts.

    vLLM chooses a text's first token without a draft, so our decoder begins after it.

    Args:
        network: The model.
        prompts: The prompts.
        texts: The engine's texts, whose lengths say where verifications end.
        options: The plug-in's options.
    """
    slack, kept = options.num_draft_tokens + 2, []
    for start in range(0, len(prompts), ROWS):
        some = range(start, min(start + ROWS, len(prompts)))
        begun = [[*prompts[place], texts[place][0]] for place in some]
        limits = Limits(max(len(texts[place]) for place in some) + slack)
        events: list[Events] = [[] for _ in some]
        written = [1] * len(begun)
        for added in stream(network, begun, strategy_of(options), None, limits):
            if written[added.row] < len(texts[start + added.row]):
                events[added.row].append((added.num_drafted, added.num_accepted))
                written[added.row] += added.num_accepted + 1
        kept += events
    return kept


def without_empty(events: Sequence[Sequence[int]]) -> Events:
    """Return the verifications that had a draft, as pairs; vLLM keeps no others.

    >>> without_empty([[2, 1], [0, 0], [1, 1]])
    [(2, 1), (1, 1)]
    """
    return [(drafted, accepted) for drafted, accepted in events if drafted]


@torch.inference_mode()
def later_pairs_expected(
    model: Path, prompt: Sequence[int], temperature: float, top_k: int
) -> dict[tuple[int, int], float]:
    """Return the probability of every pair of second and third tokens, by transformers' own model.

    The first token is summed over: vLLM chooses it without a draft.
    """
    base, _ = load_with_exits(model, torch.float32)

    def distribution(rows: list[list[int]]) -> torch.Tensor:
        logits = torch.cat(
            [base(torch.tensor(rows[start : start + 64])).logits[:, -1]
             for start in range(0, len(rows), 64)]
        ).float() / temperature  # fmt: skip
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        return logits.masked_fill(logits < lowest, float("-inf")).softmax(-1)

    def continued(rows: list[list[int]]) -> list[tuple[list[int], float]]:
        return [
            ([*row, token], float(shares[token]))
            for row, shares in zip(rows, distribution(rows), strict=True)
            for token in shares.nonzero()[:, 0].tolist()
        ]

    ones = continued([list(prompt)])
    first_share = {tuple(row): share for row, share in ones}
    twos = continued([row for row, _ in ones])
    expected: dict[tuple[int, int], float] = {}
    second_share = {tuple(row): first_share[tuple(row[:-1])] * share for row, share in twos}
    for row, share in continued([row for row, _ in twos]):
        pair = row[-2], row[-1]
        expected[pair] = expected.get(pair, 0.0) + second_share[tuple(row[:-1])] * share
    return expected


@torch.inference_mode()
def margin(network_model: torch.nn.Module, tokens: Sequence[int], one: int, two: int) -> float:
    """Return by how much transformers' logit of one token is above that of another, relative.

    Args:
        network_model: transformers' model.
        tokens: The text before the token.
        one, two: The tokens.
    """
    logits = network_model(torch.tensor([list(tokens)])).logits[0, -1].float()
    return float((logits[one] - logits[two]).abs() / logits.abs().max())
