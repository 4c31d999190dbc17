"""vLLM's servers: as it comes, with a smaller model that drafts, and with our plug-in."""

import json
from collections.abc import Sequence
from pathlib import Path

from lab.contests.gguf import extract
from lab.serving.contenders import FULL, SPECULATIVE, Contender, Setting
from lab.serving.dialects import Completions
from lab.serving.servers import Launch
from megatron_sorted.decoding.tuning.tuned_options import TUNED_FILE, read_draft_schedule
from megatron_sorted.installation import ROOT

VLLM, PLUG_IN = "vLLM", "vLLM + plug-in"
"""Names of the engines."""
BY_LOAD = "drafts by load"
CACHE_GIB = 1


def vllm_contenders(
    setting: Setting, python: Path, depth: int | None, work: Path, options: Sequence[str]
) -> list[Contender]:
    """Return vLLM alone, or in every form that the model's exits make possible.

    Args:
        setting: What all servers have in common.
        python: A Python with vLLM.
        depth: The exit that drafts; None: vLLM alone.
        work: Folder of the extracted exit.
        options: vLLM's own options of all forms.
    """
    length = str(setting.draft_tokens)
    arguments = [*_common(setting), *options]
    plain = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", setting.model,
        "--served-model-name", "model", "--host", "127.0.0.1", "--port", "PORT", *arguments,
    ]  # fmt: skip
    contenders = [_contender(setting, VLLM, FULL, plain)]
    if depth is None:
        return contenders
    draft = extract(setting.model, depth, work / f"{setting.model.name}-{depth}")
    config = {
        "method": "draft_model", "model": str(draft), "num_speculative_tokens": int(length)
    }  # fmt: skip
    contenders.append(
        _contender(
            setting, VLLM, f"draft model, {length} tokens",
            [*plain, "--speculative-config", json.dumps(config)],
        )
    )  # fmt: skip
    ours = [
        python, "-m", "megatron_sorted", "serve", setting.model, "--engine", "vllm",
        "--strategy", SPECULATIVE, "--exit-layer", depth, "--served-name", "model",
        "--threads", setting.threads, "--port", "PORT",
    ]  # fmt: skip
    contenders += [
        _contender(setting, PLUG_IN, strategy, [*ours, *more, "--", *arguments])
        for strategy, more in (
            (f"exit {depth} drafts, {length} tokens", ["--num-draft-tokens", length]),
            (f"exit {depth} {BY_LOAD}", []),
        )
    ]
    return contenders


def schedule_text(model: Path, depth: int) -> str:
    """Return how many tokens an exit drafts at each number of texts, as the model's tuning says."""
    rows = read_draft_schedule(model / TUNED_FILE, "vllm", depth).get("schedule", ())
    return (
        ", ".join(f"{first} to {last} texts {length} tokens" for first, last, length in rows)
        or "not tuned"
    )


def _common(setting: Setting) -> list[object]:
    return [
        "--dtype", "float32", "--max-model-len", setting.context,
        "--max-num-seqs", setting.slots, "--no-enable-prefix-caching",
    ]  # fmt: skip


def _contender(
    setting: Setting, engine: str, strategy: str, command: Sequence[object]
) -> Contender:
    name = VLLM if (engine, strategy) == (VLLM, FULL) else f"{engine}, {strategy}"
    variables = {
        **setting.variables, "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    launch = Launch(
        name.replace(",", ""), tuple(map(str, command)), setting.model, tuple(variables.items())
    )
    fields = {
        "model": "model", "ignore_eos": True, "stream_options": {"include_usage": True},
        # the copy has no end token, so that our server writes it as text
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip
    return Contender(name, engine, "float32", strategy, launch, Completions(fields))
