"""The time of the main thread by cause, step by step.

It is measured from outside: functions of a run are wrapped, none is changed.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

REST = "rest of the loop"
Times = tuple[float, float]
"""Wall seconds and CPU seconds of the thread."""


def read_clocks() -> Times:
    """Return wall time and CPU time of this thread."""
    return time.perf_counter(), time.thread_time()


class Tally:
    """Seconds by cause of each step.

    A cause inside another one is subtracted from the outer one, so that causes add up to the step.
    Only functions that the main thread calls may be wrapped.

    Attributes:
        steps: {cause: (wall, CPU)} of every step; ``REST`` is outside all wrapped functions.
    """

    def __init__(self, clocks: Callable[[], Times] = read_clocks):
        self._clocks = clocks
        self.steps: list[dict[str, Times]] = []
        self._now: dict[str, Times] = {}
        self._open = [REST]
        self._since = clocks()

    def _book(self) -> None:
        now = self._clocks()
        wall, cpu = self._now.get(self._open[-1], (0.0, 0.0))
        self._now[self._open[-1]] = (wall + now[0] - self._since[0], cpu + now[1] - self._since[1])
        self._since = now

    def timed(self, cause: str, function: Callable) -> Callable:
        """Wrap ``function`` so that its time is added to ``cause``."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._book()
            self._open.append(cause)
            try:
                return function(*arguments, **named)
            finally:
                self._book()
                self._open.pop()

        return call

    def wrap(self, owner: Any, name: str, cause: str) -> None:
        """Replace ``owner.name`` by its timed form; the owner is a module, a class or an object."""
        setattr(owner, name, self.timed(cause, getattr(owner, name)))

    def next_step(self) -> None:
        """End a step, and begin the next one."""
        self._book()
        self.steps.append(self._now)
        self._now = {}
