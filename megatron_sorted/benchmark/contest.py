"""Answers of several strategies to the same conversations, and their scores.

All strategies answer a question before the next one, so that a noisy machine is noisy for all.
Prompts that are only timed are in `trials`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_sorted.benchmark.peer import peer_run
from megatron_sorted.benchmark.questions import MultiTurnQuestion
from megatron_sorted.decoding.generate import stream
from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning.costs import now


@dataclass
class ContestAnswer:
    """The answer of one contestant to one question.

    Attributes:
        turns: Text of each turn.
        ids: Tokens of each turn.
        seconds: Seconds of each turn.
        accept_lengths: Number of new tokens of every verification, over all turns.
        num_drafted, num_accepted: Numbers of drafted and accepted tokens; None if unknown.
    """

    turns: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    num_drafted: int | None = 0
    num_accepted: int | None = 0


@dataclass(frozen=True)
class Contestant:
    """A strategy or another generator in the comparison.

    Attributes:
        name: Name in tables and files.
        run: Function from a prompt to its new tokens, the number of tokens of every step, and the
            numbers of drafted and accepted tokens (None if unknown).
    """

    name: str
    run: Callable[[list[int]], tuple[list[int], list[int], int | None, int | None]]


def ours(
    name: str,
    generator: TextGenerator,
    strategy: Strategy,
    max_new_tokens: int,
    sampling: SamplingParameters,
) -> Contestant:
    """Return the contestant of one of our strategies."""
    limits = Limits(max_new_tokens, generator.end_ids)
    draft = generator.draft_for(strategy)

    def run(prompt: list[int]):
        tokens, steps, drafted, accepted = [], [], 0, 0
        for added in stream(
            generator.network, [prompt], strategy, sampling, limits=limits, draft=draft
        ):
            tokens += added.tokens
            steps.append(len(added.tokens))
            drafted, accepted = drafted + added.num_drafted, accepted + added.num_accepted
        return tokens, steps, drafted, accepted

    return Contestant(name, run)


def theirs(
    name: str, generator: TextGenerator, max_new_tokens: int, sampling: SamplingParameters, **more
) -> Contestant:
    """Return the contestant of transformers' ``generate`` with the same model.

    Args:
        name: Name in tables and files.
        generator: The model.
        max_new_tokens: Maximum number of new tokens.
        sampling: How tokens are chosen.
        **more: Arguments of ``generate``, such as assistant_early_exit.
    """
    run_batch = peer_run(generator, max_new_tokens, sampling, **more)

    def run(prompt: list[int]):
        [tokens], _ = run_batch([prompt])
        return tokens, [], None, None

    return Contestant(name, run)


def answer_question(
    generator: TextGenerator,
    question: MultiTurnQuestion,
    contestants: Sequence[Contestant],
    max_new_tokens: int,
    number: int,
) -> dict[str, ContestAnswer]:
    """Return each contestant's answer; later turns follow the contestant's own earlier answers.

    Args:
        generator: The model.
        question: The question.
        contestants: The contestants.
        max_new_tokens: Maximum number of new tokens of a turn.
        number: Number of the question; it determines which contestant begins.
    """
    answers, num_contestants = {}, len(contestants)
    most_tokens = generator.network.max_positions - max_new_tokens
    for index in range(number, number + num_contestants):
        contestant = contestants[index % num_contestants]
        answer, messages = ContestAnswer(), []
        for text in question.turns:
            messages.append({"role": "user", "content": text})
            prompt = generator.encode_chat(messages)[-most_tokens:]
            began = now(generator.network)
            tokens, steps, drafted, accepted = contestant.run(prompt)
            answer.seconds.append(now(generator.network) - began)
            kept = [token for token in tokens if token not in generator.end_ids]
            answer.ids.append(tokens)
            answer.turns.append(generator.tokenizer.decode(kept))
            answer.accept_lengths += steps
            answer.num_drafted = None if drafted is None else answer.num_drafted + drafted
            answer.num_accepted = None if accepted is None else answer.num_accepted + accepted
            messages.append({"role": "assistant", "content": answer.turns[-1]})
        answers[contestant.name] = answer
    return answers


@dataclass(frozen=True)
class Score:
    """The score of one contestant over some questions.

    Attributes:
        tokens_per_second: All new tokens over all seconds, including those for the prompts.
        speed_up: Ratio of tokens per second to those of the base.
        mean_accepted: New tokens per verification: 1 without drafts, at most 1 + drafted; None if
            unknown.
        acceptance: Share of drafted tokens that were accepted, for a tree of the nodes of all
            branches; None without drafts.
        same: Share of answers that equal the base's, token for token.
    """

    tokens_per_second: float
    speed_up: float
    mean_accepted: float | None
    acceptance: float | None
    same: float


def score(answers: Sequence[dict[str, ContestAnswer]], name: str, base: str) -> Score:
    """Return the score of a contestant compared with another one."""

    def speed(of: str) -> float:
        num_tokens = sum(len(ids) for answer in answers for ids in answer[of].ids)
        return num_tokens / sum(sum(answer[of].seconds) for answer in answers)

    steps = [length for answer in answers for length in answer[name].accept_lengths]
    drafted = [answer[name].num_drafted for answer in answers]
    has_drafts = None not in drafted and sum(drafted)
    return Score(
        speed(name),
        speed(name) / speed(base),
        sum(steps) / len(steps) if steps else None,
        sum(answer[name].num_accepted for answer in answers) / sum(drafted) if has_drafts else None,
        sum(answer[name].ids == answer[base].ids for answer in answers) / len(answers),
    )
