"""What every exit would have said of a text that the full model wrote: from it every way's speed can be told without running it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sorted.decoding.cache.state import State
from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import SURENESS, Sampler
from megatron_sorted.decoding.speculation.steps import stops_of
from megatron_sorted.decoding.strategies import Full, SamplingParameters


@dataclass(frozen=True)
class Trace:
    """One text that the full model wrote, and its exits on it.

    Attributes:
        tokens: That were added to the prompt, n of them.
        same_dn: By exit and token, whether the exit would choose what the full model chose.
        sure_dn: By measure, exit and token, how sure the exit was.
    """

    tokens: list[int]
    same_dn: list[list[bool]]
    sure_dn: dict[str, list[list[float]]]


@torch.inference_mode()
def record(
    network: Network,
    prompts: Sequence[Sequence[int]],
    depths: Sequence[int],
    sampling: SamplingParameters | None = None,
    limits: Limits | None = None,
    drafter: Network | None = None,
) -> list[Trace]:
    """Return what the exits say of the full model's own texts, each read once more.

    Args:
        network: Writes the texts.
        prompts: To go on with.
        depths: Exits to ask.
        sampling: How tokens are chosen.
        limits: Where texts end.
        drafter: Whose exits they are, if another model drafts.
    """
    sampling, reader = sampling or SamplingParameters(), drafter or network
    traces = []
    for prompt in prompts:
        [text] = generate(network, [prompt], Full(), sampling, limits)
        whole, n = [*prompt, *text.tokens], len(text.tokens)
        state = State(reader, 1, len(whole) + 1, depths if drafter else stops_of(network, depths))
        state.append(torch.tensor([whole[:-1]], device=reader.device))
        slots = torch.arange(len(prompt) - 1, len(whole) - 1, device=reader.device)[None]
        chosen = torch.tensor(text.tokens, device=reader.device)
        sampler, places = Sampler(sampling, [0]), [list(range(len(prompt), len(whole)))]
        same, sure = [], {name: [] for name in SURENESS}
        for depth in depths:
            state.read(depth)
            logits_nv = state.logits(depth, slots)[0]
            same.append((sampler.choose(logits_nv[None], places)[0] == chosen).tolist())
            for name, measure in SURENESS.items():
                sure[name].append(measure(logits_nv).tolist())
        if n:
            traces.append(Trace(text.tokens, same, sure))
    return traces
