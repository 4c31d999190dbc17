"""A job that runs: its texts as tasks of the engine, then their log-probabilities."""

import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_sorted.decoding.batching.draft_lengths import DraftLengths
from megatron_sorted.decoding.batching.engine import Engine
from megatron_sorted.decoding.batching.task import Task
from megatron_sorted.decoding.cache.joined import ForwardPass
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.generate import check_request, sizes_of
from megatron_sorted.decoding.speculation.steps import DecodingBatch
from megatron_sorted.decoding.strategies import SPECULATIVE, Full, Strategy
from megatron_sorted.decoding.text_generator import StreamedText, TextGenerator
from megatron_sorted.decoding.texts import GenerationRequest
from megatron_sorted.errors import SortedError
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.token_logprobs import TokenScore, TokenTexts, score_text


@dataclass
class Resources:
    """What jobs run with.

    Attributes:
        generator: The model and its tokenizer.
        engine: Runs their passes.
        texts: Texts of single tokens.
        finish: Called with a job that runs and None or an error when it is over.
        draft_lengths: Chooses how many tokens are drafted; None: as many as strategies say.
    """

    generator: TextGenerator
    engine: Engine
    texts: TokenTexts
    finish: Callable[["JobRun", BaseException | None], None]
    draft_lengths: DraftLengths | None = None


class JobRun:
    """A job that runs.

    Every text is a task of its own, beside those of other jobs. Where torch decodes and its steps
    cannot be joined, the texts of a job are one batch: what it computes depends on the batch.

    Args:
        resources: What it runs with.
        job: The job.
        strategy: The decoding strategy.

    Attributes:
        waiting: Tasks that are not begun yet.
        has_begun: Whether a text of it was begun.
        is_over: Whether its outputs have ended.
        num_tokens: Number of new tokens.
        seconds: Time that was used for its texts.

    Raises:
        SortedError: The texts cannot be written.
    """

    def __init__(self, resources: Resources, job: Job, strategy: Strategy | None):
        self.resources, self.job, self.has_begun, self.is_over = resources, job, False, False
        self.generator, self.engine = resources.generator, resources.engine
        self.strategy = strategy or Full()
        self.num_tokens, self.seconds = 0, 0.0
        self.tokens: list[list[int]] = [[] for _ in job.prompts]
        self.unsent: list[StreamedText] = []
        self.scores: list[list[TokenScore]] = [[] for _ in job.prompts]
        self.waiting: deque[Task] = deque()
        self.begun: list[Task] = []
        self.has_scored = job.scoring is None
        self.counts = resources.engine.counts
        self.counts.prompt_tokens += sum(map(len, job.prompts))
        if job.max_new_tokens > 0:
            self._add_texts()
        self._go_on()

    def begin(self) -> bool:
        """Begin the next task if there is room for it; return whether it was begun.

        Raises:
            MemoryExhaustedError: There is no room, and nothing that will make room.
        """
        if not self.engine.begin(self.waiting[0]):
            return False
        self.begun.append(self.waiting.popleft())
        self.has_begun = True
        return True

    def close(self) -> None:
        """End the tasks; nothing more is put into the outputs."""
        self.is_over = True
        self.waiting.clear()
        for task in list(self.begun):
            self.engine.end(task)

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        if self.is_over:
            return
        if not isinstance(error, SortedError):
            traceback.print_exception(error)
        self.close()
        self.resources.finish(self, without_frames(error))

    def _add_texts(self) -> None:
        """Add the tasks that write the texts."""
        job, network = self.job, self.generator.network
        draft = self.generator.draft_for(self.strategy)
        is_joined = self.engine.is_joined
        groups = [[row] for row in range(len(job.prompts))]
        for rows in groups if is_joined else [list(range(len(job.prompts)))]:
            request = GenerationRequest(
                [list(job.prompts[row]) for row in rows],
                self.strategy,
                job.sampling,
                job.max_new_tokens,
                job.stop,
                rows[0],
            )
            check_request(request, network, draft)
            sizes = sizes_of(network, request, draft, shared=is_joined)
            task = Task(
                sizes,
                lambda task, request=request, sizes=sizes: self.generator.writing(
                    request, sizes, lambda batch: self._prepare(task, batch)
                ),
                self._put,
                self._end_of_task,
                job.tenant,
                request.prompts[0] if len(rows) == 1 else None,
            )
            self.engine.check(task)
            self.waiting.append(task)

    def _prepare(self, task: Task, batch: DecodingBatch) -> None:
        """Prepare a batch before its first pass: what is kept of its prompt, its draft length."""
        self.engine.begun(task, batch)
        lengths = self.resources.draft_lengths
        if lengths is not None and isinstance(self.strategy, SPECULATIVE):
            batch.draft_length = lengths.choice(self.strategy)

    def _put(self, piece: StreamedText) -> None:
        """Record a new part of a text, and send it unless scores come first."""
        added = piece.added
        self.num_tokens += len(added.tokens)
        self.tokens[piece.row] += added.tokens
        self.counts.generated_tokens += len(added.tokens)
        self.counts.drafted_tokens += added.num_drafted
        self.counts.accepted_tokens += added.num_accepted
        if self.resources.draft_lengths is not None:
            self.resources.draft_lengths.add(self.strategy, added.num_drafted, added.num_accepted)
        if self.job.cancelled.is_set():
            self.close()
        if self.is_over:
            return
        if self.job.scoring is None:
            self.job.put(piece)
        else:
            self.unsent.append(piece)

    def _end_of_task(self, task: Task, error: BaseException | None) -> None:
        """Record the end of a task, and do what comes next."""
        self.begun.remove(task)
        self.seconds += task.seconds
        self.job.layers_run += task.num_layers
        self.job.cached_tokens += task.num_cached
        if error is not None:
            self.fail(error)
        elif not self.is_over:
            self._go_on()

    def _go_on(self) -> None:
        """Score the texts once all are written; end the job once nothing is left."""
        if self.waiting or self.begun:
            return
        if not self.has_scored:
            self.has_scored = True
            for row in range(len(self.job.prompts)):
                self._add_scoring(row)
            return
        self.is_over = True
        if self.job.scoring is not None:
            self.job.put(self.scores)
            for piece in self.unsent:
                self.job.put(piece)
        self.resources.finish(self, None)

    def _add_scoring(self, row: int) -> None:
        """Add the task that scores a text."""
        network, depth = self.generator.network, self.generator.network.num_layers
        prompt, added = list(self.job.prompts[row]), self.tokens[row]
        request = GenerationRequest([[*prompt, *added]], max_new_tokens=0)
        sizes = sizes_of(network, request, None, shared=self.engine.is_joined)

        def start(_: Task) -> Generator[ForwardPass | Any, Tensor, None]:
            state = DecodingState(network, 1, sizes.capacity, [*sizes.stops, depth])
            self.scores[row] = yield from score_text(
                state, self.resources.texts, prompt, added, self.job.scoring
            )

        task = Task(sizes, start, lambda _: None, self._end_of_task, self.job.tenant)
        self.engine.check(task)
        self.waiting.append(task)


def without_frames(error: BaseException) -> BaseException:
    """Return the error without its frames, which would keep a text's memory until it is sent."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
