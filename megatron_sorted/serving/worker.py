"""One thread that owns the model: requests wait in a line, pieces come back as they are written."""

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.decoding.strategies import EarlyExit, Fixed, SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import StreamedText, TextGenerator
from megatron_sorted.errors import MemoryExhaustedError, SettingsError, SortedError
from megatron_sorted.serving.adaptation import DEFAULT_TASK, JOBS_A_SAVE, Adaptation
from megatron_sorted.serving.answers import BusyError
from megatron_sorted.serving.token_logprobs import TokenScore, TokenTexts, score_text

MOST_WAITING = 64
MOST_RETRY_SECONDS = 60
STOPPING = "the server is stopping. Ask again when it is back."


@dataclass
class Scoring:
    """What is to be told of every token of a request's texts.

    Attributes:
        num_top: Most likely tokens beside it.
        with_prompt: Whether tokens of prompts are told too.
    """

    num_top: int
    with_prompt: bool


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        prompts: Tokens of its texts.
        way, sampling, max_new_tokens, stop: See ``TextGenerator.write``; no way: the one that was learned for the task.
        scoring: Asks for log-probabilities; the scores of each text then come before the pieces, when all texts are over.
        pieces: What was written; an exception, or None at the end.
        gone: Set when nobody waits for it any more.
        told: Called by the worker after something came to the pieces.
        left: Called when nobody waits any more.
    """

    prompts: Sequence[Sequence[int]]
    strategy: Strategy | None
    sampling: SamplingParameters
    max_new_tokens: int
    stop: Sequence[str]
    task: str = DEFAULT_TASK
    scoring: Scoring | None = None
    pieces: queue.Queue = field(default_factory=queue.Queue)
    gone: threading.Event = field(default_factory=threading.Event)
    told: Callable[[], None] = lambda: None
    left: Callable[["Job"], None] = lambda _: None

    def give(self, found: StreamedText | list[list[TokenScore]] | BaseException | None) -> None:
        """Add to the pieces."""
        self.pieces.put(found)
        self.told()

    def leave(self) -> None:
        """Record that nobody waits any more: the job leaves the line, or ends at its next piece."""
        self.gone.set()
        self.left(self)

    def results(self) -> Iterator[StreamedText | list[list[TokenScore]]]:
        """Yield the pieces.

        Raises:
            SortedError: The request cannot be answered.
        """
        while (found := self.pieces.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found


class GenerationWorker:
    """Answers one job after another; a job that fails leaves the model as it is.

    Args:
        writer: The model.
        adaptation: Chooses the way of jobs that name none, and learns from them; its thread is the worker's.
        clock: Tells the seconds that jobs take.
    """

    def __init__(
        self,
        writer: TextGenerator,
        adaptation: Adaptation | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.writer, self.adaptation, self.clock = writer, adaptation, clock
        self.line: deque[Job] = deque()
        self.changed = threading.Condition()
        self.running: Job | None = None
        self.takes_more, self.seconds_a_job = True, 1.0
        self.texts = TokenTexts(writer.tokenizer)
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> Job:
        """Return the job, which now waits in line.

        Raises:
            BusyError: The line is full, or the server is stopping.
        """
        with self.changed:
            if not self.takes_more:
                raise BusyError(STOPPING)
            if len(self.line) >= MOST_WAITING:
                seconds = round(self.seconds_a_job * len(self.line))
                raise BusyError(
                    f"{MOST_WAITING} requests wait already. Try again later.",
                    min(max(seconds, 1), MOST_RETRY_SECONDS),
                )
            job.left = self._drop
            if not job.gone.is_set():
                self.line.append(job)
                self.changed.notify()
        if job.gone.is_set():  # while it was put there, perhaps
            self._drop(job)
            job.give(None)
        return job

    def stop(self) -> None:
        """End all texts with a word to their clients, whether they wait or are written, and take no more."""
        with self.changed:
            self.takes_more = False
            jobs = [*([self.running] if self.running else []), *self.line]
        for job in jobs:
            job.give(BusyError(STOPPING))
            job.leave()

    def close(self, seconds: float | None = None) -> bool:
        """End the thread after the jobs in line, and write what was learned; return whether that was done within ``seconds``."""
        with self.changed:
            self.takes_more = False
            self.changed.notify()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _drop(self, job: Job) -> None:
        """Take a job out of the line, if it still waits there, and tell it so."""
        with self.changed:
            waited = job in self.line
            if waited:
                self.line.remove(job)
        if waited:
            job.give(None)

    def _next(self) -> Job | None:
        """Return the next job; None when there will be none."""
        with self.changed:
            self.running = None
            self.changed.wait_for(lambda: self.line or not self.takes_more)
            self.running = self.line.popleft() if self.line else None
            return self.running

    def _run(self) -> None:
        while (job := self._next()) is not None:
            found, began = None, time.perf_counter()
            try:
                self._answer(job)
            except (
                Exception
            ) as error:  # of a request that cannot be, or a failure: the next one may go well
                if not isinstance(error, SortedError):
                    traceback.print_exception(error)
                found = without_frames(error)
            if isinstance(found, MemoryExhaustedError) and torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            self.seconds_a_job += 0.2 * (time.perf_counter() - began - self.seconds_a_job)
            job.give(found)
            if self.adaptation is not None:
                self.adaptation.save(JOBS_A_SAVE)
        if self.adaptation is not None:
            self.adaptation.save()

    def _answer(self, job: Job) -> None:
        if job.gone.is_set():
            return
        # what a way is worth is not learned where nothing is written, or scored afterwards
        if (
            job.strategy is not None
            or self.adaptation is None
            or job.max_new_tokens < 1
            or job.scoring is not None
        ):
            self._write(job, job.strategy)
            return
        task, place = self.adaptation.choose(job.task)
        began = self.clock()
        try:
            num_tokens = self._write(job, self.adaptation.strategies[place])
        except Exception as error:
            # other errors of ours are of the prompt: no fault of the way
            if not isinstance(error, SortedError) or isinstance(error, MemoryExhaustedError):
                self.adaptation.fail(task, place)
            raise
        self.adaptation.learn(task, place, num_tokens, self.clock() - began)

    def _write(self, job: Job, strategy: Strategy | None) -> int:
        """Return how many tokens were written until the texts were over or nobody waited any more."""
        num_tokens, held = 0, []
        for piece in self.writer.write(
            job.prompts, strategy, job.sampling, job.max_new_tokens, job.stop
        ):
            num_tokens += len(piece.added.tokens)
            if job.gone.is_set():
                break
            if job.scoring is None:
                job.give(piece)
            else:
                held.append(piece)
        if job.scoring is not None and not job.gone.is_set():
            job.give(self._scores(job, held))
            for piece in held:
                job.give(piece)
        return num_tokens

    def _scores(self, job: Job, pieces: Sequence[StreamedText]) -> list[list[TokenScore]]:
        """Return the scores of each text; fewer of them where nobody waits any more."""
        added: list[list[int]] = [[] for _ in job.prompts]
        for piece in pieces:
            added[piece.row] += piece.added.tokens
        scores = []
        for prompt, tokens in zip(job.prompts, added, strict=True):
            if job.gone.is_set():
                break
            scores.append(
                score_text(
                    self.writer.network,
                    self.texts,
                    prompt,
                    tokens,
                    job.scoring.num_top,
                    job.scoring.with_prompt,
                )
            )
        return scores


def check_scoring(strategy: Strategy | None) -> None:
    """Check that a way writes what the full model writes, whose log-probabilities are told.

    Raises:
        SettingsError: It does not.
    """
    if isinstance(strategy, Fixed | EarlyExit):
        raise SettingsError(
            f"logprobs: they are the full model's, and way {strategy.name} writes other texts. Use another way."
        )


def without_frames(error: BaseException) -> BaseException:
    """Return the error without what it remembers of where it happened: that would keep a text's memory until the client is told."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
