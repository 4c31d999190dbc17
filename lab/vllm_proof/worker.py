"""Runs inside vLLM's own Python: writes texts with an engine that jobs describe, and watches it.

    python -m lab.vllm_proof.worker ANSWERS      jobs as JSON lines on standard input

It imports vLLM, torch and light modules of the project alone: vLLM pins other versions of packages
than the project. The engine stays in this process, so that one engine after another starts in less
than a second, and its scheduler can be watched. Answers are JSON lines in the file ANSWERS.
"""

import gc
import json
import os
import sys
import time
from typing import Any

from megatron_sorted.reading.json_text import parse_json

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables without which the proof would be slow, or wait for a network."""
COMMON = {"enforce_eager": True, "dtype": "float32", "disable_log_stats": False, "seed": 0}
"""Arguments of every engine unless a job has others."""


class Watch:
    """What an engine's scheduler does while texts are written.

    Attributes:
        events: Request -> [drafted, accepted] of each verification.
        num_preempted: Number of times that a request lost its keys and values.
        num_partial: Number of passes that read a part of a prompt.
        most_running: Largest number of requests of a step.
        num_steps: Number of steps that computed something.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self._count, self._preempt = scheduler.make_spec_decoding_stats, scheduler._preempt_request
        self._schedule = scheduler.schedule
        scheduler.make_spec_decoding_stats = self._on_verification
        scheduler._preempt_request = self._on_preemption
        scheduler.schedule = self._on_schedule
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.events: dict[str, list[tuple[int, int]]] = {}
        self.num_preempted = self.num_partial = self.most_running = self.num_steps = 0

    def _on_verification(self, *args: Any, **more: Any) -> Any:
        pair = more["num_draft_tokens"], more["num_accepted_tokens"]
        self.events.setdefault(more["request_id"], []).append(pair)
        return self._count(*args, **more)

    def _on_preemption(self, *args: Any, **more: Any) -> Any:
        self.num_preempted += 1
        return self._preempt(*args, **more)

    def _on_schedule(self, *args: Any, **more: Any) -> Any:
        output = self._schedule(*args, **more)
        scheduled = output.num_scheduled_tokens
        if scheduled:
            self.num_steps += 1
            self.most_running = max(self.most_running, len(scheduled))
        for name in scheduled:
            request = self.scheduler.requests[name]
            self.num_partial += request.num_computed_tokens < request.num_prompt_tokens
        return output


class Engine:
    """The engine of the newest job; jobs that describe the same one share it."""

    def __init__(self) -> None:
        self.description: dict[str, Any] | None = None
        self.engine: Any = None

    def of(self, description: dict[str, Any], keep_tensors: bool) -> Any:
        """Return the engine of a description, started unless it is there.

        Args:
            description: Arguments of vLLM's ``LLM``.
            keep_tensors: Whether weights are to stay tensors, whose bytes can be counted: on CPUs
                vLLM packs them for oneDNN into memory that Python does not see.
        """
        if description == self.description:
            return self.engine
        self.close()
        from vllm import LLM, _custom_ops

        if keep_tensors:
            _custom_ops._supports_onednn = False
        self.before = living_bytes()
        start = time.perf_counter()
        self.engine = LLM(**{**COMMON, **description}).llm_engine
        self.seconds = time.perf_counter() - start
        self.description = description
        self.watch = Watch(self.engine.engine_core.engine_core.scheduler)
        return self.engine

    def close(self) -> None:
        """End the engine and free its memory."""
        if self.engine is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        self.engine = self.watch = self.description = None
        cleanup_dist_env_and_memory()
        gc.collect()


def living_bytes() -> int:
    """Return the bytes of all tensors of this process; memory that several share counts once."""
    import torch

    gc.unfreeze()  # vLLM freezes what it has made at its start
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        except (ReferenceError, RuntimeError, NotImplementedError):
            continue  # a proxy of a removed object; a tensor without memory
    return sum(sizes.values())


def memory_of(worker: Any) -> dict[str, int]:
    """Return the bytes of a worker's weights and of its keys and values, shared ones once."""
    runner = worker.model_runner
    modules = [runner.model, getattr(getattr(runner, "drafter", None), "model", None)]
    weights = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules
        if hasattr(module, "parameters")
        for tensor in (*module.parameters(), *module.buffers())
    }
    caches = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in runner.kv_caches
    }
    config = runner.kv_cache_config
    layers = sum(len(group.layer_names) for group in config.kv_cache_groups)
    return {
        "weights": sum(weights.values()),
        "keys_and_values": sum(caches.values()),
        "cached_layers": layers,
        "blocks": config.num_blocks,
        "drafts_itself": int(len(modules) > 1 and modules[1] is not None),
    }


def write_texts(engine: Any, job: dict[str, Any]) -> list[Any]:
    """Return the last output of each request.

    A request enters at the step that ``job["arrivals"]`` names (all at once by default), and is
    ended from outside when it has ``job["aborts"]`` tokens (none by default).
    """
    from vllm import SamplingParams

    prompts = job["prompts"]
    arrivals = job.get("arrivals") or [0] * len(prompts)
    aborts = job.get("aborts") or [None] * len(prompts)
    seeds = job.get("seeds") or [None] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda place: arrivals[place])
    names: dict[str, int] = {}
    last: list[Any] = [None] * len(prompts)
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and arrivals[waiting[0]] <= step:
            place = waiting.pop(0)
            parameters = SamplingParams(
                **{"detokenize": bool(job["sampling"].get("stop")), **job["sampling"]},
                **({} if seeds[place] is None else {"seed": seeds[place]}),
            )
            prompt = {"prompt_token_ids": prompts[place]}
            engine.add_request(f"r{place}", prompt, parameters)
            names[f"r{place}"] = place
        step += 1
        for output in engine.step():
            place = names[output.request_id]
            last[place] = output
            limit = aborts[place]
            if limit and not output.finished and len(output.outputs[0].token_ids) >= limit:
                engine.abort_request([output.request_id])
    return last


def run(job: dict[str, Any], engines: Engine) -> dict[str, Any]:
    """Return what a job asks for: texts, what the scheduler did, and bytes."""
    engine = engines.of(job["engine"], bool(job.get("memory")))
    if job.get("forget"):  # texts that earlier jobs have left in the cache of prefixes
        engine.reset_prefix_cache()
    if job.get("mend_empty"):
        mend_empty()
    engines.watch.reset()
    used, began = time.process_time(), time.perf_counter()
    outputs = write_texts(engine, job)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    watch = engines.watch
    events: list[list[tuple[int, int]]] = [[] for _ in outputs]
    for name, pairs in watch.events.items():
        events[int(name[1:].split("-")[0])] += pairs
    answer = {
        "texts": [list(one.outputs[0].token_ids) for one in outputs],
        "strings": [one.outputs[0].text for one in outputs],
        "ends": [one.outputs[0].finish_reason for one in outputs],
        "events": events,
        "cached": sum(one.num_cached_tokens or 0 for one in outputs),
        "preempted": watch.num_preempted, "partial": watch.num_partial,
        "most_running": watch.most_running, "steps": watch.num_steps,
        "seconds": seconds, "cpu_seconds": used, "start_seconds": engines.seconds,
    }  # fmt: skip
    if job.get("memory"):
        answer["memory"] = engine.collective_rpc(memory_of)[0]
        answer["memory"]["living"] = living_bytes() - engines.before
    return answer


def mend_empty() -> None:
    """Let vLLM verify steps without drafts where a text asks for top-k, which ends it on CPUs."""
    from vllm.v1.sample import rejection_sampler

    own = rejection_sampler.apply_top_k_top_p
    rejection_sampler.apply_top_k_top_p = lambda logits, k, p: (
        own(logits, k, p) if len(logits) else logits
    )


def main() -> None:
    """Answer jobs until standard input ends."""
    os.environ.update(SETTINGS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    engines = Engine()
    with open(sys.argv[1], "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            try:
                answer = run(parse_json(line, "job"), engines)
            except Exception as error:  # the other side decides what it means
                engines.close()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    engines.close()


if __name__ == "__main__":
    main()
