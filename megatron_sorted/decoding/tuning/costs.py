"""What reading costs on this machine: seconds by depth and by how many tokens are read at once."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sorted.decoding.cache.state import State
from megatron_sorted.decoding.network import Network

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 7


@dataclass(frozen=True)
class Costs:
    """Seconds of one model.

    Attributes:
        widths: Tokens read at once, increasing.
        layers: By exit, from the exit before it (or the embedding) to it, one number a width; an exit's own block is in ``heads``.
        heads: By exit, from hidden state to chosen token.
    """

    widths: tuple[int, ...]
    layers: dict[int, tuple[float, ...]]
    heads: dict[int, tuple[float, ...]]

    def of_layers(self, depth: int, width: int) -> float:
        """Return the seconds of the layers that end at ``depth`` for so many tokens, between measured widths linearly."""
        return _between(self.widths, self.layers[depth], width)

    def of_head(self, depth: int, width: int) -> float:
        """Return the seconds of an exit's head."""
        return _between(self.widths, self.heads[depth], width)


def _between(widths: Sequence[int], seconds: Sequence[float], width: int) -> float:
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
    """Return the median seconds of several passes at a text of ``length`` tokens.

    Args:
        network: The model.
        depths: Exits, increasing, the full model among them if it is to be measured.
        length: Of the text before the tokens that are read.
        widths: Tokens read at once.
    """
    length = max(
        1, min(length, network.max_positions - max(widths) - 1)
    )  # of a tiny context something is before what is read
    state = State(network, 1, length + max(widths) + 1, depths)
    state.append(torch.randint(network.vocab_size, (1, length), device=network.device))
    state.read(depths[-1])
    layers, heads = {depth: [] for depth in depths}, {depth: [] for depth in depths}
    for width in widths:
        seen: dict[tuple[str, int], list[float]] = {}
        for _ in range(REPEATS):
            state.append(torch.randint(network.vocab_size, (1, width), device=network.device))
            for depth in depths:
                for kind, work in (
                    ("layers", lambda depth=depth: state.read_layers(depth)),
                    ("heads", lambda depth=depth, width=width: _choose(state, depth, width)),
                ):
                    began = now(network)
                    work()
                    seen.setdefault((kind, depth), []).append(now(network) - began)
            state.crop([length])
        for depth in depths:
            layers[depth].append(statistics.median(seen["layers", depth]))
            heads[depth].append(statistics.median(seen["heads", depth]))
    return Costs(
        tuple(widths),
        {depth: tuple(row) for depth, row in layers.items()},
        {depth: tuple(row) for depth, row in heads.items()},
    )


def _choose(state: State, depth: int, width: int) -> list:
    state.read(depth)  # the exit's own block, where it has one
    return state.logits(depth, state.last_slots(width)).argmax(-1).tolist()


def now(network: Network) -> float:
    """Return the seconds of a clock, after the device has done what it was asked."""
    if network.device.type != "cpu":
        torch.accelerator.synchronize(network.device)
    return time.perf_counter()
