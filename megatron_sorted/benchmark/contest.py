"""Several ways answer the same questions, one after another for each question, so that a noisy machine is as noisy for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_sorted.benchmark.peer import peer_run
from megatron_sorted.benchmark.questions import MultiTurnQuestion
from megatron_sorted.decoding.generate import Limits, stream
from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.tuning.costs import now


@dataclass
class ContestAnswer:
    """What one way wrote for one question.

    Attributes:
        turns: Its text, by turn.
        ids: Its tokens, by turn.
        seconds: By turn.
        accept_lengths: Tokens of every verification, over all turns.
        num_drafted, num_accepted: Drafts; None where nobody tells.
    """

    turns: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    num_drafted: int | None = 0
    num_accepted: int | None = 0


@dataclass(frozen=True)
class Contestant:
    """A name and what goes on with a prompt: (tokens, tokens of every step, drafted, accepted)."""

    name: str
    run: Callable[[list[int]], tuple[list[int], list[int], int | None, int | None]]


def ours(
    name: str,
    writer: TextGenerator,
    strategy: Strategy,
    max_new_tokens: int,
    sampling: SamplingParameters,
) -> Contestant:
    """Return one of our ways."""
    limits = Limits(max_new_tokens, writer.end_ids)
    draft = writer.draft_for(strategy)

    def run(prompt: list[int]):
        tokens, steps, drafted, accepted = [], [], 0, 0
        for added in stream(
            writer.network, [prompt], strategy, sampling, limits=limits, draft=draft
        ):
            tokens += added.tokens
            steps.append(len(added.tokens))
            drafted, accepted = drafted + added.num_drafted, accepted + added.num_accepted
        return tokens, steps, drafted, accepted

    return Contestant(name, run)


def theirs(
    name: str, writer: TextGenerator, max_new_tokens: int, sampling: SamplingParameters, **more
) -> Contestant:
    """Return transformers' own ``generate`` of the same model; ``more`` such as assistant_early_exit."""
    run_batch = peer_run(writer, max_new_tokens, sampling, **more)

    def run(prompt: list[int]):
        [tokens], _ = run_batch([prompt])
        return tokens, [], None, None

    return Contestant(name, run)


def hold(
    writer: TextGenerator,
    question: MultiTurnQuestion,
    contestants: Sequence[Contestant],
    max_new_tokens: int,
    turn: int,
) -> dict[str, ContestAnswer]:
    """Return each contestant's answer, with its own answers before its later turns; who begins depends on ``turn``."""
    found = {}
    for place in range(len(contestants)):
        contestant = contestants[(turn + place) % len(contestants)]
        answer, messages = ContestAnswer(), []
        for text in question.turns:
            messages.append({"role": "user", "content": text})
            prompt = writer.encode_chat(messages)[
                -(writer.network.max_positions - max_new_tokens) :
            ]
            began = now(writer.network)
            tokens, steps, drafted, accepted = contestant.run(prompt)
            answer.seconds.append(now(writer.network) - began)
            kept = [token for token in tokens if token not in writer.end_ids]
            answer.ids.append(tokens)
            answer.turns.append(writer.tokenizer.decode(kept))
            answer.accept_lengths += steps
            answer.num_drafted = None if drafted is None else answer.num_drafted + drafted
            answer.num_accepted = None if accepted is None else answer.num_accepted + accepted
            messages.append({"role": "assistant", "content": answer.turns[-1]})
        found[contestant.name] = answer
    return found


@dataclass(frozen=True)
class Score:
    """One way on some questions.

    Attributes:
        tokens_per_second: All new tokens over all seconds, prompts included in the seconds.
        speed_up: That over the same of `base`.
        mean_accepted: New tokens a verification: 1 without drafts, at most 1 + drafted; None where nobody tells.
        acceptance: Drafted tokens that are in the text over drafted ones; None without drafts. Of a tree, nodes of all branches count.
        same: Share of answers that are `base`'s token for token.
    """

    tokens_per_second: float
    speed_up: float
    mean_accepted: float | None
    acceptance: float | None
    same: float


def score(answers: Sequence[dict[str, ContestAnswer]], name: str, base: str) -> Score:
    """Return the score of a way over questions."""

    def speed(who: str) -> float:
        return sum(len(ids) for answer in answers for ids in answer[who].ids) / sum(
            sum(answer[who].seconds) for answer in answers
        )

    steps = [length for answer in answers for length in answer[name].accept_lengths]
    drafted = [answer[name].num_drafted for answer in answers]
    accepted = [answer[name].num_accepted for answer in answers]
    told = None not in drafted and sum(drafted)
    same = sum(answer[name].ids == answer[base].ids for answer in answers) / len(answers)
    return Score(
        speed(name),
        speed(name) / speed(base),
        sum(steps) / len(steps) if steps else None,
        sum(accepted) / sum(drafted) if told else None,
        same,
    )
