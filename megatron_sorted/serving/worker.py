"""The one thread that owns the model: jobs wait in a queue, text is returned as it is written."""

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.decoding.batching.options import BatchingCounts, BatchingOptions
from megatron_sorted.decoding.strategies import EarlyExit, Fixed, SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import StreamedText, TextGenerator
from megatron_sorted.errors import MemoryExhaustedError, SettingsError, SortedError
from megatron_sorted.serving.adaptation import DEFAULT_TASK, JOBS_PER_SAVE, Adaptation
from megatron_sorted.serving.answers import BusyError
from megatron_sorted.serving.token_logprobs import TokenScore, TokenTexts, score_text

MAX_WAITING = 64
MAX_RETRY_SECONDS = 60
STOPPING = "the server is stopping. Ask again when it is back."


@dataclass
class Scoring:
    """The log-probabilities that a request wants for every token of its texts.

    Attributes:
        num_top: Number of most likely tokens listed beside each token.
        with_prompt: Whether tokens of prompts are scored too.
    """

    num_top: int
    with_prompt: bool


@dataclass(eq=False)
class Job:
    """One request to the worker.

    Attributes:
        prompts: Token ids of each prompt.
        strategy: A decoding strategy; None: the one that was learned for the task.
        sampling, max_new_tokens, stop: See ``TextGenerator.write``.
        task: Name under which `Adaptation` learns.
        scoring: The wanted log-probabilities; the scores of all texts then come first, when every
            text is complete.
        outputs: What was written; an exception, or None at the end.
        cancelled: Set when the client no longer waits.
        notify: Called by the worker after it added an output.
        on_cancel: Called when the job is cancelled.
        id: Name of the request in logs.
        tenant: Name of the API key's owner: only texts of the same one share kept beginnings.
        cached_tokens: Number of tokens of the prompts that were kept from earlier texts.
        layers_run: Number of layers that ran for this job, summed over all its tokens.
    """

    prompts: Sequence[Sequence[int]]
    strategy: Strategy | None
    sampling: SamplingParameters
    max_new_tokens: int
    stop: Sequence[str]
    task: str = DEFAULT_TASK
    scoring: Scoring | None = None
    outputs: queue.Queue = field(default_factory=queue.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    notify: Callable[[], None] = lambda: None
    on_cancel: Callable[["Job"], None] = lambda _: None
    id: str = ""
    tenant: str = ""
    cached_tokens: int = 0
    layers_run: int = 0

    def put(self, output: StreamedText | list[list[TokenScore]] | BaseException | None) -> None:
        """Add an output and notify the client's side."""
        self.outputs.put(output)
        self.notify()

    def cancel(self) -> None:
        """Remove the job from the queue, or end it at its next output."""
        self.cancelled.set()
        self.on_cancel(self)

    def results(self) -> Iterator[StreamedText | list[list[TokenScore]]]:
        """Yield the outputs.

        Raises:
            SortedError: The request cannot be answered.
        """
        while (output := self.outputs.get()) is not None:
            if isinstance(output, BaseException):
                raise output
            yield output


class GenerationWorker:
    """Runs one job after another; a job that fails leaves the model as it is.

    Args:
        generator: The model and its tokenizer.
        adaptation: Chooses the strategy of jobs that name none, and learns from them; used by the
            worker's thread alone.
        clock: Returns the time in seconds, to measure jobs.
        options: Limits of what is decoded at once.

    Attributes:
        counts: Counts since the start, for monitoring.
    """

    def __init__(
        self,
        generator: TextGenerator,
        adaptation: Adaptation | None = None,
        clock: Callable[[], float] = time.perf_counter,
        options: BatchingOptions | None = None,
    ):
        self.generator, self.adaptation, self.clock = generator, adaptation, clock
        self.options, self.counts = options or BatchingOptions(), BatchingCounts()
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.running: Job | None = None
        self.accepts_jobs, self.seconds_per_job = True, 1.0
        self.texts = TokenTexts(generator.tokenizer)
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job into the queue and return it.

        Raises:
            BusyError: The queue is full, or the server is stopping.
        """
        with self.changed:
            if not self.accepts_jobs:
                raise BusyError(STOPPING)
            if len(self.waiting) >= MAX_WAITING:
                seconds = round(self.seconds_per_job * len(self.waiting))
                raise BusyError(
                    f"{MAX_WAITING} requests wait already. Try again later.",
                    min(max(seconds, 1), MAX_RETRY_SECONDS),
                )
            job.on_cancel = self._drop
            if not job.cancelled.is_set():
                self.waiting.append(job)
                self.changed.notify()
        if job.cancelled.is_set():  # perhaps between the check and the append
            self._drop(job)
            job.put(None)
        return job

    def stop(self) -> None:
        """End running and waiting jobs with a `BusyError`, and accept no more."""
        with self.changed:
            self.accepts_jobs = False
            jobs = [*([self.running] if self.running else []), *self.waiting]
        for job in jobs:
            job.put(BusyError(STOPPING))
            job.cancel()

    def close(self, seconds: float | None = None) -> bool:
        """End the thread after the waiting jobs and save what was learned.

        Return whether that was done within ``seconds``.
        """
        with self.changed:
            self.accepts_jobs = False
            self.changed.notify()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _drop(self, job: Job) -> None:
        """Remove a job from the queue and end its outputs, if it still waits."""
        with self.changed:
            waited = job in self.waiting
            if waited:
                self.waiting.remove(job)
        if waited:
            job.put(None)

    def _next(self) -> Job | None:
        """Return the next job; None when there will be none."""
        with self.changed:
            self.running = None
            self.changed.wait_for(lambda: self.waiting or not self.accepts_jobs)
            self.running = self.waiting.popleft() if self.waiting else None
            return self.running

    def _run(self) -> None:
        while (job := self._next()) is not None:
            end, began = None, time.perf_counter()
            try:
                self._answer(job)
            except Exception as error:  # the next job may succeed
                if not isinstance(error, SortedError):
                    traceback.print_exception(error)
                end = without_frames(error)
            if isinstance(end, MemoryExhaustedError) and torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            self.seconds_per_job += 0.2 * (time.perf_counter() - began - self.seconds_per_job)
            job.put(end)
            if self.adaptation is not None:
                self.adaptation.save(JOBS_PER_SAVE)
        if self.adaptation is not None:
            self.adaptation.save()

    def _answer(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        # jobs that write nothing, or whose time includes scoring, say little about a strategy
        if (
            job.strategy is not None
            or self.adaptation is None
            or job.max_new_tokens < 1
            or job.scoring is not None
        ):
            self._write(job, job.strategy)
            return
        task, index = self.adaptation.choose(job.task)
        began = self.clock()
        try:
            num_tokens = self._write(job, self.adaptation.strategies[index])
        except Exception as error:
            # our other errors are about the prompt, not the strategy
            if not isinstance(error, SortedError) or isinstance(error, MemoryExhaustedError):
                self.adaptation.fail(task, index)
            raise
        self.adaptation.learn(task, index, num_tokens, self.clock() - began)

    def _write(self, job: Job, strategy: Strategy | None) -> int:
        """Write the texts of a job, until they are complete or it is cancelled.

        Return the number of tokens written.
        """
        num_tokens, unsent = 0, []
        for piece in self.generator.write(
            job.prompts, strategy, job.sampling, job.max_new_tokens, job.stop
        ):
            num_tokens += len(piece.added.tokens)
            if job.cancelled.is_set():
                break
            if job.scoring is None:
                job.put(piece)
            else:
                unsent.append(piece)
        if job.scoring is not None and not job.cancelled.is_set():
            job.put(self._scores(job, unsent))
            for piece in unsent:
                job.put(piece)
        return num_tokens

    def _scores(self, job: Job, pieces: Sequence[StreamedText]) -> list[list[TokenScore]]:
        """Return the scores of each text, of fewer texts if the job is cancelled meanwhile."""
        added: list[list[int]] = [[] for _ in job.prompts]
        for piece in pieces:
            added[piece.row] += piece.added.tokens
        scores = []
        for prompt, tokens in zip(job.prompts, added, strict=True):
            if job.cancelled.is_set():
                break
            scores.append(
                score_text(
                    self.generator.network,
                    self.texts,
                    prompt,
                    tokens,
                    job.scoring.num_top,
                    job.scoring.with_prompt,
                )
            )
        return scores


def check_scoring(strategy: Strategy | None) -> None:
    """Check that a strategy is lossless: log-probabilities are those of the full model.

    Raises:
        SettingsError: It is not.
    """
    if isinstance(strategy, Fixed | EarlyExit):
        raise SettingsError(
            f"logprobs: they are the full model's, and strategy {strategy.name} writes other "
            "texts. Use another strategy."
        )


def without_frames(error: BaseException) -> BaseException:
    """Return the error without its frames, which would keep a text's memory until it is sent."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
