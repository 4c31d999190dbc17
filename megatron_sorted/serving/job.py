"""A request to the worker: its texts, and the outputs that its client gets."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_sorted.decoding.strategies import EarlyExit, Fixed, SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.errors import SettingsError
from megatron_sorted.serving.adaptation import DEFAULT_TASK
from megatron_sorted.serving.token_logprobs import Scoring, TokenScore


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
        turn: Number of texts that had begun when it came, or when a text of it was last begun.
        waits_since: Time at which it was put into the queue.
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
    turn: int = 0
    waits_since: float = 0.0
    cached_tokens: int = 0
    layers_run: int = 0

    def put(self, output: StreamedText | list[list[TokenScore]] | BaseException | None) -> None:
        """Add an output and notify the client's side."""
        self.outputs.put(output)
        self.notify()

    def cancel(self) -> None:
        """Remove the job from the queue, or end it at its next round."""
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
