"""Runs of vLLM inside the test's process, and what was drafted and accepted in them."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sorted.serving.vllm.options import EngineOptions, engine_arguments

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 32 << 20,
    "disable_log_stats": False,
    "enable_prefix_caching": False,
}
FULL = EngineOptions()


@dataclass
class Counts:
    """What an engine drafted and how much of it the full model accepted, in tokens.

    Attributes:
        drafted: Number of drafted tokens.
        accepted: Number of accepted ones.
        lengths: Lengths of the drafts.
    """

    drafted: int = 0
    accepted: int = 0
    lengths: tuple[int, ...] = ()


@contextmanager
def engine(directory: Path, options: EngineOptions = FULL, **more: Any) -> Iterator:
    """Start vLLM on a model; yield its ``LLM`` and what it drafts."""
    from vllm import LLM
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    counts, observe = Counts(), SpecDecodingStats.observe_draft

    def observe_and_count(self, num_draft_tokens, num_accepted_tokens, **others):
        counts.drafted += num_draft_tokens
        counts.accepted += num_accepted_tokens
        counts.lengths += (num_draft_tokens,)
        return observe(
            self,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            **others,
        )

    SpecDecodingStats.observe_draft = observe_and_count
    try:
        llm = LLM(**{**ENGINE, **engine_arguments(directory, options), **more})
        yield llm, counts
        llm.llm_engine.engine_core.shutdown()
    finally:
        SpecDecodingStats.observe_draft = observe
        gc.collect()


def generate(llm, prompts: Sequence[Sequence[int]], most: int = 32, **sampling: Any) -> list:
    """Return the tokens that vLLM adds to each prompt, greedily unless ``sampling`` says else."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        **{"temperature": 0, "max_tokens": most, "ignore_eos": True, **sampling}
    )
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


@cache
def plain_texts(directory: Path, prompts: tuple[tuple[int, ...], ...], most: int = 32) -> list:
    """Return the texts of vLLM without the plug-in."""
    with engine(directory) as (llm, _):
        return generate(llm, prompts, most)


def frozen(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return prompts as `plain_texts` takes them."""
    return tuple(map(tuple, prompts))


def runner_of(llm):
    """Return the model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner
