"""Measured times on this machine: of forward passes by depth and number of tokens, and of steps."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import Sampler
from megatron_sorted.decoding.speculation.steps import Chain, DecodingBatch, OneToken
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.decoding.texts import Limits, Text, apply_limits

WIDTHS = (*range(1, 18), 24, 32, 48, 64)
"""Numbers of tokens of a pass that are measured: each that verifies up to 16 drafted tokens, and
the longer ones with which deep layers make up for early exits."""
MAX_ROUNDS, MIN_ROUNDS = 9, 3
MAX_SECONDS = 60.0
"""Time after which no further round is begun."""


@dataclass(frozen=True)
class HostCosts:
    """Seconds of a step beyond its passes: choosing tokens, and Python's own work.

    Attributes:
        token: Seconds of a step that adds one token.
        chain: Seconds of a step that drafts and verifies, apart from its drafted tokens.
        draft: Seconds for each drafted token.
        confidence: Seconds to choose a token at an exit and measure its confidence, by measure.
    """

    token: float = 0.0
    chain: float = 0.0
    draft: float = 0.0
    confidence: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CONFIDENCE, 0.0))


@dataclass(frozen=True)
class Costs:
    """Seconds of one model.

    Attributes:
        widths: Numbers of tokens per pass, increasing.
        layers: Seconds of the layers from the exit before (or the embedding) to an exit, by exit
            and width.
        heads: Seconds from the hidden state to the logits, by exit and width.
        blocks: Seconds of an exit's own block, by exit and width.
        drafts: Seconds from the embedding to the logits of an exit for one token, right after the
            same for the token before, so that a processor may still hold the weights; by exit.
        host: Costs of steps.
    """

    widths: tuple[int, ...]
    layers: dict[int, tuple[float, ...]]
    heads: dict[int, tuple[float, ...]]
    blocks: dict[int, tuple[float, ...]] = field(default_factory=dict)
    drafts: dict[int, float] = field(default_factory=dict)
    host: HostCosts = field(default_factory=HostCosts)

    def of_layers(self, depth: int, width: int) -> float:
        """Return the seconds of the layers that end at ``depth`` for ``width`` tokens."""
        return _interpolate(self.widths, self.layers[depth], width)

    def of_head(self, depth: int, width: int) -> float:
        """Return the seconds of an exit's head for ``width`` tokens."""
        return _interpolate(self.widths, self.heads[depth], width)

    def of_block(self, depth: int, width: int) -> float:
        """Return the seconds of an exit's own block for ``width`` tokens; 0 if it has none."""
        return _interpolate(self.widths, self.blocks[depth], width) if self.blocks else 0.0

    def of_pass(self, depth: int, width: int) -> float:
        """Return the seconds from the embedding to the logits of an exit for ``width`` tokens."""
        layers = sum(self.of_layers(stop, width) for stop in self.layers if stop <= depth)
        return layers + self.of_block(depth, width) + self.of_head(depth, width)


def _interpolate(widths: Sequence[int], seconds: Sequence[float], width: int) -> float:
    """Return the seconds for a width, linearly between measured ones."""
    if width <= 0:
        return 0.0
    for (left, low), (right, high) in zip(
        zip(widths, seconds, strict=True), zip(widths[1:], seconds[1:], strict=True), strict=False
    ):
        if width <= right:
            return low + (high - low) * max(width - left, 0) / (right - left)
    return seconds[-1] * width / widths[-1]


@torch.inference_mode()
def measure_costs(
    network: Network,
    depths: Sequence[int],
    length: int = 256,
    widths: Sequence[int] = WIDTHS,
    drafting: Sequence[int] = (),
    most_rounds: int | None = None,
) -> Costs:
    """Measure the median seconds of passes and steps behind a text.

    Every round measures everything, in another order, so that a noisy machine is as noisy for all
    numbers; a first round warms up.

    Args:
        network: The model, with its own number of threads.
        depths: Exits to measure, increasing.
        length: Number of tokens before those of the pass.
        widths: Numbers of tokens per pass.
        drafting: Exits that may draft, or take tokens early.
        most_rounds: Maximum number of rounds, by default ``MAX_ROUNDS``.
    """
    # at least one token stands before the pass, however short the model's context is
    length = max(1, min(length, network.max_positions - max(widths) - 1))
    state = _TimedState(network, 1, length + max(widths) + 1, depths)
    state.append(torch.randint(network.vocab_size, (1, length), device=network.device))
    state.read(depths[-1])
    jobs: list[Callable[[], Iterator[tuple]]] = [
        lambda width=width: _passes(state, depths, length, width) for width in widths
    ]
    jobs.append(lambda: _steps(state, depths[-1], length, drafting))
    jobs += [lambda depth=depth: _drafts(state, depth, length) for depth in drafting]
    times: dict[tuple, list[float]] = {}
    order, began = random.Random(0), time.perf_counter()
    for done in range(1 + (most_rounds or MAX_ROUNDS)):
        if done > MIN_ROUNDS and time.perf_counter() - began > MAX_SECONDS:
            break
        for job in order.sample(jobs, len(jobs)):
            for key, seconds in job():
                if done:
                    times.setdefault(key, []).append(seconds)
    medians = {key: statistics.median(row) for key, row in times.items()}

    def by_exit(kind: str) -> dict[int, tuple[float, ...]]:
        return {depth: tuple(medians[kind, depth, width] for width in widths) for depth in depths}

    return Costs(
        tuple(widths),
        by_exit("layers"),
        by_exit("heads"),
        by_exit("blocks") if state.blocks else {},
        {depth: medians["draft", depth] for depth in drafting},
        _host_costs(medians),
    )


class _TimedState(DecodingState):
    """A state that adds up the seconds of its passes."""

    inside = 0.0

    def read(self, depth: int) -> None:
        """Run the layers as `DecodingState.read` does."""
        began = now(self.network)
        super().read(depth)
        self.inside += now(self.network) - began

    def logits(self, depth: int, slots_bn: torch.Tensor) -> torch.Tensor:
        """Return the logits as `DecodingState.logits` does."""
        began = now(self.network)
        logits_bnv = super().logits(depth, slots_bn)
        self.inside += now(self.network) - began
        return logits_bnv


def _passes(state: _TimedState, depths: Sequence[int], length: int, width: int) -> Iterator[tuple]:
    """Yield the seconds of each part of a pass of ``width`` tokens, by kind, exit and width."""
    state.append(torch.randint(state.network.vocab_size, (1, width), device=state.device))
    slots = state.last_slots(width)
    for depth in depths:
        for kind, work in (
            ("layers", lambda depth=depth: state.read_layers(depth)),
            ("blocks", lambda depth=depth: state.read(depth)),
            ("heads", lambda depth=depth: state.logits(depth, slots)),
        ):
            began = now(state.network)
            work()
            yield (kind, depth, width), now(state.network) - began
    state.crop([length])


def _drafts(state: _TimedState, depth: int, length: int) -> Iterator[tuple]:
    """Yield the seconds of an exit's passes of one token, without the first of a row of them."""
    for place in range(min(4, state.capacity - length - 1)):
        state.append(torch.zeros(1, 1, dtype=torch.long, device=state.device))
        began = now(state.network)
        state.read(depth)
        state.logits(depth, state.last_slots())
        if place:
            yield ("draft", depth), now(state.network) - began
    state.crop([length])


LONG = 5
"""Number of drafted tokens of the longer chain with which steps are measured."""
STEPS = 3
"""Number of steps of each kind in a round."""


def _steps(state: _TimedState, last: int, length: int, drafting: Sequence[int]) -> Iterator[tuple]:
    """Yield the seconds that steps take beyond their passes, by kind of step."""
    batch = DecodingBatch(state, Sampler(SamplingParameters(), [0]))
    steps = {("token",): OneToken(batch, [last])}
    for first in drafting[:1]:
        for n in (1, LONG):
            steps["chain", n] = Chain(batch, [first], None, n, "probability")
        for name in CONFIDENCE:
            steps["confidence", name] = OneToken(batch, [first, last], (1.0,), name)
    limits = Limits(1 << 30)
    for key, step in STEPS * list(steps.items()):
        text, before, began = Text(), state.inside, now(state.network)
        for output in step.step():
            text.add(apply_limits(text, output, 0, limits))
        yield key, now(state.network) - began - (state.inside - before)
        state.crop([length])


def _host_costs(medians: dict[tuple, float]) -> HostCosts:
    """Return the costs of steps from the medians of the measured ones."""
    token = medians["token",]
    if ("chain", 1) not in medians:
        return HostCosts(token)
    draft = max(0.0, (medians["chain", LONG] - medians["chain", 1]) / (LONG - 1))
    return HostCosts(
        token,
        max(0.0, medians["chain", 1] - draft),
        draft,
        {name: max(0.0, medians["confidence", name] - token) for name in CONFIDENCE},
    )


def now(network: Network) -> float:
    """Return a clock's seconds after the device has finished its work."""
    if network.device.type != "cpu":
        torch.accelerator.synchronize(network.device)
    return time.perf_counter()
