"""Steps of generation for a batch: one token at a time, or a drafted chain and its verification.

A step is a generator: it yields every forward pass that it needs and is sent the pass's logits. So
whoever runs steps may join the passes of many texts, each with a strategy of its own.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.joined import ForwardPass
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.cache.transfer import numbers, slots_from
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import Sampler


@dataclass
class StepOutput:
    """The tokens that a step generated for one text.

    Attributes:
        tokens: The tokens, at least one.
        depths: Exit of each token; for an accepted draft, the exit that drafted it.
        num_drafted: Number of drafted tokens; of a tree, the nodes that were verified.
        num_accepted: Number of drafted tokens that were accepted.
    """

    tokens: list[int]
    depths: list[int]
    num_drafted: int = 0
    num_accepted: int = 0


Steps = Generator[ForwardPass, Tensor, list[StepOutput]]
"""A step that is under way: yields passes, is sent their logits, returns each text's new tokens."""


def run_step(steps: Steps) -> list[StepOutput]:
    """Run a step's passes one after another; return the tokens that were added to each text."""
    try:
        needed = next(steps)
        while True:
            needed = steps.send(needed.run())
    except StopIteration as end:
        return end.value


@dataclass
class DecodingBatch:
    """Unfinished texts, and how their tokens are chosen.

    Attributes:
        state: State of the model.
        sampler: The choice of tokens.
        seen_bv: Which tokens are in each text; None without repetition penalty.
        drafting: State of another model that drafts; None if the model drafts itself.
        draft_length: Function from the number of tokens that a strategy would draft in a step to
            the number that pays now; with 0 the step only takes the model's own token.
        depth: Depth of the exit that verifies, the deepest stop.
    """

    state: DecodingState
    sampler: Sampler
    seen_bv: Tensor | None = None
    drafting: DecodingState | None = None
    draft_length: Callable[[int], int] = lambda wanted: wanted
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = max(self.state.segments)

    @property
    def drafter(self) -> DecodingState:
        """Return the state of the model that drafts."""
        return self.drafting or self.state

    @property
    def states(self) -> list[DecodingState]:
        """Return the states of all models."""
        return [self.state] if self.drafting is None else [self.state, self.drafting]

    def commit(self, outputs: Sequence[StepOutput]) -> None:
        """Record tokens that now belong to the texts."""
        if self.seen_bv is not None:
            rows = [output.tokens for output in outputs]
            longest = max(map(len, rows))
            padded = [[*row, *[row[0]] * (longest - len(row))] for row in rows]
            self.seen_bv.scatter_(1, numbers(padded, self.seen_bv.device), True)
        if self.sampler.sampling.temperature > 0:
            self.sampler.forget(self.state.lengths)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        for state in self.states:
            state.select_rows(rows)
        self.sampler.select_rows(rows)
        if self.seen_bv is not None:
            self.seen_bv = self.seen_bv[numbers(rows, self.seen_bv.device)]

    def choose_last(
        self, state: DecodingState, logits_b1v: Tensor, seen_bv: Tensor | None
    ) -> Tensor:
        """Return the next token [b] of each row, given an exit's logits after the rows."""
        seen = None if seen_bv is None else seen_bv[:, None]
        positions = [[length] for length in state.lengths]
        return self.sampler.choose(logits_b1v, positions, seen)[:, 0]


class OneToken:
    """A step that adds one token, from the first exit whose confidence is above its threshold.

    Args:
        batch: The texts.
        depths: Exits that are evaluated; the last takes the remaining tokens.
        thresholds: Confidence that each exit but the last needs.
        measure: Measure of confidence.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        depths: Sequence[int],
        thresholds: Sequence[float] = (),
        measure: str = "probability",
    ):
        self.batch, self.depths = batch, list(depths)
        self.thresholds, self.measure = [*thresholds, -1.0], CONFIDENCE[measure]

    def step(self) -> list[StepOutput]:
        """Return the tokens that were added to each text."""
        return run_step(self.passes())

    def passes(self) -> Steps:
        """Yield the passes of a step; return the tokens that were added to each text."""
        batch, state = self.batch, self.batch.state
        tokens, depths = yield from first_confident(
            batch, state, self.depths, self.thresholds, self.measure, batch.seen_bv
        )
        state.append(tokens[:, None])
        outputs = [
            StepOutput([token], [depth])
            for token, depth in zip(tokens.tolist(), depths, strict=True)
        ]
        batch.commit(outputs)
        return outputs


def first_confident(
    batch: DecodingBatch,
    state: DecodingState,
    depths: Sequence[int],
    thresholds: Sequence[float],
    measure,
    seen_bv: Tensor | None,
    active: Sequence[bool] | None = None,
) -> Generator[ForwardPass, Tensor, tuple[Tensor, list[int]]]:
    """Return each row's next token from the first exit that is confident enough, and that exit.

    If no exit is, the token comes from the last one, and the exit's depth is returned as negative.

    Args:
        batch: The texts.
        state: State of the model that is evaluated.
        depths: Exits to evaluate, increasing.
        thresholds: Confidence that each of them needs; a negative one is always reached.
        measure: Measure of confidence.
        seen_bv: Which tokens are in each text; None without repetition penalty.
        active: Rows that need a token (all by default). No exit is evaluated for the other rows
            alone, and their results have no meaning.

    Returns:
        The tokens [b], and a list of depths.
    """
    chosen, decided = None, None
    by = [0 if flag else depths[0] for flag in active or [True] * state.num_rows]
    for depth, threshold in zip(depths, thresholds, strict=True):
        logits_b1v = yield ForwardPass(state, depth, state.last_slots())
        tokens = batch.choose_last(state, logits_b1v, seen_bv)
        chosen = tokens if chosen is None else torch.where(decided, chosen, tokens)
        confident = [True] * state.num_rows
        if threshold >= 0:
            confident_b = measure(logits_b1v[:, 0]) > threshold
            decided = confident_b if decided is None else decided | confident_b
            confident = confident_b.tolist()
        otherwise = -depth if depth == depths[-1] else 0
        by = [
            exit_ or (depth if is_confident else otherwise)
            for exit_, is_confident in zip(by, confident, strict=True)
        ]
        if all(by):
            break
    return chosen, by


class Chain:
    """A step in which exits draft tokens one after another and the full model verifies them.

    Args:
        batch: The texts.
        depths: Exits that draft.
        thresholds: Confidence that each of them needs; after a token that reaches none, the row's
            draft ends. None: the only exit always drafts.
        num_draft_tokens: Maximum number of drafted tokens.
        measure: Measure of confidence.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        depths: Sequence[int],
        thresholds: Sequence[float] | None,
        num_draft_tokens: int,
        measure: str = "probability",
    ):
        self.batch, self.depths, self.num_draft_tokens = batch, list(depths), num_draft_tokens
        self.thresholds = [-1.0] if thresholds is None else list(thresholds)
        self.measure = CONFIDENCE[measure]

    def step(self) -> list[StepOutput]:
        """Return the tokens that were added to each text."""
        return run_step(self.passes())

    def passes(self) -> Steps:
        """Yield the passes of a step; return the tokens that were added to each text."""
        batch, state, drafter = self.batch, self.batch.state, self.batch.drafter
        starts = list(state.lengths)
        by = yield from self._draft(drafter)
        counts = [len(row) for row in by]
        most = max(counts)
        drafted_bn = drafter.tokens_bc.gather(1, slots_from(starts, most, drafter.device))
        if drafter is not state:
            state.append(drafted_bn, counts)
        slots = slots_from(
            [start - 1 for start in starts],
            most + 1,
            state.device,
            [length - 1 for length in state.lengths],
        )
        logits_bnv = yield ForwardPass(state, batch.depth, slots)
        chosen_bn = self._verify(logits_bnv, starts, most, drafted_bn)
        outputs = []
        # one copy from the device for both
        for row, both in enumerate(torch.cat((chosen_bn, drafted_bn), 1).tolist()):
            chosen, drafted, accepted = both[: most + 1], both[most + 1 :], 0
            while accepted < counts[row] and chosen[accepted] == drafted[accepted]:
                accepted += 1
            depths = [*by[row][:accepted], batch.depth]
            outputs.append(StepOutput(chosen[: accepted + 1], depths, counts[row], accepted))
        ends = [start + one.num_accepted for start, one in zip(starts, outputs, strict=True)]
        last = numbers([[one.tokens[-1]] for one in outputs], state.device)
        for one in batch.states:
            one.crop(ends)
            one.append(last)
        batch.commit(outputs)
        return outputs

    def _draft(self, drafter: DecodingState) -> Generator[ForwardPass, Tensor, list[list[int]]]:
        """Append drafted tokens to the rows; return the exit of each, by row."""
        by: list[list[int]] = [[] for _ in range(drafter.num_rows)]
        active = [True] * drafter.num_rows
        seen_bv = None if self.batch.seen_bv is None else self.batch.seen_bv.clone()
        for _ in range(self.batch.draft_length(self.num_draft_tokens)):
            tokens, exits = yield from first_confident(
                self.batch, drafter, self.depths, self.thresholds, self.measure, seen_bv, active
            )
            drafter.append(tokens[:, None], [int(flag) for flag in active])
            if seen_bv is not None:
                seen_bv.scatter_(1, tokens[:, None], True)
            for row, exit_ in enumerate(exits):
                if active[row]:
                    by[row].append(abs(exit_))
                    active[row] = exit_ > 0
            if not any(active):
                break
        return by

    def _verify(
        self, logits_bnv: Tensor, starts: list[int], most: int, drafted_bn: Tensor
    ) -> Tensor:
        """Return the full model's token after each row's text and after each drafted token."""
        batch = self.batch
        seen = None
        if batch.seen_bv is not None:
            seen = batch.seen_bv[:, None].repeat(1, most + 1, 1)
            for place in range(most):
                seen[:, place + 1 :].scatter_(
                    2, drafted_bn[:, place, None, None].expand(-1, most - place, 1), True
                )
        positions = [[start + place for place in range(most + 1)] for start in starts]
        return batch.sampler.choose(logits_bnv, positions, seen)


def stops_of(network: Network, depths: Sequence[int]) -> list[int]:
    """Return the depths at which a forward pass must be able to stop."""
    return sorted({*depths, network.num_layers})
