"""Timers of the phases of a step, on request."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

PHASES = ("data", "forward-backward", "gradients", "optimizer", "averaging", "report")
"""The phases of a step.

Micro-batches are read; the schedule runs; gradients are reduced after it; the optimizer steps;
its weights are added to their average; numbers are collected and written.
"""

_NOTHING = nullcontext()


class PhaseTimers:
    """Seconds spent in each phase. Disabled, it does nothing and never waits for the device.

    The time of a phase inside another one does not count for the outer one, so that phases add up.

    >>> seconds = iter([0.0, 1.0, 3.0, 4.0])
    >>> timers = PhaseTimers(True, lambda: None, lambda: next(seconds))
    >>> with timers("forward-backward"):
    ...     with timers("gradients"):
    ...         pass
    >>> timers.take(num_steps=1)
    {'forward-backward': 2.0, 'gradients': 2.0}

    Args:
        enabled: Whether to measure.
        synchronize: A function that waits until the device has done all its work; called at both
            ends of every phase.
        clock: A function that returns seconds that only grow.
    """

    def __init__(
        self,
        enabled: bool,
        synchronize: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.enabled, self._synchronize, self._clock = enabled, synchronize, clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def __call__(self, phase: str) -> AbstractContextManager:
        """Return a context whose duration counts as ``phase``, one of ``PHASES``."""
        assert phase in PHASES, phase
        return self._measure(phase) if self.enabled else _NOTHING

    @contextmanager
    def _measure(self, phase: str) -> Iterator[None]:
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(None)

    def _switch(self, phase: str | None) -> None:
        """Add the time since the last switch to the current phase; enter ``phase`` or leave it."""
        self._synchronize()
        now = self._clock()
        if self._open:
            self._seconds.setdefault(self._open[-1], 0.0)
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
        if phase is None:
            self._open.pop()
        else:
            self._open.append(phase)

    def take(self, num_steps: int) -> dict[str, float]:
        """Return {phase: mean seconds a step} since the last call, and start anew.

        Args:
            num_steps: Number of steps since the last call.
        """
        taken = {
            phase: self._seconds[phase] / max(num_steps, 1)
            for phase in PHASES
            if phase in self._seconds
        }
        self._seconds.clear()
        return taken
