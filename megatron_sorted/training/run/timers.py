"""Where the time of a step goes, on request."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

PHASES = ("data", "forward-backward", "gradients", "optimizer", "report")
"""Micro-batches read; the schedule; reduction of gradients after it; optimizer; numbers collected and written."""

_NOTHING = nullcontext()


class PhaseTimers:
    """Seconds spent in each phase. Disabled it does nothing and never waits for the device.

    A phase inside another one is taken out of the outer one, so that phases add up.

    Args:
        enabled: Whether to measure.
        synchronize: Waits until the device has done all work given to it; called at both ends of every phase.
        clock: Seconds that only grow.
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
        self._turn(phase)
        try:
            yield
        finally:
            self._turn(None)

    def _turn(self, phase: str | None) -> None:
        """Book the time since the last border to the phase under way, and enter ``phase`` or leave the innermost."""
        self._synchronize()
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] = (
                self._seconds.get(self._open[-1], 0.0) + now - self._since
            )
        self._since = now
        if phase is None:
            self._open.pop()
        else:
            self._open.append(phase)

    def take(self, num_steps: int) -> dict[str, float]:
        """Return {phase: mean seconds a step} over ``num_steps`` since the last call, and start anew; empty if disabled."""
        taken = {
            phase: self._seconds[phase] / max(num_steps, 1)
            for phase in PHASES
            if phase in self._seconds
        }
        self._seconds.clear()
        return taken
