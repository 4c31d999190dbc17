"""The peer of our strategies: transformers' own ``generate`` with the same model."""

import torch
from transformers import GenerationConfig

from megatron_sorted.benchmark.trials import Run
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.decoding.text_generator import TextGenerator

HUGGING_FACE = "transformers"


def generation_config(
    generator: TextGenerator, max_new_tokens: int, sampling: SamplingParameters
) -> GenerationConfig:
    """Return the sampling parameters and limits as a transformers config."""
    ends, options = sorted(generator.end_ids), {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options["temperature"] = sampling.temperature
        options |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=min(ends, default=0),
        repetition_penalty=sampling.repetition_penalty,
        **options,
    )


def peer_run(
    generator: TextGenerator, max_new_tokens: int, sampling: SamplingParameters, **more
) -> Run:
    """Return a function that runs transformers' ``generate`` on prompts padded at the left.

    Where the compiled library has packed the model, it is read again at the first run.

    Args:
        generator: The model.
        max_new_tokens: Maximum number of new tokens of a text.
        sampling: How tokens are chosen.
        **more: Arguments of ``generate``, such as assistant_early_exit.
    """
    config, device = (
        generation_config(generator, max_new_tokens, sampling),
        generator.network.device,
    )

    @torch.inference_mode()
    def run(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        longest = max(map(len, prompts))
        gaps = [[0] * (longest - len(prompt)) for prompt in prompts]
        rows = list(zip(gaps, prompts, strict=True))
        ids = torch.tensor([gap + prompt for gap, prompt in rows], device=device)
        mask = torch.tensor([gap + [1] * len(prompt) for gap, prompt in rows], device=device)
        rows = (
            generator.network.whole_model()
            .generate(ids, attention_mask=mask, generation_config=config, **more)[:, longest:]
            .tolist()
        )
        return [until_end(row, generator.end_ids) for row in rows], 0

    return run


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Return the tokens up to and including the first end token; what follows is padding.

    >>> until_end([5, 2, 0, 0], frozenset({2}))
    [5, 2]
    """
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
