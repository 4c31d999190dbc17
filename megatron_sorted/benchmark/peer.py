"""The peer that ours are measured beside: transformers' own ``generate`` of the same model."""

import torch
from transformers import GenerationConfig

from megatron_sorted.benchmark.trials import Run
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.decoding.text_generator import TextGenerator

HUGGING_FACE = "transformers"


def generation_config(
    writer: TextGenerator, max_new_tokens: int, sampling: SamplingParameters
) -> GenerationConfig:
    """Return the same wishes in transformers' words."""
    ends, is_drawn = sorted(writer.end_ids), sampling.temperature > 0
    words = (
        {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
        }
        if is_drawn
        else {}
    )
    return GenerationConfig(
        do_sample=is_drawn,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=min(ends, default=0),
        repetition_penalty=sampling.repetition_penalty,
        **words,
    )


def peer_run(
    writer: TextGenerator, max_new_tokens: int, sampling: SamplingParameters, **more
) -> Run:
    """Return transformers' ``generate``; prompts of a batch are filled at the left, as it asks.

    Args:
        writer: The model.
        max_new_tokens: Of a text.
        sampling: How tokens are chosen.
        **more: For ``generate``, such as assistant_early_exit.
    """
    config, device = generation_config(writer, max_new_tokens, sampling), writer.network.device

    @torch.inference_mode()
    def run(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        longest = max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device
        )
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        rows = writer.network.model.generate(
            ids, attention_mask=mask, generation_config=config, **more
        )[:, longest:].tolist()
        return [until_end(row, writer.end_ids) for row in rows], 0

    return run


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Return the tokens up to the first end token, which is kept; what follows it is filling."""
    place = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]
