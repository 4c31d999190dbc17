"""Whether torch computes the same bits for a step alone and beside others, tried with the model.

The compiled library does by its design. torch chooses its products by their number of rows, and
they round differently. Joined steps therefore take products of one fixed number of rows
(`memory.STEP_ROWS`), filled up with zeros. That their rows do not influence each other is no
promise of torch, so that it is tried before it is relied on.
"""

from collections.abc import Sequence

import torch

from megatron_sorted.decoding.cache.joined import ForwardPass, run_joined
from megatron_sorted.decoding.cache.memory import STEP_ROWS
from megatron_sorted.decoding.cache.state import PART, DecodingState
from megatron_sorted.decoding.network import Network

LENGTHS = (3, 24, 17, 9, 2, 12, 7, 5, 10)
"""Lengths of the texts of the trial: more than the rows of a product."""


@torch.inference_mode()
def join_steps(network: Network) -> bool:
    """Let a network join steps if that changes no bit; return whether it does.

    Networks of the compiled library, whose passes are joined anyway, and those with recorded
    graphs, which belong to one cache each, are left as they are.
    """
    if network.is_native or network.graphs or not network.weights.has_plain_products:
        return False
    network.joins_steps = True
    lengths = [length for length in LENGTHS if length + STEP_ROWS < network.max_positions]
    alone = [_logits(network, [length])[0] for length in lengths]
    for group in (lengths, lengths[::-1]):
        together = _logits(network, group)
        together = together if group == lengths else together[::-1]
        if not all(torch.equal(one, other) for one, other in zip(alone, together, strict=True)):
            network.joins_steps = False
    return network.joins_steps


def _logits(network: Network, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return the logits of steps of 1 to 3 tokens behind texts of these lengths."""
    states, logits = [], []
    for length in lengths:
        draw = torch.Generator().manual_seed(length)
        tokens = torch.randint(network.vocab_size, (1, length + 3), generator=draw)
        tokens = tokens.to(network.device)
        state = DecodingState(network, 1, length + 4, network.depths)
        state.append(tokens[:, :length])
        states.append((state, tokens))
        _run(network, [state])
    for count in (0, 1):
        for state, tokens in states:
            begin = state.lengths[0]
            state.append(tokens[:, begin : begin + 1 + count])
        logits.append(_run(network, [state for state, _ in states]))
    return [torch.cat(both) for both in zip(*logits, strict=True)]


def _run(network: Network, states: Sequence[DecodingState]) -> list[torch.Tensor]:
    passes = [ForwardPass(state, network.num_layers, state.last_slots()) for state in states]
    return [one[0] for one in run_joined(passes, [PART] * len(passes)).logits]
