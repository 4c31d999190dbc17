"""What the texts of one request have used so far: tokens by depth, drafts, layers and time."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sorted.decoding.text_generator import StreamedText
from megatron_sorted.serving.job import Job


@dataclass
class TextTimes:
    """When the tokens of one text came.

    Attributes:
        first_at, last_at: Times of its first and its newest tokens.
        num_later: Number of its tokens after those that came first.
    """

    first_at: float
    last_at: float
    num_later: int = 0


class Usage:
    """The counts of one request, for its response, the log and the metrics.

    Args:
        job: The request's job.
        prompt_tokens: Number of tokens of its prompts, each counted once.
        clock: Returns the time in seconds.

    Attributes:
        tokens: Number of new tokens.
        drafted, accepted: Numbers of drafted tokens, and of those in the texts.
        depths: Number of new tokens by the depth of the exit that chose them.
        texts: Times of each text that has tokens, by its number.
        error: Name of the error that ended the texts; None without one.
    """

    def __init__(self, job: Job, prompt_tokens: int, clock: Callable[[], float] = time.monotonic):
        self.job, self.prompt_tokens, self.clock = job, prompt_tokens, clock
        self.tokens = self.drafted = self.accepted = 0
        self.depths: Counter[int] = Counter()
        self.texts: dict[int, TextTimes] = {}
        self.error: str | None = None

    def add(self, output: object) -> None:
        """Record an output of the job: new tokens or an error; others count nothing."""
        if isinstance(output, BaseException):
            self.error = type(output).__name__
        if not isinstance(output, StreamedText):
            return
        added, now = output.added, self.clock()
        self.tokens += len(added.tokens)
        self.drafted += added.num_drafted
        self.accepted += added.num_accepted
        self.depths.update(added.depths)
        if added.tokens and output.row not in self.texts:
            self.texts[output.row] = TextTimes(now, now)
        elif added.tokens:
            self.texts[output.row].last_at = now
            self.texts[output.row].num_later += len(added.tokens)

    @property
    def first_at(self) -> float | None:
        """Return when the first token came; None before that."""
        return min((one.first_at for one in self.texts.values()), default=None)

    @property
    def cached_tokens(self) -> int:
        """Return the number of tokens of the prompts that were kept from earlier texts."""
        return min(self.job.cached_tokens, self.prompt_tokens)  # n texts may share one prompt

    def seconds_per_token(self) -> list[float]:
        """Return the mean time between tokens of each text that has more than its first ones."""
        return [
            (one.last_at - one.first_at) / one.num_later
            for one in self.texts.values()
            if one.num_later
        ]

    def fields(self) -> dict[str, Any]:
        """Return OpenAI's field "usage" with ours: ``layers_run`` and ``depths``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
            "layers_run": self.job.layers_run,
            "depths": {str(depth): self.depths[depth] for depth in sorted(self.depths)},
        }
