"""Seconds of phases on a clock moved by hand."""

import pytest

from megatron_sorted.training.watch.timers import PHASES, PhaseTimers


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now, self.waits = 100.0, 0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def wait(self) -> None:
        """Wait for a device that needs a second to finish its work."""
        self.waits += 1
        self.now += 1.0


def test_phases_add_up_and_an_inner_one_does_not_count_for_the_outer():
    clock = Clock()
    timers = PhaseTimers(True, lambda: None, clock)
    for _ in range(2):
        with timers("data"):
            clock.now += 1
        clock.now += 100  # outside any phase
        with timers("forward-backward"):
            clock.now += 4
            with timers("gradients"):
                clock.now += 2
            clock.now += 0.5
    assert timers.take(2) == {"data": 1.0, "forward-backward": 4.5, "gradients": 2.0}
    assert timers.take(1) == {}
    with timers("report"):
        clock.now += 3
    assert timers.take(3) == {"report": 1.0}


def test_enabled_it_waits_for_the_device_at_both_ends():
    clock = Clock()
    timers = PhaseTimers(True, clock.wait, clock)
    with timers("optimizer"):
        clock.now += 2
    # the wait before the phase belongs to what came before, the one at its end to it
    assert timers.take(1) == {"optimizer": 3.0} and clock.waits == 2


def test_disabled_it_measures_nothing_and_never_waits():
    clock = Clock()
    timers = PhaseTimers(False, clock.wait, clock)
    with timers("data"), timers("report"):
        clock.now += 5
    assert timers.take(1) == {} and clock.waits == 0


def test_an_error_leaves_the_phase():
    clock = Clock()
    timers = PhaseTimers(True, lambda: None, clock)
    with pytest.raises(ValueError), timers("data"):
        clock.now += 1
        raise ValueError
    with timers("report"):
        clock.now += 1
    assert timers.take(1) == {"data": 1.0, "report": 1.0}


def test_only_known_phases():
    with pytest.raises(AssertionError):
        PhaseTimers(False, lambda: None)("lunch")
    assert "forward-backward" in PHASES
