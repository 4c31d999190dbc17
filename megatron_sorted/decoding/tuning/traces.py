"""Traces: what every exit would have chosen in texts that the full model generated.

They suffice to forecast the speed of a strategy without running it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import Sampler
from megatron_sorted.decoding.speculation.steps import stops_of
from megatron_sorted.decoding.strategies import Full, SamplingParameters
from megatron_sorted.decoding.texts import Limits


@dataclass(frozen=True)
class Trace:
    """The exits' choices and confidence in one text that the full model generated.

    Attributes:
        tokens: The n new tokens.
        same_dn: Whether the exit would choose the full model's token, by exit and token.
        confidence_dn: Confidence of the exit, by measure, exit and token.
    """

    tokens: list[int]
    same_dn: list[list[bool]]
    confidence_dn: dict[str, list[list[float]]]


@torch.inference_mode()
def record(
    network: Network,
    prompts: Sequence[Sequence[int]],
    depths: Sequence[int],
    sampling: SamplingParameters | None = None,
    limits: Limits | None = None,
    drafter: Network | None = None,
) -> list[Trace]:
    """Generate texts with the full model, then run the exits on each text.

    Args:
        network: The model that generates.
        prompts: The prompts.
        depths: Exits to run.
        sampling: How tokens are chosen.
        limits: Where texts end.
        drafter: Another model whose exits are run; None for the exits of ``network``.
    """
    sampling, drafting = sampling or SamplingParameters(), drafter or network
    traces = []
    for prompt in prompts:
        [text] = generate(network, [prompt], Full(), sampling, limits)
        if not text.tokens:
            continue
        whole, device = [*prompt, *text.tokens], drafting.device
        state = DecodingState(
            drafting, 1, len(whole) + 1, depths if drafter else stops_of(network, depths)
        )
        state.append(torch.tensor([whole[:-1]], device=device))
        slots = torch.arange(len(prompt) - 1, len(whole) - 1, device=device)[None]
        chosen = torch.tensor(text.tokens, device=device)
        sampler, positions = Sampler(sampling, [0]), [list(range(len(prompt), len(whole)))]
        same, confidence = [], {name: [] for name in CONFIDENCE}
        for depth in depths:
            state.read(depth)
            logits_nv = state.logits(depth, slots)[0]
            same.append((sampler.choose(logits_nv[None], positions)[0] == chosen).tolist())
            for name, measure in CONFIDENCE.items():
                confidence[name].append(measure(logits_nv).tolist())
        traces.append(Trace(text.tokens, same, confidence))
    return traces
