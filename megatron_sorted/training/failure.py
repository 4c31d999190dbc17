"""How a process that failed tells the user why: once for all ranks, and where the user looks last.

Nothing heavy is imported here: a mistake in the settings is reported within a second.
"""

import json
import os
import sys
import time
import traceback
from typing import NoReturn

from megatron_sorted.errors import SortedError
from megatron_sorted.training.signals import stop_request

# Most errors are met by every rank at once; the first of a host goes ahead, and its launcher ends the others while they wait.
PRECEDENCE_SECONDS = 2.0
# A rank whose peer vanished is a victim: it waits until the launcher has seen the rank that failed by itself.
VICTIM_SECONDS = 6.0


def lost_a_peer(error: BaseException) -> bool:
    """Returns whether communication broke because another process ended."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (isinstance(error, RuntimeError) and ("gloo" in str(error) or "onnection " in str(error)))


def seconds_to_wait(error: BaseException, local_rank: int) -> float:
    """Returns how long a rank waits before it reports, so that the first report is the one that matters."""
    if lost_a_peer(error):
        return VICTIM_SECONDS
    return PRECEDENCE_SECONDS if local_rank > 0 else 0.0


def message_of(error: BaseException) -> str:
    """Returns what the user reads: one line for a mistake of theirs, a traceback for anything else."""
    if isinstance(error, SortedError):
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def wait_for_the_launcher(seconds: float) -> None:
    """Waits, and ends this process without a word if it is told to end meanwhile: the launcher has seen the rank that failed first."""
    told_before = stop_request.number
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.05)
        if stop_request.number and not told_before:
            os._exit(1)


def report_and_exit(error: BaseException, silent: bool = False) -> NoReturn:
    """Prints the error, hands it to the launcher, and ends this process with status 1.

    torchrun shows the content of ``TORCHELASTIC_ERROR_FILE`` of the rank that failed first as the last thing on the console. The
    ``record`` decorator of torch writes that file too, but with a traceback for every mistake, without knowing victims, and only
    after importing torch.

    Args:
        error: What happened.
        silent: Another rank says it, so this one only ends, after it.
    """
    wait_for_the_launcher(VICTIM_SECONDS if silent else seconds_to_wait(error, int(os.environ.get("LOCAL_RANK", 0))))
    if silent:
        os._exit(1)
    message = message_of(error)
    if "RANK" in os.environ and not isinstance(error, SortedError):
        message = f"rank {os.environ['RANK']}: {message}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}}, file)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # Without waiting for communication threads: other ranks may be stuck in a collective until this process is gone.
    os._exit(1)
