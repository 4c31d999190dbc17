"""Stop signals: SIGTERM and SIGUSR1 make a run save and stop.

Nothing heavy is imported here, so that handlers are in place before anything slow is.
"""

import math
import signal
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# "Temporary failure, try again" of sysexits.h: the status on which a scheduler may requeue a job.
EXIT_STOPPED = 75


class StopRequest:
    """The stop signals that this process received.

    Attributes:
        number: The first signal; 0 while there is none.
        last_time: The ``time.monotonic()`` of the latest one, in seconds.
    """

    def __init__(self) -> None:
        self.number = 0
        self.last_time = -math.inf

    def listen(self) -> None:
        """Record stop signals from now on, instead of ending on them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._record)

    def _record(self, number: int, _frame) -> None:
        self.number = self.number or int(number)
        self.last_time = time.monotonic()

    @staticmethod
    def ignore_from_now_on() -> None:
        """Ignore stop signals, also while Python shuts down.

        Ranks are signalled at different times; one that already leaves because another rank
        received a signal must not die of its own.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


stop_request = StopRequest()


def signal_name(number: int) -> str:
    """Return a signal's name.

    >>> signal_name(15)
    'SIGTERM'
    """
    return signal.Signals(number).name
