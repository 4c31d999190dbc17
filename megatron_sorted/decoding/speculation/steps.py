"""One step of generating for a batch: tokens without drafts, and drafts with their verification."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.state import State
from megatron_sorted.decoding.cache.transfer import numbers, slots_from
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import SURENESS, Sampler


@dataclass
class StepOutput:
    """What a step added to one text.

    Attributes:
        tokens: At least one.
        depths: Exit that each was said by; a drafted one that was accepted counts for the exit that drafted it.
        num_drafted: Tokens that were drafted for it; of a tree, the nodes that were verified.
        num_accepted: Of those, how many are in the text.
    """

    tokens: list[int]
    depths: list[int]
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass
class DecodingBatch:
    """Texts on their way, and how tokens are chosen.

    Attributes:
        state: What the model has read of them.
        sampler: Chooses.
        seen_bv: Which tokens are in each text; None where nothing asks.
        drafting: State of another model that drafts; None where the model itself does.
    """

    state: State
    sampler: Sampler
    seen_bv: Tensor | None = None
    drafting: State | None = None
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = max(self.state.runs)

    @property
    def drafter(self) -> State:
        """What drafts."""
        return self.drafting or self.state

    def commit(self, said: Sequence[StepOutput]) -> None:
        """Note tokens that now belong to the texts."""
        if self.seen_bv is not None:
            longest = max(len(one.tokens) for one in said)
            padded = [[*one.tokens, *[one.tokens[0]] * (longest - len(one.tokens))] for one in said]
            self.seen_bv.scatter_(1, numbers(padded, self.seen_bv.device), True)
        if self.sampler.sampling.temperature > 0:
            self.sampler.forget(self.state.lengths)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        for state in {id(one): one for one in (self.state, self.drafter)}.values():
            state.select_rows(rows)
        self.sampler.select_rows(rows)
        if self.seen_bv is not None:
            self.seen_bv = self.seen_bv[numbers(rows, self.seen_bv.device)]

    def choose_last(
        self, state: State, depth: int, seen_bv: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the token [b] that an exit chooses after the last one of each row, and its logits [b, v]."""
        logits_bnv = state.logits(depth, state.last_slots())
        seen = None if seen_bv is None else seen_bv[:, None]
        return self.sampler.choose(logits_bnv, [[length] for length in state.lengths], seen)[
            :, 0
        ], logits_bnv[:, 0]


class OneToken:
    """A token a step, by the first of some exits that is sure of it; by one exit alone if there is but one.

    Args:
        batch: The texts.
        depths: Exits that are asked; the last takes what is left.
        thresholds: Of all but the last.
        measure: Of how sure an exit is.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        depths: Sequence[int],
        thresholds: Sequence[float] = (),
        measure: str = "probability",
    ):
        self.batch, self.depths, self.thresholds, self.measure = (
            batch,
            list(depths),
            [*thresholds, -1.0],
            SURENESS[measure],
        )

    def step(self) -> list[StepOutput]:
        """Return what was added to each text."""
        batch, state = self.batch, self.batch.state
        tokens, depths = first_sure(
            batch, state, self.depths, self.thresholds, self.measure, batch.seen_bv
        )
        state.append(tokens[:, None])
        said = [
            StepOutput([token], [depth])
            for token, depth in zip(tokens.tolist(), depths, strict=True)
        ]
        batch.commit(said)
        return said


def first_sure(
    batch: DecodingBatch,
    state: State,
    depths: Sequence[int],
    thresholds: Sequence[float],
    measure,
    seen_bv: Tensor | None,
    asking: Sequence[bool] | None = None,
):
    """Return the tokens [b] that follow the rows, each by the first exit whose confidence is above its threshold, and those exits.

    A row for which none is sure gets the last one's token, and its exit counted as negative. For rows that are not ``asking`` no exit is
    asked that the others do not need; what is returned for them means nothing.
    """
    chosen, decided, by = (
        None,
        None,
        [0 if asks else depths[0] for asks in asking or [True] * state.num_rows],
    )
    for depth, threshold in zip(depths, thresholds, strict=True):
        state.read(depth)
        tokens, logits_bv = batch.choose_last(state, depth, seen_bv)
        is_last = depth == depths[-1]
        chosen = tokens if chosen is None else torch.where(decided, chosen, tokens)
        sure = [True] * state.num_rows
        if threshold >= 0:
            sure_b = measure(logits_bv) > threshold
            decided = sure_b if decided is None else decided | sure_b
            sure = sure_b.tolist()
        by = [
            exit_ or (depth if is_sure else -depth if is_last else 0)
            for exit_, is_sure in zip(by, sure, strict=True)
        ]
        if all(by):
            break
    return chosen, by


class Chain:
    """Tokens are drafted one after another by exits, then verified by the full model.

    Args:
        batch: The texts.
        depths: Exits that draft.
        thresholds: Of each; drafting ends for a row after a token of which none is sure. None: the one exit is always sure.
        num_draft_tokens: Most tokens drafted.
        measure: Of how sure an exit is.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        depths: Sequence[int],
        thresholds: Sequence[float] | None,
        num_draft_tokens: int,
        measure: str,
    ):
        self.batch, self.depths, self.num_draft_tokens = batch, list(depths), num_draft_tokens
        self.thresholds, self.measure = (
            [-1.0] if thresholds is None else list(thresholds),
            SURENESS[measure],
        )

    def step(self) -> list[StepOutput]:
        """Return what was added to each text."""
        batch, state, drafter = self.batch, self.batch.state, self.batch.drafter
        starts = list(state.lengths)
        by = self._draft(drafter)
        counts = [len(row) for row in by]
        most = max(counts)
        drafted_bn = drafter.tokens_bc.gather(1, slots_from(starts, most, drafter.device))
        if drafter is not state:
            state.append(drafted_bn, counts)
        state.read(batch.depth)
        chosen_bn = self._verify(starts, counts, most, drafted_bn)
        said = []
        for row, told in enumerate(torch.cat((chosen_bn, drafted_bn), 1).tolist()):
            chosen, drafted, accepted = told[: most + 1], told[most + 1 :], 0
            while accepted < counts[row] and chosen[accepted] == drafted[accepted]:
                accepted += 1
            said.append(
                StepOutput(
                    chosen[: accepted + 1],
                    [*by[row][:accepted], batch.depth],
                    counts[row],
                    accepted,
                )
            )
        ends = [start + one.num_accepted for start, one in zip(starts, said, strict=True)]
        last = numbers([[one.tokens[-1]] for one in said], state.device)
        for one in {id(one): one for one in (state, drafter)}.values():
            one.crop(ends)
            one.append(last)
        batch.commit(said)
        return said

    def _draft(self, drafter: State) -> list[list[int]]:
        """Return the exits that drafted, by row and token, after adding the tokens to the rows."""
        by: list[list[int]] = [[] for _ in range(drafter.num_rows)]
        goes_on = [True] * drafter.num_rows
        seen_bv = None if self.batch.seen_bv is None else self.batch.seen_bv.clone()
        for _ in range(self.num_draft_tokens):
            tokens, exits = first_sure(
                self.batch, drafter, self.depths, self.thresholds, self.measure, seen_bv, goes_on
            )
            drafter.append(tokens[:, None], [int(flag) for flag in goes_on])
            if seen_bv is not None:
                seen_bv.scatter_(1, tokens[:, None], True)
            for row, exit_ in enumerate(exits):
                if goes_on[row]:
                    by[row].append(abs(exit_))
                    goes_on[row] = exit_ > 0
            if not any(goes_on):
                break
        return by

    def _verify(
        self, starts: list[int], counts: list[int], most: int, drafted_bn: Tensor
    ) -> Tensor:
        """Return what the full model chooses after each row's text and after each drafted token."""
        batch, state = self.batch, self.batch.state
        slots = slots_from(
            [start - 1 for start in starts],
            most + 1,
            state.device,
            [length - 1 for length in state.lengths],
        )
        seen = None
        if batch.seen_bv is not None:
            seen = batch.seen_bv[:, None].repeat(1, most + 1, 1)
            for place in range(most):
                seen[:, place + 1 :].scatter_(
                    2, drafted_bn[:, place, None, None].expand(-1, most - place, 1), True
                )
        positions = [[start + place for place in range(most + 1)] for start in starts]
        return batch.sampler.choose(state.logits(batch.depth, slots), positions, seen)


def stops_of(network: Network, depths: Sequence[int]) -> list[int]:
    """Return the depths at which reading must be able to stop."""
    return sorted({*depths, network.num_layers})
