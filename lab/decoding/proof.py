"""Speculation compared with the full model: token by token with drawn settings, in distribution."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import Sampler
from megatron_sorted.decoding.strategies import (
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    Strategy,
    TreeSpeculative,
)
from megatron_sorted.decoding.texts import Limits


@dataclass(frozen=True)
class Difference:
    """A text of a strategy that differs from the full model's.

    Attributes:
        strategy: The strategy that wrote it.
        place: Place of the first token that differs, from the beginning of the written text.
        margin: Full's logit of its own token there minus that of the other, in its own precision.
        scale: The largest absolute logit there.
    """

    strategy: Strategy
    place: int
    margin: float
    scale: float


@dataclass
class ProofComparison:
    """The counts and differences of a comparison.

    Attributes:
        num_tokens, num_texts: Tokens and texts that speculation wrote.
        num_same: Tokens before the first difference of their text.
        by_strategy: Tokens of each strategy.
        finishes: The number of texts that ended for each reason.
        drafted, accepted: Draft tokens; they show that drafts were both accepted and rejected.
        differences: Texts that differ from full's.
    """

    num_tokens: int = 0
    num_texts: int = 0
    num_same: int = 0
    by_strategy: dict[str, int] = field(default_factory=dict)
    finishes: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    differences: list[Difference] = field(default_factory=list)


def draw_strategy(chance: random.Random, depths: Sequence[int]) -> Strategy:
    """Draw a speculative strategy: exits, thresholds, draft lengths, trees."""
    kind = chance.choice((SelfSpeculative, SortedSpeculative, TreeSpeculative))
    if kind is SelfSpeculative:
        return SelfSpeculative(chance.choice(depths), chance.randint(1, 12))
    some = tuple(sorted(chance.sample(list(depths), chance.randint(1, len(depths)))))
    thresholds = tuple(round(chance.random(), 3) for _ in some)
    if kind is SortedSpeculative:
        return SortedSpeculative(
            some, thresholds, chance.randint(1, 12), chance.choice(list(CONFIDENCE))
        )
    return TreeSpeculative(
        some,
        thresholds[:-1],
        chance.randint(1, 6),
        chance.randint(1, 4),
        chance.randint(1, 24),
        chance.randint(0, 3),
        chance.choice(list(CONFIDENCE)),
    )


@dataclass(frozen=True)
class Draws:
    """Bounds and options of the drawn batches.

    Attributes:
        most_new_tokens: The largest number of tokens of a text.
        end_ids: Tokens after which texts end.
        to_text: A decoder of tokens; with it some texts end at stop sequences from full's own text.
        sampled: Share of batches that are sampled instead of greedy.
        most_rows: The largest number of texts of a batch.
    """

    most_new_tokens: int = 96
    end_ids: frozenset[int] = frozenset()
    to_text: Callable[[list[int]], str] | None = None
    sampled: float = 0.3
    most_rows: int = 8


def compare(
    network: Network,
    prompts: Sequence[list[int]],
    num_tokens: int,
    seed: int,
    draws: Draws,
    what: str = "lossless",
) -> ProofComparison:
    """Compare drawn strategies, batches, limits and stop sequences with full.

    Args:
        network: The model.
        prompts: The prompts of which batches are drawn.
        num_tokens: The least number of tokens to compare.
        seed: The seed of everything that is drawn.
        draws: Bounds and options of the batches.
        what: The name on the progress bar.
    """
    chance, result = random.Random(seed), ProofComparison()
    with tqdm(total=num_tokens, desc=what, unit="token") as bar:
        while result.num_tokens < num_tokens:
            some = [chance.choice(prompts) for _ in range(chance.randint(1, draws.most_rows))]
            sampling = (
                SamplingParameters(
                    chance.choice((0.7, 1.0)),
                    chance.choice((None, 20)),
                    chance.choice((None, 0.9)),
                    chance.choice((1.0, 1.2)),
                    chance.randint(0, 1 << 30),
                )
                if chance.random() < draws.sampled
                else SamplingParameters()
            )
            count = chance.randint(1, draws.most_new_tokens)
            limits = Limits(count, draws.end_ids)
            if draws.to_text is not None and chance.random() < 0.3:
                [text] = generate(network, some[:1], Full(), sampling, limits)
                written = draws.to_text(text.tokens)
                if len(written) > 8:
                    begin = chance.randrange(len(written) - 4)
                    limits = Limits(
                        count, draws.end_ids, (written[begin : begin + 3],), draws.to_text
                    )
            whole = generate(network, some, Full(), sampling, limits)
            for strategy in (draw_strategy(chance, network.depths[:-1]) for _ in range(3)):
                texts = generate(network, some, strategy, sampling, limits)
                before = result.num_tokens
                for prompt, text, other in zip(some, texts, whole, strict=True):
                    add_text(result, network, strategy, prompt, text, other, sampling)
                bar.update(result.num_tokens - before)
    return result


def add_text(
    result: ProofComparison,
    network: Network,
    strategy: Strategy,
    prompt: list[int],
    text,
    other,
    sampling: SamplingParameters,
) -> None:
    """Add the comparison of one text with full's to ``result``."""
    result.num_tokens += len(text.tokens)
    result.num_texts += 1
    result.by_strategy[strategy.name] = result.by_strategy.get(strategy.name, 0) + len(text.tokens)
    result.finishes[text.finish] = result.finishes.get(text.finish, 0) + 1
    result.drafted += text.counts.num_drafted
    result.accepted += text.counts.num_accepted
    if (text.tokens, text.finish) == (other.tokens, other.finish):
        result.num_same += len(text.tokens)
        return
    pairs = zip(text.tokens, other.tokens, strict=False)
    place = next(
        (index for index, (one, two) in enumerate(pairs) if one != two),
        min(len(text.tokens), len(other.tokens)),
    )
    result.num_same += place
    margin = scale = float("nan")
    if (
        place < min(len(text.tokens), len(other.tokens))
        and sampling.temperature == 0
        and sampling.repetition_penalty == 1
    ):
        logits = next_logits(network, [*prompt, *other.tokens[:place]])
        margin = float(logits[other.tokens[place]] - logits[text.tokens[place]])
        scale = float(logits.abs().max())
    result.differences.append(Difference(strategy, place, margin, scale))


@torch.inference_mode()
def next_logits(network: Network, tokens: list[int]) -> torch.Tensor:
    """Return the full model's logits [v] after these tokens, read in one pass."""
    state = DecodingState(network, 1, len(tokens) + 1, [network.num_layers])
    state.append(torch.tensor([tokens], device=network.device))
    state.read(network.num_layers)
    return state.logits(network.num_layers, state.last_slots())[0, 0].float()


@dataclass(frozen=True)
class Fit:
    """The test of samples against the distribution that they should have.

    Attributes:
        num_samples: The number of sampled pairs of tokens.
        cells: The number of distinct outcomes; those expected fewer than five times are one.
        chi_square: Sum of (seen - expected)^2 / expected.
        p: Probability of a sum at least this large under the expected distribution.
    """

    num_samples: int
    cells: int
    chi_square: float
    p: float


@torch.inference_mode()
def pairs_expected(
    network: Network, prompt: list[int], sampling: SamplingParameters
) -> dict[tuple[int, int], float]:
    """Return the probability of every pair of next tokens, by transformers' own model."""

    model = network.whole_model()

    def distribution(tokens: list[list[int]]) -> torch.Tensor:
        logits = (
            model(torch.tensor(tokens, device=network.device)).logits[:, -1].float()
            / sampling.temperature
        )
        lowest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        return logits.masked_fill(logits < lowest, float("-inf")).softmax(-1)

    first = distribution([prompt])[0]
    tokens = first.nonzero()[:, 0].tolist()
    second = distribution([[*prompt, token] for token in tokens])
    return {
        (token, after): float(first[token]) * share
        for token, row in zip(tokens, second.tolist(), strict=True)
        for after, share in enumerate(row)
        if share > 0
    }


def sample_pairs(
    network: Network,
    prompt: list[int],
    strategy: Strategy,
    sampling: SamplingParameters,
    num_samples: int,
    rows: int = 200,
) -> dict:
    """Return how often a strategy wrote each pair of tokens after the prompt."""
    seen: dict[tuple[int, int], int] = {}
    for turn in tqdm(range(-(-num_samples // rows)), strategy.name, unit="batch"):
        count = min(rows, num_samples - turn * rows)
        texts = generate(
            network,
            [prompt] * count,
            strategy,
            SamplingParameters(sampling.temperature, sampling.top_k, seed=turn),
            Limits(2),
        )
        for text in texts:
            seen[tuple(text.tokens)] = seen.get(tuple(text.tokens), 0) + 1
    return seen


def fit(seen: dict[tuple[int, int], int], expected: dict[tuple[int, int], float]) -> Fit:
    """Return Pearson's test of counts against probabilities.

    A pair that should never occur makes the statistic infinite.
    """
    total = sum(seen.values())
    often = {pair: share for pair, share in expected.items() if share * total >= 5}
    cells = [(seen.get(pair, 0), share * total) for pair, share in often.items()]
    rest = 1 - sum(often.values())
    others = sum(count for pair, count in seen.items() if pair not in often)
    if any(pair not in expected for pair in seen):
        return Fit(total, len(cells), float("inf"), 0.0)
    if rest * total >= 5:
        cells.append((others, rest * total))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = max(len(cells) - 1, 1)
    p = torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64),
        torch.tensor(statistic / 2, dtype=torch.float64),
    )
    return Fit(total, len(cells), statistic, float(p))


def greedy_draft_pairs(
    network: Network, prompt: list[int], depth: int, sampling: SamplingParameters, num_samples: int
) -> dict:
    """Return counts as S2D's released code samples; they show that the test detects such a bias.

    The draft is the exit's likeliest token, accepted with the full model's probability over the
    exit's, as if it had been sampled. After a rejection the token is drawn from what the full model
    has above the exit.
    """

    @functools.cache
    def both(tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        state = DecodingState(
            network, 1, len(prompt) + len(tokens) + 1, [depth, network.num_layers]
        )
        state.append(torch.tensor([[*prompt, *tokens]], device=network.device))
        state.read(network.num_layers)
        sampler = Sampler(SamplingParameters(0.0), [0])
        shares = []
        for at in (depth, network.num_layers):
            logits = state.logits(at, state.last_slots())
            scores = sampler.scores(logits, [[0]])[0, 0].float() / sampling.temperature
            lowest = scores.topk(sampling.top_k).values[-1]
            shares.append(scores.masked_fill(scores < lowest, float("-inf")).softmax(-1))
        return shares[0], shares[1]

    generator, seen = torch.Generator().manual_seed(0), {}
    with torch.inference_mode():
        for _ in range(num_samples):
            pair: tuple[int, ...] = ()
            for _ in range(2):
                small, large = both(pair)
                token = int(small.argmax())
                if float(torch.rand((), generator=generator)) > float(large[token] / small[token]):
                    token = int(
                        torch.multinomial((large - small).clamp(min=0), 1, generator=generator)
                    )
                pair = (*pair, token)
            seen[pair] = seen.get(pair, 0) + 1
    return seen
