"""Measured times of forward passes on this machine, by depth and number of tokens."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.network import Network

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 7


@dataclass(frozen=True)
class Costs:
    """Seconds of forward passes of one model.

    Attributes:
        widths: Numbers of tokens per pass, increasing.
        layers: Seconds of the layers from the exit before (or the embedding) to an exit, by exit
            and width.
        heads: Seconds from the hidden state to the chosen token, an exit's own block included, by
            exit and width.
    """

    widths: tuple[int, ...]
    layers: dict[int, tuple[float, ...]]
    heads: dict[int, tuple[float, ...]]

    def of_layers(self, depth: int, width: int) -> float:
        """Return the seconds of the layers that end at ``depth`` for ``width`` tokens."""
        return _interpolate(self.widths, self.layers[depth], width)

    def of_head(self, depth: int, width: int) -> float:
        """Return the seconds of an exit's head for ``width`` tokens."""
        return _interpolate(self.widths, self.heads[depth], width)


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
    network: Network, depths: Sequence[int], length: int = 256, widths: Sequence[int] = WIDTHS
) -> Costs:
    """Measure the median seconds of several passes behind a text.

    Args:
        network: The model.
        depths: Exits to measure, increasing.
        length: Number of tokens before those of the pass.
        widths: Numbers of tokens per pass.
    """
    # at least one token stands before the pass, however short the model's context is
    length = max(1, min(length, network.max_positions - max(widths) - 1))
    state = DecodingState(network, 1, length + max(widths) + 1, depths)
    state.append(torch.randint(network.vocab_size, (1, length), device=network.device))
    state.read(depths[-1])
    layers, heads = {depth: [] for depth in depths}, {depth: [] for depth in depths}
    for width in widths:
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(REPEATS):
            state.append(torch.randint(network.vocab_size, (1, width), device=network.device))
            for depth in depths:
                for kind, work in (
                    ("layers", lambda depth=depth: state.read_layers(depth)),
                    ("heads", lambda depth=depth, width=width: _choose(state, depth, width)),
                ):
                    began = now(network)
                    work()
                    times.setdefault((kind, depth), []).append(now(network) - began)
            state.crop([length])
        for depth in depths:
            layers[depth].append(statistics.median(times["layers", depth]))
            heads[depth].append(statistics.median(times["heads", depth]))
    return Costs(
        tuple(widths),
        {depth: tuple(row) for depth, row in layers.items()},
        {depth: tuple(row) for depth, row in heads.items()},
    )


def _choose(state: DecodingState, depth: int, width: int) -> list:
    state.read(depth)  # runs the exit's own block if there is one
    return state.logits(depth, state.last_slots(width)).argmax(-1).tolist()


def now(network: Network) -> float:
    """Return a clock's seconds after the device has finished its work."""
    if network.device.type != "cpu":
        torch.accelerator.synchronize(network.device)
    return time.perf_counter()
