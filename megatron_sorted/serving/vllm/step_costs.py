"""Measured seconds of vLLM's own steps, by batch size and number of drafted tokens.

A step that drafts and one that verifies follow each other: the scheduler is given, step by step,
how many tokens to draft. So a drafting pass is what a step of drafts takes more than a plain one,
and a verification is a step of its own, with all that vLLM does around them. Other programs can
only add to a step's time, so the lower quartile of many times is taken.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence

from vllm import EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from megatron_sorted.errors import PlatformError, SettingsError
from megatron_sorted.serving.vllm.draft_schedule import StepCosts, lower_quartile

CONTEXT = 128
"""Number of tokens of a text before the steps that are measured."""
LEAST_CONTEXT = 8
SWEEPS, MAX_ROUNDS, LEAST_ROUNDS = 4, 6, 3
MAX_SECONDS = 10.0
"""Time for one batch, after which no further round is begun."""


class StepClock:
    """An engine in this process whose steps are timed.

    Args:
        arguments: vLLM's options, with a draft schedule and without asynchronous scheduling.
        lengths: Numbers of drafted tokens to measure, increasing.

    Attributes:
        context: Number of tokens of a text before the steps that are measured.
        rounds: Number of rounds that a text has room for.

    Raises:
        SettingsError: The model's texts are too short to measure anything.
    """

    def __init__(self, arguments: Sequence[str], lengths: Sequence[int]):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        self.engine = LLMEngine.from_engine_args(
            EngineArgs.from_cli_args(parser.parse_args(list(arguments)))
        )
        # vLLM has no public method that sets the number of drafted tokens of a step
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.lengths = list(lengths)
        model = self.engine.model_config
        self.vocab_size = model.get_vocab_size()
        longest, a_round = model.max_model_len, 1 + sum(length + 2 for length in lengths)
        spare = max(lengths) + 2  # drafts are not made right before the longest text
        self.context = max(LEAST_CONTEXT, min(CONTEXT, longest // 4))
        self.rounds = min(MAX_ROUNDS, (longest - self.context - spare) // a_round - 1)
        if self.rounds < LEAST_ROUNDS:
            least = LEAST_CONTEXT + spare + (1 + LEAST_ROUNDS) * a_round
            raise SettingsError(
                f"--max-model-len {longest}: measuring drafts of up to {max(lengths)} tokens takes "
                f"texts of {4 * least // 3}. Raise it, or lower --num-draft-tokens."
            )

    def close(self) -> None:
        """End the engine and its processes."""
        self.engine.engine_core.shutdown()

    def measure(self, sizes: Sequence[int], report: Callable[[str], None]) -> StepCosts:
        """Return the seconds of steps for each batch size that fits into the cache.

        The sizes are measured upwards and downwards in turns, and in every round all lengths in
        another order, so that a noisy machine is as noisy for all; a first round warms up.

        Raises:
            PlatformError: Not even one text fits, or vLLM drafted another number of tokens.
        """
        times: dict[int, dict[tuple[str, int], list[float]]] = {}
        fitting = list(sizes)
        for size in SWEEPS // 2 * [*sizes, *reversed(sizes)]:
            if size not in fitting:
                continue
            if size not in times:
                report(f"measuring steps of {size} text{'s' if size > 1 else ''} ...")
            names = self._start(size)
            if len(self.scheduler.running) == size:
                self._rounds(times.setdefault(size, {}))
            if len(self.scheduler.running) < size:  # also those that had to give way
                report(f"the cache holds fewer than {size} such texts: no more are measured")
                fitting = [one for one in fitting if one < size]
            self._end(names)
        plain, drafting, verifying = {}, {}, {}
        for size in fitting:
            typical = {key: lower_quartile(row) for key, row in times[size].items()}
            plain[size] = typical["plain", 0]
            more = [(typical["draft", n] - plain[size]) / n for n in self.lengths]
            drafting[size] = max(0.0, statistics.median(more))  # noise may make it less than 0
            verifying[size] = {n: typical["verify", n] for n in self.lengths}
        if not plain:
            raise PlatformError(
                "vLLM's cache holds no text of the length that is measured. Give it more memory: "
                "--kv-cache-memory-bytes after --."
            )
        return StepCosts(plain, drafting, verifying)

    def _start(self, size: int) -> list[str]:
        """Begin texts of random tokens and read their prompts; return their names."""
        draw = random.Random(size)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=None, ignore_eos=True, detokenize=False
        )
        names = [f"{size}-{number}" for number in range(size)]
        for name in names:
            tokens = [draw.randrange(self.vocab_size) for _ in range(self.context)]
            self.engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
        self._draft(0)
        # a prompt is read in pieces, and texts that do not fit wait
        for _ in range(2 + size * self.context):
            self.engine.step()
            waiting = len(self.scheduler.waiting)
            if not waiting and all(one.num_output_tokens for one in self.scheduler.running):
                break
            if waiting and all(one.num_output_tokens > 1 for one in self.scheduler.running):
                break
        return names

    def _end(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        self.engine.step()

    def _rounds(self, times: dict[tuple[str, int], list[float]]) -> None:
        """Add the seconds of steps of the running texts, by kind and number of drafted tokens."""
        order, began = random.Random(0), time.perf_counter()
        for done in range(1 + self.rounds):
            if done > LEAST_ROUNDS and time.perf_counter() - began > MAX_SECONDS:
                break
            for length in order.sample([0, *self.lengths], 1 + len(self.lengths)):
                for key, seconds in self._steps(length):
                    if done:
                        times.setdefault(key, []).append(seconds)

    def _steps(self, length: int) -> list[tuple[tuple[str, int], float]]:
        """Return the seconds of a plain step, or of one that drafts and one that verifies."""
        self._draft(length)
        first = self._timed()
        if not length:
            return [(("plain", 0), first)]
        drafted = {len(one.spec_token_ids) for one in self.scheduler.running}
        if drafted != {length}:
            raise PlatformError(
                f"vLLM drafted {sorted(drafted)} tokens where {length} were asked for, so nothing "
                "can be measured. Serve with a fixed --num-draft-tokens."
            )
        self._draft(0)
        return [(("draft", length), first), (("verify", length), self._timed())]

    def _draft(self, length: int) -> None:
        """Set how many tokens the next steps draft."""
        lookup = self.scheduler.dynamic_sd_lookup
        lookup[:] = [length] * len(lookup)

    def _timed(self) -> float:
        began = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - began
