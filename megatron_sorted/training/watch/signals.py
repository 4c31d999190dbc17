"""SIGTERM and SIGUSR1 mean: save and stop. Nothing heavy is imported here, so that handlers are in place before anything slow is."""

import math
import signal
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# "Temporary failure, try again" of sysexits.h: what a scheduler may requeue on.
EXIT_STOPPED = 75


class StopRequest:
    """The first stop signal this process received (``number``; 0 while there is none), and when the latest came.

    ``last_time`` is of ``time.monotonic``, in seconds.
    """

    def __init__(self) -> None:
        self.number = 0
        self.last_time = -math.inf

    def listen(self) -> None:
        """Start to take note of stop signals, instead of dying of them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.number = self.number or int(number)
        self.last_time = time.monotonic()

    @staticmethod
    def ignore_from_now_on() -> None:
        """Ignore stop signals, also while Python shuts down.

        Ranks are signalled at different times; one that already leaves because another was told to must not die of its own signal.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


stop_request = StopRequest()


def signal_name(number: int) -> str:
    """Return a signal's name, such as SIGTERM."""
    return signal.Signals(number).name
