"""What the proof varies: a base setting, and one factor at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.serving.vllm.options import EngineOptions, engine_arguments

CONTEXT = 512
MEBIBYTE = 1 << 20
ENGINE = {
    "skip_tokenizer_init": True, "max_model_len": CONTEXT, "max_num_seqs": 8,
    "enable_prefix_caching": False, "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 512 * MEBIBYTE,
}  # fmt: skip
"""The engine of the base setting, with the plug-in and without."""
BASE, LONG_BEGINNING = "base", 64
ABORTED_EVERY, ABORTED_AT = 4, 24
"""Of requests that come and go: every which is ended from outside, and after how many tokens."""


@dataclass(frozen=True)
class Factor:
    """A setting of the proof.

    Attributes:
        name: What differs from the base.
        engine: Arguments of both engines that differ.
        options: Options of the plug-in; None: vLLM without it on both sides, alone and in batches.
        sampling: vLLM's sampling parameters that differ.
        shared: Whether all prompts begin with the same tokens.
        arrivals: Steps between two arrivals; 0: all at once.
        aborts: Whether some requests are ended from outside.
        evidence: Count of the answer that must be above 0, or the factor was not there.
        least: Least number of prompts that show it.
        counts: Whether our decoder's drafts are compared: it neither preempts nor aborts.
    """

    name: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    options: EngineOptions | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False
    arrivals: int = 0
    aborts: bool = False
    evidence: str | None = None
    least: int = 0
    counts: bool = True


def factors(depths: Sequence[int], layer_bytes: int) -> list[Factor]:
    """Return the base setting and the factors.

    Args:
        depths: Depths of the model's exits, the full model last.
        layer_bytes: Bytes of one token's keys and values in one layer.
    """
    first, second, third = depths[0], depths[1], depths[-2]
    tight = 7 * 128 * depths[-1] * layer_bytes  # seven blocks for eight texts

    def drafted(depth: int, length: int = 4, **more: Any) -> EngineOptions:
        return EngineOptions("self_speculative", (depth,), num_draft_tokens=length, **more)

    return [
        Factor(BASE, options=drafted(second)),
        Factor(f"exit {first} drafts", options=drafted(first)),
        Factor(f"exit {third} drafts", options=drafted(third)),
        Factor("one draft token", options=drafted(second, 1)),
        Factor("eight draft tokens", options=drafted(first, 8)),
        Factor(
            "draft length by batch size",
            options=drafted(second, draft_schedule=((1, 3, 4), (4, 6, 2), (7, 8, 0))),
            arrivals=4, counts=False,
        ),
        Factor(
            "sorted, two exits",
            options=EngineOptions("sorted_speculative", (first, second), (0.5, 0.3)),
        ),
        Factor(
            "sorted, three exits",
            options=EngineOptions(
                "sorted_speculative", tuple(depths[:3]), (0.8, 0.6, 0.2), num_draft_tokens=8
            ),
        ),
        Factor("one request at once", {"max_num_seqs": 1}, drafted(second)),
        Factor("32 requests at once", {"max_num_seqs": 32}, drafted(second), least=32),
        Factor(
            "prefix caching", {"enable_prefix_caching": True, "block_size": 32}, drafted(second),
            shared=True, evidence="cached",
        ),
        Factor(
            "chunked prefill", {"max_num_batched_tokens": 64}, drafted(second), shared=True,
            evidence="partial",
        ),
        Factor(
            "stop strings", {"skip_tokenizer_init": False}, drafted(second),
            {"stop": [". ", "\n", " and"]}, evidence="stopped",
        ),
        Factor(
            "texts that end by themselves", {}, drafted(second), {"ignore_eos": False},
        ),
        Factor(
            "preemption", {"kv_cache_memory_bytes": tight}, drafted(second), shared=True,
            evidence="preempted", counts=False,
        ),
        Factor(
            "requests that come and go", {}, drafted(second), arrivals=3, aborts=True,
            evidence="aborted", counts=False,
        ),
        Factor("tensor parallel 2", {"tensor_parallel_size": 2}, drafted(second)),
        Factor("vLLM alone and in batches"),
    ]  # fmt: skip


def jobs(
    factor: Factor, model: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> dict[str, dict[str, Any]]:
    """Return the jobs of a factor, those of vLLM without the plug-in first.

    Args:
        factor: The factor.
        model: Hugging Face directory.
        prompts: The prompts.
        num_tokens: Number of new tokens of a text.
    """
    beginning = [3 + place % 200 for place in range(LONG_BEGINNING)] * factor.shared
    job: dict[str, Any] = {
        "prompts": [[*beginning, *prompt] for prompt in prompts],
        "sampling": {
            "temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **factor.sampling
        },
        "arrivals": [place * factor.arrivals for place in range(len(prompts))],
        "forget": True,
    }  # fmt: skip
    if factor.aborts:
        job["aborts"] = [
            ABORTED_AT if place % ABORTED_EVERY == 1 else None for place in range(len(prompts))
        ]
    engine = {**ENGINE, **factor.engine}
    plain = {**job, "engine": {"model": str(model), **engine}}
    if factor.options is None:
        return {"plain": {**plain, "engine": {**plain["engine"], "max_num_seqs": 1}},
                "other": plain}  # fmt: skip
    arguments = engine_arguments(model, factor.options)
    return {"plain": plain, "other": {**job, "engine": {**arguments, **engine}}}
