"""What all processes of a job are asked to do together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doctor.finding import Finding
from doctor.local import Question, look_around
from megatron_sorted.platform.processes import World

Show = Callable[[Mapping[str, Sequence[Finding]], Sequence[Mapping[str, Any]]], int]


@dataclass(frozen=True)
class Task:
    """An examination of a job, as one of its processes sees it.

    Attributes:
        question: What is asked about each node.
        root: Of the project.
        environment: Of the process.
        world: Where it stands.
        limit_seconds: How long others may keep it waiting.
        show: Prints findings by host and figures, and returns the exit status.
    """

    question: Question
    root: Path
    environment: Mapping[str, str]
    world: World
    limit_seconds: float
    show: Show

    def look_around(self) -> list[Finding]:
        """Returns what is found on this host."""
        return look_around(self.question, self.root, self.environment, self.world)
