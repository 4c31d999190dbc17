"""The one thread that owns the model: requests join the texts that are being written, and leave."""

import math
import threading
import time
import traceback
from collections.abc import Callable

import torch

from megatron_sorted.decoding.batching.draft_lengths import DraftLengths
from megatron_sorted.decoding.batching.engine import Engine
from megatron_sorted.decoding.batching.options import BatchingCounts, BatchingOptions
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import MemoryExhaustedError, SortedError
from megatron_sorted.serving.adaptation import JOBS_PER_SAVE, Adaptation
from megatron_sorted.serving.answers import BusyError
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.job_run import JobRun, Resources, without_frames
from megatron_sorted.serving.token_logprobs import TokenTexts
from megatron_sorted.serving.waiting import WaitingJobs

MAX_WAITING = 256
MAX_RETRY_SECONDS = 60
STOPPING = "the server is stopping. Ask again when it is back."


class GenerationWorker:
    """Runs many jobs at once; a job that fails leaves the model and the other jobs as they are.

    Args:
        generator: The model and its tokenizer.
        adaptation: Chooses the strategy of jobs that name none, and learns from them; used by the
            worker's thread alone.
        clock: Returns the time in seconds, to measure jobs.
        options: Limits of what is decoded at once.

    Attributes:
        counts: Counts since the start, for monitoring.
        is_ready: Set when the first job can begin; before, costs are measured.
    """

    def __init__(
        self,
        generator: TextGenerator,
        adaptation: Adaptation | None = None,
        clock: Callable[[], float] = time.perf_counter,
        options: BatchingOptions | None = None,
    ):
        self.generator, self.adaptation = generator, adaptation
        self.options, self.counts = options or BatchingOptions(), BatchingCounts()
        self.engine = Engine(generator.network, self.options, self.counts, clock)
        self.resources = Resources(
            generator, self.engine, TokenTexts(generator.tokenizer), self._finish
        )
        self.waiting = WaitingJobs(self.options.max_wait_seconds)
        self.changed = threading.Condition()
        self.runs: list[JobRun] = []
        self.learning: dict[JobRun, tuple[str, int]] = {}
        self.turn, self.turns = 0, {}
        self.starting: list[Job] = []
        self.is_ready = threading.Event()
        self.accepts_jobs, self.seconds_per_job = True, 1.0
        self.last_end = time.perf_counter()
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
                self.counts.requests_refused += 1
                raise self._busy(f"{MAX_WAITING} requests wait already")
            job.on_cancel = self._drop
            job.turn = self.turn
            if not job.cancelled.is_set():
                self.waiting.add(job)
                self.changed.notify()
        if job.cancelled.is_set():  # perhaps between the check and the addition
            self._drop(job)
            job.put(None)
        return job

    def stop(self) -> None:
        """End running and waiting jobs with a `BusyError`, and accept no more."""
        with self.changed:
            self.accepts_jobs = False
            jobs = [*self.starting, *(run.job for run in self.runs), *self.waiting.all()]
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

    def _finish(self, run: JobRun, error: BaseException | None) -> None:
        """End a job's outputs, and learn from it."""
        if run in self.runs:
            with self.changed:
                self.runs.remove(run)
        self._learn(run, error)
        now = time.perf_counter()
        self.seconds_per_job += 0.2 * (now - self.last_end - self.seconds_per_job)
        self.last_end = now
        if run.job.cancelled.is_set():
            self.counts.requests_cancelled += 1
        elif error is None:
            self.counts.requests_finished += 1
        else:
            self.counts.requests_failed += 1
        self.counts.cached_tokens += run.job.cached_tokens
        run.job.put(error)

    def _busy(self, reason: str) -> BusyError:
        seconds = min(max(round(self.seconds_per_job * len(self.waiting)), 1), MAX_RETRY_SECONDS)
        return BusyError(f"{reason}. Try again later.", seconds)

    def _drop(self, job: Job) -> None:
        """Remove a job from the queue and end its outputs, if it still waits."""
        with self.changed:
            waited = self.waiting.remove(job)
            self.changed.notify()
        if waited:
            self.counts.requests_cancelled += 1
            job.put(None)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            self._measure()
        except Exception as error:  # texts are the same without it
            traceback.print_exception(error)
        self.is_ready.set()
        while True:
            try:
                if not self._take_jobs():
                    break
                self.engine.round()
            except Exception as error:  # a defect: the next jobs may succeed
                traceback.print_exception(error)
                for run in list(self.runs):
                    run.fail(error)
            if self.adaptation is not None:
                self.adaptation.save(JOBS_PER_SAVE)
        if self.adaptation is not None:
            self.adaptation.save()

    def _measure(self) -> None:
        """Measure what drafts cost at each load, where passes are joined whatever their length."""
        network, draft = self.generator.network, self.generator.draft
        can_draft = draft is not None or len(network.depths) > 1
        if self.options.drafts_by_load and network.is_native and can_draft:
            self.resources.draft_lengths = DraftLengths(
                network, draft, lambda: len(self.engine.running)
            )

    def _take_jobs(self) -> bool:
        """Begin jobs while there is room, and end cancelled ones; return whether there are any.

        Waits for a job if there are none; False when there will be none.
        """
        while True:
            for run in [run for run in self.runs if run.job.cancelled.is_set()]:
                run.close()
                self._finish(run, None)
            self._refuse_overdue()
            while self._begin_text():
                pass
            self.engine.count()
            with self.changed:
                self.counts.requests_running = len(self.runs)
                self.counts.requests_waiting = len(self.waiting)
                self.counts.texts_waiting = self.waiting.num_texts + sum(
                    len(run.waiting) for run in self.runs
                )
                if self.runs:
                    return True
                if not self.accepts_jobs and not self.waiting:
                    return False
                if not self.waiting:
                    self.changed.wait()
                    self.last_end = time.perf_counter()

    def _refuse_overdue(self) -> None:
        """Refuse jobs that have waited too long, also one that waits for memory alone."""
        with self.changed:
            late = self.waiting.overdue()
            for run in list(self.runs):
                if not run.has_begun and self.waiting.is_overdue(run.job):
                    run.close()
                    self.runs.remove(run)
                    self.learning.pop(run, None)
                    late.append(run.job)
        for job in late:
            self.counts.requests_refused += 1
            job.put(self._busy(f"it has waited {self.options.max_wait_seconds:g} s"))

    def _begin_text(self) -> bool:
        """Begin a text of the owner who has waited longest for a turn; return whether it was.

        Where there is no room for that text, none is begun, so that large ones come to their turn.
        """
        if len(self.engine.running) >= self.options.max_num_seqs:
            return False
        begun = [run for run in self.runs if run.waiting]
        with self.changed:
            tenants = [*(run.job.tenant for run in begun), *self.waiting.tenants()]
            if not tenants:
                return False
            tenant = min(tenants, key=lambda one: self.turns.get(one, 0))
            run = min(
                (run for run in begun if run.job.tenant == tenant),
                key=lambda run: run.job.turn,
                default=None,
            )
            job = self.waiting.next(tenant, math.inf if run is None else run.job.turn)
            self.starting = [] if job is None else [job]
        if job is not None:
            run = self._begin(job)
        if run is not None and run.waiting:
            try:
                if not run.begin():
                    return False
            except Exception as error:
                run.fail(error)
        self.turn += 1
        self.turns[tenant] = self.turn
        if run is not None:
            run.job.turn = self.turn
        return True

    def _begin(self, job: Job) -> JobRun | None:
        """Begin a job; return it unless it is over already."""
        if job.cancelled.is_set():
            self.counts.requests_cancelled += 1
            job.put(None)
            return None
        strategy, learning = job.strategy, None
        # jobs that write nothing, or whose texts are scored, say little about a strategy
        if (
            strategy is None
            and self.adaptation is not None
            and job.max_new_tokens > 0
            and job.scoring is None
        ):
            learning = self.adaptation.choose(job.task)
            strategy = self.adaptation.strategies[learning[1]]
        try:
            run = JobRun(self.resources, job, strategy)
        except Exception as error:
            if not isinstance(error, SortedError):
                traceback.print_exception(error)
            if learning is not None and isinstance(error, MemoryExhaustedError):
                self.adaptation.fail(*learning)
            self.counts.requests_failed += 1
            job.put(without_frames(error))
            return None
        if run.is_over:
            return None
        if learning is not None:
            self.learning[run] = learning
        with self.changed:
            self.runs.append(run)
            self.starting = []
        return run

    def _learn(self, run: JobRun, error: BaseException | None) -> None:
        """Teach the adaptation the speed of a job."""
        learning = self.learning.pop(run, None)
        if learning is None:
            return
        if error is None and run.num_tokens:
            self.adaptation.learn(*learning, run.num_tokens, run.seconds)
        elif error is not None and (
            # our other errors are about the prompt, not the strategy
            not isinstance(error, SortedError) or isinstance(error, MemoryExhaustedError)
        ):
            self.adaptation.fail(*learning)
