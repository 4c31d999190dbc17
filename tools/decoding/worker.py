"""One thread that owns the model: requests wait in a line, pieces come back as they are written."""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.decoding.sampling import Sampling
from megatron_sorted.decoding.ways import Way
from megatron_sorted.decoding.writer import Piece, Writer
from megatron_sorted.errors import MemoryExhaustedError, SortedError

from .adaptation import DEFAULT_TASK, JOBS_A_SAVE, Adaptation

MOST_WAITING = 64


class BusyError(SortedError):
    """Too many requests wait."""


@dataclass
class Job:
    """One request.

    Attributes:
        prompts: Tokens of its texts.
        way, sampling, max_new_tokens, stop: See ``Writer.write``; no way: the one that was learned for the task.
        pieces: What was written; an exception, or None at the end.
        gone: Set when nobody waits for it any more.
        told: Called by the worker after something came to the pieces.
    """

    prompts: Sequence[Sequence[int]]
    way: Way | None
    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str]
    task: str = DEFAULT_TASK
    pieces: queue.Queue = field(default_factory=queue.Queue)
    gone: threading.Event = field(default_factory=threading.Event)
    told: Callable[[], None] = lambda: None

    def give(self, found: Piece | BaseException | None) -> None:
        """Adds to the pieces."""
        self.pieces.put(found)
        self.told()

    def results(self) -> Iterator[Piece]:
        """Yields the pieces.

        Raises:
            SortedError: The request cannot be answered.
        """
        while (found := self.pieces.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found


class Worker:
    """Answers one job after another; a job that fails leaves the model as it is.

    Args:
        writer: The model.
        adaptation: Chooses the way of jobs that name none, and learns from them; its thread is the worker's.
        clock: Tells the seconds that jobs take.
    """

    def __init__(self, writer: Writer, adaptation: Adaptation | None = None, clock: Callable[[], float] = time.perf_counter):
        self.writer, self.adaptation, self.clock, self.line = writer, adaptation, clock, queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> Job:
        """Returns the job, which now waits in line.

        Raises:
            BusyError: The line is full.
        """
        try:
            self.line.put_nowait(job)
        except queue.Full:
            raise BusyError(f"{MOST_WAITING} requests wait already. Try again later.") from None
        return job

    def close(self) -> None:
        """Ends the thread after the jobs in line; what was learned is written."""
        self.line.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (job := self.line.get()) is not None:
            found = None
            try:
                self._answer(job)
            except Exception as error:  # of a request that cannot be, or a failure: the next one may go well
                if not isinstance(error, SortedError):
                    traceback.print_exception(error)
                found = without_frames(error)
            if isinstance(found, MemoryExhaustedError) and torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            job.give(found)
            if self.adaptation is not None:
                self.adaptation.save(JOBS_A_SAVE)
        if self.adaptation is not None:
            self.adaptation.save()

    def _answer(self, job: Job) -> None:
        if job.gone.is_set():
            return
        if job.way is not None or self.adaptation is None:
            self._write(job, job.way)
            return
        task, place = self.adaptation.choose(job.task)
        began = self.clock()
        try:
            num_tokens = self._write(job, self.adaptation.ways[place])
        except Exception as error:
            # other errors of ours are of the prompt: no fault of the way
            if not isinstance(error, SortedError) or isinstance(error, MemoryExhaustedError):
                self.adaptation.fail(task, place)
            raise
        self.adaptation.learn(task, place, num_tokens, self.clock() - began)

    def _write(self, job: Job, way: Way | None) -> int:
        """Returns how many tokens were written until the texts were over or nobody waited any more."""
        num_tokens = 0
        for piece in self.writer.write(job.prompts, way, job.sampling, job.max_new_tokens, job.stop):
            num_tokens += len(piece.added.tokens)
            if job.gone.is_set():
                break
            job.give(piece)
        return num_tokens


def without_frames(error: BaseException) -> BaseException:
    """Returns the error without what it remembers of where it happened: that would keep a text's memory until the client is told."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
